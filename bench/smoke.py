"""Runs the smoke form of every recipe, one after the other, and says how long each took: under a minute on two cores.

The clock says little where others use the machine, so what is limited is the CPU time of all processes of a run.

python -m bench.smoke [NAME ...]
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy import recipes

CPU_LIMIT_S = 120.0
"""A minute of two cores."""


def _cpu_s() -> float:
    """CPU time of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main(names: Annotated[list[str] | None, typer.Argument(help="Recipes; all where absent.")] = None) -> None:
    """Ends with 1 if a recipe's smoke form fails or takes too long."""
    failed = 0
    for name in names or [each.name for each in recipes.all_recipes()]:
        with tempfile.TemporaryDirectory(prefix="datps-smoke-") as folder:
            command = [sys.executable, "-m", "deploy.cli", "train", "--recipe", name, "--smoke", "--no-baseline"]
            started_s, before_s = time.monotonic(), _cpu_s()
            ended = subprocess.run(
                [*command, "--json", "--out", str(Path(folder) / "run")],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            seconds, cpu_s = time.monotonic() - started_s, _cpu_s() - before_s
        took = f"{seconds:.0f} s, CPU {cpu_s:.0f} s"
        if ended.returncode != 0:
            print(f"{name}: FAILED, {took}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}", flush=True)
        elif cpu_s > CPU_LIMIT_S:
            print(f"{name}: TOO SLOW, {took}; a smoke form has {CPU_LIMIT_S:.0f} s of CPU time", flush=True)
        else:
            print(f"{name}: ok, {took}", flush=True)
            continue
        failed += 1
    if failed:
        print(f"{failed} failed", flush=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
