"""The table of a study: mean and spread over the seeds, and what was expected of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deploy.studies.figures import Figures
from deploy.studies.plan import CheckSpec, StudySpec, Value, Within, row_name

_ROUNDING = 1e-9
PERCENT = "accuracy"
"""Columns with this in their name hold fractions, which are shown in per cent."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of the table.

    Attributes:
        row: name, with the values of the grid.
        base, point: name alone; values of the grid by key.
        seeds: those that are done.
        figures: by column, in order of the seeds.
        tuned: how many combinations were tried, 0 without tuning.
        diverged: how many of them had a training that diverged.
        chosen: what tuning has found.
    """

    row: str
    base: str
    point: tuple[tuple[str, Value], ...]
    seeds: tuple[int, ...]
    figures: Mapping[str, Sequence[float]]
    tuned: int = 0
    diverged: int = 0
    chosen: Mapping[str, Value] | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One expectation, and what was found; fractions. What nobody has measured is None, and does not hold."""

    rule: str
    found: float | None
    least: float | None
    holds: bool


def line_of(
    row: str,
    base: str,
    point: tuple[tuple[str, Value], ...],
    by_seed: Mapping[int, Figures],
    *,
    tuned: int = 0,
    diverged: int = 0,
    chosen: Mapping[str, Value] | None = None,
) -> Line:
    """A row from its runs; columns that not all of them have are left out."""
    columns = [name for name in next(iter(by_seed.values())) if all(name in figures for figures in by_seed.values())]
    figures = {name: [each[name] for each in by_seed.values()] for name in columns}
    return Line(
        row=row,
        base=base,
        point=point,
        seeds=tuple(by_seed),
        figures=figures,
        tuned=tuned,
        diverged=diverged,
        chosen=chosen,
    )


def verdicts_of(study: StudySpec, lines: Sequence[Line]) -> list[Verdict]:
    """What the checks say of the rows that are there; one verdict for each pair of them."""
    by_name = {line.row: line for line in lines}
    verdicts = []
    for check in study.checks:
        for line in (each for each in lines if each.base == check.row):
            other = by_name.get(row_name(check.at_least, line.point))
            if other is not None:
                verdicts.append(_verdict(check, line, other))
    return verdicts


def markdown(lines: Sequence[Line]) -> str:
    """The table: mean (smallest to largest) of each column; accuracies in per cent."""
    columns = list(dict.fromkeys(name for line in lines for name in line.figures))
    extra = ["tuned"] if any(line.tuned for line in lines) else []
    head = ["", *map(heading, columns), *extra]
    rows = [head, ["---"] * len(head)]
    for line in lines:
        cells = [shown(name, line.figures[name]) if name in line.figures else "" for name in columns]
        rows.append([line.row, *cells, *([_tuning(line)] if extra else [])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"


def heading(column: str) -> str:
    """`robust_accuracy` -> `robust accuracy, %`."""
    words = column.replace("_", " ")
    return f"{words}, %" if PERCENT in column else words


def shown(column: str, values: Sequence[float]) -> str:
    """Mean, and the least and greatest where there are several; fractions in per cent."""
    numbers = [100 * value for value in values] if PERCENT in column else list(values)
    texts = [_number(each) for each in (statistics.mean(numbers), min(numbers), max(numbers))]
    return texts[0] if len(numbers) == 1 or texts[1] == texts[2] else f"{texts[0]} ({texts[1]} to {texts[2]})"


def in_words(verdict: Verdict) -> str:
    """One line for people."""
    found = "not measured"
    if verdict.found is not None and verdict.least is not None:
        found = f"{100 * verdict.found:.2f} %, at least {100 * verdict.least:.2f} % expected"
    return f"{verdict.rule}: {found}: {'holds' if verdict.holds else 'DOES NOT HOLD'}"


def _verdict(check: CheckSpec, line: Line, other: Line) -> Verdict:
    if check.within is Within.SPREAD:
        how = "within the spread of"
    elif check.gap:
        how = f"{check.gap:g} points above"
    else:
        how = f"at most {check.within:g} points below" if check.within else "no lower than"
    rule = f"{check.of.replace('_', ' ')} of {line.row!r} {how} {other.row!r}"
    if check.of not in line.figures or check.of not in other.figures:
        return Verdict(rule=rule, found=None, least=None, holds=False)
    found, theirs = statistics.mean(line.figures[check.of]), other.figures[check.of]
    if check.within is Within.SPREAD:
        least = min(theirs)
    else:
        least = statistics.mean(theirs) - check.within / 100 + check.gap / 100
    return Verdict(rule=rule, found=found, least=least, holds=found >= least - _ROUNDING)


def _tuning(line: Line) -> str:
    chosen = ", ".join(f"{key}={value}" for key, value in (line.chosen or {}).items())
    diverged = f", {line.diverged} diverged" if line.diverged else ""
    return f"{line.tuned} tried{diverged}; {chosen}" if line.tuned else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) < 10 else f"{value:.1f}"
