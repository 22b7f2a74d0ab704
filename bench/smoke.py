"""Runs the smoke form of every recipe, one after the other, and says how long each took.

python -m bench.smoke [NAME ...]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from deploy import recipes

LIMIT_S = 60.0
"""What a smoke form may take on two quiet cores; longer ones are marked."""


def main(names: Annotated[list[str] | None, typer.Argument(help="Recipes; all where absent.")] = None) -> None:
    """Ends with 1 if a recipe's smoke form fails."""
    failed = 0
    for name in names or [each.name for each in recipes.all_recipes()]:
        with tempfile.TemporaryDirectory(prefix="datps-smoke-") as folder:
            command = [sys.executable, "-m", "deploy.cli", "train", "--recipe", name, "--smoke", "--no-baseline"]
            started_s = time.monotonic()
            ended = subprocess.run(
                [*command, "--json", "--out", str(Path(folder) / "run")],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            seconds = time.monotonic() - started_s
        slow = f", more than {LIMIT_S:.0f} s" if seconds > LIMIT_S else ""
        print(f"{name}: {'ok' if ended.returncode == 0 else 'FAILED'}, {seconds:.0f} s{slow}", flush=True)
        if ended.returncode != 0:
            failed += 1
            print(ended.stdout[-2000:] + ended.stderr[-2000:], flush=True)
    if failed:
        print(f"{failed} failed", flush=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
