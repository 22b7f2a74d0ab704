"""How an evaluation shows itself: progress on a terminal, and what came out as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from deploy.options import print_pairs

_FIRST = ("model", "round", "rounds", "architecture", "data", "samples", "clean_accuracy")


class EvaluationProgress:
    """A `Watcher` of an evaluation: bars on a terminal, otherwise a line for each attack that is done."""

    def __init__(self, console: Console) -> None:
        """`console`: on standard error, so that results can be piped."""
        self._console = console
        self._tasks: dict[str, TaskID] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begins(self, label: str, batches: int, done: int) -> None:
        """See `Watcher`."""
        note = f"{done} done before" if done else ""
        self._tasks[label] = self._bars.add_task(escape(label), total=batches, completed=done, note=note)

    def stage(self, label: str, stage: str) -> None:
        """See `Watcher`."""
        self._bars.update(self._tasks[label], note=stage)

    def judged(self, label: str, samples: int, right: int) -> None:
        """See `Watcher`."""
        self._bars.update(self._tasks[label], advance=1, note=f"{right} of {samples} right")

    def ends(self, label: str, accuracy: float, seconds: float) -> None:
        """See `Watcher`."""
        if not self._console.is_terminal:
            self._console.print(
                f"{label}: {100 * accuracy:.1f} % right ({seconds:.1f} s)", highlight=False, markup=False
            )


def print_evaluation(result: Mapping[str, Any], *, plain: bool) -> None:
    """The result for people; `plain`: only what one attack needs, as pairs."""
    names = (*_FIRST, "robust_accuracy", "attack") if plain else (*_FIRST, "clean_correct")
    print_pairs({name: result[name] for name in names if name in result})
    console = Console()
    if not plain and result["attacks"]:
        console.print(_attacks(result))
    for sweep in result["sweeps"]:
        console.print(_sweep(sweep))
    for label, text in _warnings(result):
        console.print(Text.assemble((f"warning ({label}): ", "yellow"), text))


def _attacks(result: Mapping[str, Any]) -> Table:
    """AutoAttack with its course; the course of restarts is in the JSON only."""
    attacks: Sequence[Mapping[str, Any]] = result["attacks"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", overflow="fold")
    for name in ("robust accuracy (RA)", "right", "also when clean", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for attack in attacks:
        table.add_row(escape(attack["attack"]), *_counts(attack), f"{attack['seconds']:.1f} s")
        if attack["parameters"]["name"] == "autoattack":
            for stage, accuracy in attack["after"].items():
                table.add_row(f"  after {stage}", _percent(accuracy), style="bright_black")
    if len(attacks) > 1:
        table.add_section()
        table.add_row("worst case", *_counts(result))
    return table


def _sweep(sweep: Mapping[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="robust accuracy (RA)", title_justify="left")
    table.add_column(sweep["key"])
    for label in sweep["attacks"]:
        table.add_column(escape(label), justify="right")
    several = len(sweep["attacks"]) > 1
    if several:
        table.add_column("worst case", justify="right")
    for text, row in zip(sweep["values"], sweep["rows"], strict=True):
        worst = [_percent(row["robust_accuracy"])] if several else []
        table.add_row(text, *(_percent(attack["robust_accuracy"]) for attack in row["attacks"]), *worst)
    return table


def _warnings(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for attack in result["attacks"]:
        for text in attack["warnings"]:
            yield attack["attack"], text
    for sweep in result["sweeps"]:
        for value, row in zip(sweep["values"], sweep["rows"], strict=True):
            for attack in row["attacks"]:
                for text in attack["warnings"]:
                    yield f"{attack['attack']}, {sweep['key']} {value}", text


def _counts(counted: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        _percent(counted["robust_accuracy"]),
        str(counted["robust_correct"]),
        str(counted["robust_and_clean_correct"]),
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
