"""Accuracy by codec: trains a recipe with real server and worker processes for every codec and seed.

    python -m bench.codec_accuracy --seeds 0,1,2

Prints a Markdown table: TA and RA, mean and spread (smallest to largest) over the seeds, and bytes per round.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config import JobSpec
from common.errors import DatpsError, refusal
from common.spec_sources import load_job_spec
from deploy import recipes, runs
from deploy.cluster import DatpsCommands, LocalCluster, threads_per_worker

VARIANTS = {
    "32 bits": ("codec.name=none",),
    "8 bits 2-sided, `paper`": ("codec.name=paper", "codec.bits=8", "codec.two_sided=true"),
    "8 bits 2-sided, blocks of 512": ("codec.name=randomized", "codec.bits=8", "codec.two_sided=true"),
    "4 bits 2-sided, blocks of 512": ("codec.name=randomized", "codec.bits=4", "codec.two_sided=true"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """All seeds of one codec; accuracies are fractions, in order of the seeds."""

    name: str
    clean_accuracy: list[float]
    robust_accuracy: list[float]
    pushed_bytes_per_round: float
    pulled_bytes_per_round: float
    parameters: int
    seconds: list[float]


def main(
    recipe: Annotated[str, typer.Option(help="Recipe to train.")] = recipes.DEFAULT,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    set_: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, for all runs.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the run folders here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Trains `recipe` for every codec and seed and prints the comparison."""
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise typer.BadParameter(refusal("whole numbers, separated by commas", "seeds", seeds)) from None
    folder = keep or Path(tempfile.mkdtemp(prefix="datps-bench-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = [_row(name, settings, recipe, numbers, set_ or [], folder) for name, settings in VARIANTS.items()]
    except DatpsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps([asdict(row) for row in rows], indent=1) if as_json else table(rows))


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean (smallest to largest) in per cent; bytes as a multiple of the number of parameters."""
    lines = ["| codec | TA % | RA % | pushed, pulled bytes / parameter |", "|---|---|---|---|"]
    for row in rows:
        pushed, pulled = (b / row.parameters for b in (row.pushed_bytes_per_round, row.pulled_bytes_per_round))
        accuracies = " | ".join(_spread(values) for values in (row.clean_accuracy, row.robust_accuracy))
        lines.append(f"| {row.name} | {accuracies} | {pushed:.3f}, {pulled:.3f} |")
    return "\n".join(lines)


def _spread(fractions: Sequence[float]) -> str:
    percent = [100 * fraction for fraction in fractions]
    return f"{statistics.mean(percent):.1f} ({min(percent):.1f} to {max(percent):.1f})"


def _row(
    name: str, settings: Sequence[str], recipe: str, seeds: Sequence[int], extra: Sequence[str], folder: Path
) -> Row:
    results = []
    for seed in seeds:
        spec = load_job_spec(
            yaml_text=recipes.recipe(recipe).text,
            yaml_name=recipe,
            settings=[*settings, f"seed={seed}", *extra],
        )
        started_s = time.monotonic()
        results.append(_train(spec, folder / f"{len(list(folder.iterdir())):02d}", f"{name}, seed {seed}"))
        accuracy = results[-1]["robust_accuracy"]
        print(f"{name}, seed {seed}: RA {accuracy:.4f}, {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    return Row(
        name=name,
        clean_accuracy=[result["clean_accuracy"] for result in results],
        robust_accuracy=[result["robust_accuracy"] for result in results],
        pushed_bytes_per_round=statistics.mean(result["pushed_bytes_per_round"] for result in results),
        pulled_bytes_per_round=statistics.mean(result["pulled_bytes_per_round"] for result in results),
        parameters=results[0]["parameters"],
        seconds=[result["seconds"] for result in results],
    )


def _train(spec: JobSpec, folder: Path, title: str) -> dict[str, Any]:
    folder.mkdir(parents=True)
    runs.write_job(folder, spec, title)
    commands = DatpsCommands(
        spec=spec, folder=folder, data=None, device="cpu", threads=threads_per_worker(spec.workers), resume=False
    )
    outcome = LocalCluster(spec=spec, folder=folder, commands=commands, observe=_ignore).run()
    result = runs.read_result(folder)
    if outcome.exit_code != 0 or result is None:
        raise DatpsError(f"{title}: {outcome.text}")
    return result


def _ignore(event: dict[str, Any]) -> None:
    del event


if __name__ == "__main__":
    typer.run(main)
