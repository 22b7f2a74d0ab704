"""Accuracy by codec: trains a recipe with real server and worker processes for every codec and seed.

    python -m bench.codec_accuracy --seeds 0,1,2

Prints a Markdown table: TA and RA, mean and spread (smallest to largest) over the seeds, RA beside that of 32 bits with
the same seed, and bytes per round; then what was promised of RA, and whether it holds.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.report import environment
from bench.settings import parse_codec
from common.config import CodecName, CodecSpec, JobSpec
from common.errors import DatpsError, SpecError, refusal
from common.spec_sources import load_job_spec
from deploy import recipes, runs
from deploy.cluster import DatpsCommands, LocalCluster, threads_per_worker

YARDSTICK = "32"
CODECS = (YARDSTICK, "paper:8x2", "8x2", "4x2", "rotated:4x2", "rotated:2x2", "shared:4", "sign", "topk")
"""Rows, in the short form of `bench.settings.parse_codec`; the first one is what the others are held against."""
WITHIN_SPREAD = ("4x2", "rotated:4x2")
"""Codecs whose mean RA must not lie below the spread of 32 bits: the smallest of its seeds."""
WITHIN_POINTS = {"rotated:2x2": 2.0, "rotated:2": 2.0}
"""By how many points the mean RA of a codec may lie below that of 32 bits."""
OWN_KEYS = ("codec.name", "codec.bits", "codec.two_sided", "seed")
"""Keys of the job spec that our own flags set."""
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class Row:
    """All seeds of one codec; accuracies are fractions, in order of the seeds."""

    codec: str
    name: str
    clean_accuracy: list[float]
    robust_accuracy: list[float]
    pushed_bytes_per_round: float
    pulled_bytes_per_round: float
    parameters: int
    seconds: list[float]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """What was promised of one codec: its mean RA, a fraction, must be `least` at least."""

    codec: str
    rule: str
    found: float
    least: float
    holds: bool


def main(
    recipe: Annotated[str, typer.Option(help="Recipe to train.")] = recipes.DEFAULT,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    codec: Annotated[
        list[str] | None,
        typer.Option(help=f"As in `datps bench network`; may be repeated, 32 is always there. [{', '.join(CODECS)}]"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="dotted.key=value, for all runs.")] = None,
    keep: Annotated[Path | None, typer.Option(help="Keep the run folders here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """Trains `recipe` for every codec and seed and prints the comparison."""
    folder = keep or Path(tempfile.mkdtemp(prefix="datps-bench-"))
    try:
        numbers = _numbers(seeds)
        jobs = jobs_of(recipe, tuple(dict.fromkeys((YARDSTICK, *(codec or CODECS)))), numbers, set_ or ())
        folder.mkdir(parents=True, exist_ok=True)
        rows = [_row(short, by_seed, folder) for short, by_seed in jobs.items()]
    except DatpsError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    if not as_json:
        print(table(rows), *map(_verdict, bars_of(rows)), sep="\n")
        return
    result = {"kind": "codec_accuracy", "environment": environment(), "recipe": recipe, "seeds": numbers}
    result |= {"settings": list(set_ or ()), "rows": [asdict(row) for row in rows]}
    print(json.dumps(result | {"bars": [asdict(bar) for bar in bars_of(rows)]}, indent=1))


def jobs_of(
    recipe: str, codecs: Sequence[str], seeds: Sequence[int], settings: Sequence[str]
) -> dict[str, dict[int, JobSpec]]:
    """The job of every codec and seed: all are known to be valid before the first one is trained.

    Raises:
        SpecError: an unknown recipe, codec or setting, or a setting that a flag of ours has.
    """
    for key in (setting.partition("=")[0].strip() for setting in settings):
        if key in OWN_KEYS:
            raise SpecError(refusal("--codec or --seeds", "--set", key))
    text = recipes.recipe(recipe).text
    return {
        codec: {
            seed: load_job_spec(
                yaml_text=text, yaml_name=recipe, settings=[*settings, *parse_codec(codec), f"seed={seed}"]
            )
            for seed in seeds
        }
        for codec in codecs
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean (smallest to largest) in per cent; bytes as a multiple of the number of parameters."""
    yardstick = rows[0].robust_accuracy
    head = ("codec", "TA %", "RA %", "RA beside 32 bits, points", "pushed, pulled bytes / parameter")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        pushed, pulled = (b / row.parameters for b in (row.pushed_bytes_per_round, row.pulled_bytes_per_round))
        beside = [found - exact for found, exact in zip(row.robust_accuracy, yardstick, strict=True)]
        cells = [row.name, _spread(row.clean_accuracy), _spread(row.robust_accuracy)]
        cells += ["" if row is rows[0] else _spread(beside, "+"), f"{pushed:.3f}, {pulled:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def bars_of(rows: Sequence[Row]) -> list[Bar]:
    """What was promised of the rows that are there; the first one is 32 bits."""
    exact = rows[0].robust_accuracy
    bars: list[Bar] = []
    for row in rows:
        found = statistics.mean(row.robust_accuracy)
        if row.codec in WITHIN_SPREAD:
            rule, least = "within the spread of 32 bits", min(exact)
        elif row.codec in WITHIN_POINTS:
            points = WITHIN_POINTS[row.codec]
            rule, least = f"within {points:g} points of 32 bits", statistics.mean(exact) - points / 100
        else:
            continue
        bars.append(Bar(codec=row.codec, rule=rule, found=found, least=least, holds=found >= least - _ROUNDING))
    return bars


def describe(spec: CodecSpec) -> str:
    """What a row is called."""
    bits = {CodecName.NONE: 32, CodecName.FP16: 16, CodecName.BF16: 16, CodecName.SIGN: 1}.get(spec.name, spec.bits)
    width = f"{bits} bit{'s' if bits > 1 else ''}{' 2-sided' if spec.two_sided else ''}"
    if spec.name is CodecName.NONE:
        return "32 bits"
    if spec.name is CodecName.RANDOMIZED:
        return f"{width}, blocks of {spec.block}"
    if spec.name is CodecName.TOPK:
        return f"{100 * spec.density:.3g} % of the elements, `{spec.name}`"
    return f"{width}, `{spec.name}`"


def _numbers(seeds: str) -> list[int]:
    try:
        return [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise SpecError(refusal("whole numbers, separated by commas", "seeds", seeds)) from None


def _verdict(bar: Bar) -> str:
    found = f"mean RA {100 * bar.found:.2f} %, at least {100 * bar.least:.2f} % wanted ({bar.rule})"
    return f"{bar.codec}: {found}: {'holds' if bar.holds else 'does not hold'}"


def _spread(fractions: Sequence[float], sign: str = "") -> str:
    percent = [100 * fraction for fraction in fractions]
    return f"{statistics.mean(percent):{sign}.1f} ({min(percent):{sign}.1f} to {max(percent):{sign}.1f})"


def _row(codec: str, jobs: Mapping[int, JobSpec], folder: Path) -> Row:
    name = describe(next(iter(jobs.values())).codec)
    results: list[dict[str, Any]] = []
    for seed, spec in jobs.items():
        started_s = time.monotonic()
        own = folder / f"{codec.replace(':', '-')}-seed-{seed}"
        results.append(_train(spec, own, f"{name}, seed {seed}"))
        accuracy = results[-1]["robust_accuracy"]
        print(f"{name}, seed {seed}: RA {accuracy:.4f}, {time.monotonic() - started_s:.0f} s", file=sys.stderr)
    return Row(
        codec=codec,
        name=name,
        clean_accuracy=[result["clean_accuracy"] for result in results],
        robust_accuracy=[result["robust_accuracy"] for result in results],
        pushed_bytes_per_round=statistics.mean(result["pushed_bytes_per_round"] for result in results),
        pulled_bytes_per_round=statistics.mean(result["pulled_bytes_per_round"] for result in results),
        parameters=results[0]["parameters"],
        seconds=[result["seconds"] for result in results],
    )


def _train(spec: JobSpec, folder: Path, title: str) -> dict[str, Any]:
    runs.new_run_folder(title, folder, datetime.now())
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
