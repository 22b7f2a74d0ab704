"""`datps bench theory`: all sweeps with all seeds, the fits, and the tables."""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from bench.report import environment, table
from bench.theory.fit import fit_exponent
from bench.theory.points import Measured, Point, measure
from bench.theory.sweeps import LambVariant, Sweep, sweeps
from common.errors import SpecError, refusal

_FIT_SEED = 0
_WIDTH = 100
"""Columns that both tables and the legend fit into."""
_LEGEND = """\
x: T rounds, M workers, B samples of a batch, s levels of the quantizer, e root of (A22)'s epsilon.
Theorem 1: exponent of its term, as printed; Theorem 2: of the largest term of (A25). measured: of
(1 / T) sum |grad Psi|^2, with 95 % of a bootstrap over seeds, and from point to point, least to
greatest. bound x: least bound over measured. G^2: no squared gradient exceeds it, theorem or not;
a bound above it says nothing."""


@dataclass(frozen=True, kw_only=True)
class TheoryPlan:
    """What is measured.

    Attributes:
        seeds: each draws a problem, a start, batches and rounding.
        lamb: which LAMB.
        only: names of sweeps; all if empty.
        smoke: two points of each sweep and few rounds.
        processes: that share the work; the numbers do not depend on it.
    """

    seeds: tuple[int, ...]
    lamb: LambVariant = LambVariant.THEOREM
    only: tuple[str, ...] = ()
    smoke: bool = False
    processes: int = 1

    @property
    def sweeps(self) -> tuple[Sweep, ...]:
        """Those that are named.

        Raises:
            SpecError: one is not there.
        """
        every = sweeps(self.lamb, smoke=self.smoke)
        names = [sweep.name for sweep in every]
        for name in self.only:
            if name not in names:
                raise SpecError(refusal(f"one of {'; '.join(names)}", "only", name))
        return tuple(sweep for sweep in every if not self.only or sweep.name in self.only)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` as numbers.

    Raises:
        SpecError: it is something else, or one is there twice.
    """
    rule = "different whole numbers from 0 to 2^63 - 1, separated by commas"
    try:
        seeds = tuple(int(each) for each in text.split(","))
    except ValueError:
        raise SpecError(refusal(rule, "seeds", text)) from None
    if len(set(seeds)) < len(seeds) or not all(0 <= seed < 1 << 63 for seed in seeds):
        raise SpecError(refusal(rule, "seeds", text))
    return seeds


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_theory(plan: TheoryPlan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures all points with all seeds and fits."""
    chosen = plan.sweeps
    found = iter(_measure_all(plan, chosen, say))
    rows = [row_of(sweep, [next(found) for _ in sweep.points]) for sweep in chosen]
    return {
        "kind": "theory",
        "environment": environment(),
        "lamb": plan.lamb.value,
        "smoke": plan.smoke,
        "seeds": list(plan.seeds),
        "sweeps": rows,
    }


def row_of(sweep: Sweep, found: Sequence[Sequence[Measured]]) -> dict[str, Any]:
    """One sweep with its fit; `found`: by point and seed."""
    points = [_point(point.label, of) for point, of in zip(sweep.points, found, strict=True)]
    measured = np.array([[each.measured for each in of] for of in found])
    fit = fit_exponent([point["x"] for point in points], measured, torch.Generator().manual_seed(_FIT_SEED))
    return {
        "name": sweep.name,
        "variable": sweep.variable,
        "theorem_1": sweep.theorem_1,
        "theorem_2": sweep.theorem_2,
        "fit": asdict(fit),
        "points": points,
        "bound_holds": None if found[0][0].bound is None else all(_holds(each) for of in found for each in of),
    }


def _point(label: str, of: Sequence[Measured]) -> dict[str, Any]:
    bounds = [each.bound for each in of if each.bound is not None]
    measured = [each.measured for each in of]
    return {
        "label": label,
        "x": statistics.mean(each.x for each in of),
        "mean": statistics.mean(measured),
        "smallest": min(measured),
        "largest": max(measured),
        "bound": statistics.mean(bounds) if bounds else None,
        "trivial": statistics.mean(each.trivial for each in of),
        "seeds": [each.as_dict() for each in of],
    }


def _holds(each: Measured) -> bool:
    return each.bound is not None and each.measured <= each.bound


def _measure_all(plan: TheoryPlan, chosen: Sequence[Sweep], say: Callable[[str], None]) -> list[list[Measured]]:
    """By point and seed, in order, whoever does them."""
    tasks = [(sweep.name, point) for sweep in chosen for point in sweep.points]
    if plan.processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _collected(tasks, ([measure(point, seed) for seed in plan.seeds] for _, point in tasks), say)
        finally:
            torch.set_num_threads(threads)
    pool = ProcessPoolExecutor(
        plan.processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin_process
    )
    try:
        futures = [[pool.submit(measure, point, seed) for seed in plan.seeds] for _, point in tasks]
        return _collected(tasks, ([future.result() for future in of] for of in futures), say)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    """One thread, as the vectors are short; Ctrl-C is the parent's to hear."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collected(
    tasks: Sequence[tuple[str, Point]], found: Iterable[list[Measured]], say: Callable[[str], None]
) -> list[list[Measured]]:
    by_point = []
    for number, ((name, point), of) in enumerate(zip(tasks, found, strict=True), start=1):
        by_point.append(of)
        say(f"{number} of {len(tasks)}: {name}, {point.label}: {statistics.mean(each.measured for each in of):.3g}")
    return by_point


def print_theory(result: dict[str, Any], console: Console) -> None:
    """Two tables for people: the exponents, and all points beside the bound."""
    if console.width < _WIDTH:  # a narrow terminal breaks the lines, but nothing is cut
        console = Console(file=console.file, width=_WIDTH)
    exponents = table("sweep", "x", "Theorem 1", "Theorem 2", "measured", "95 %", "point to point", "bound x")
    points = table("point", "x", "measured (least to greatest)", "bound (A25)", "G^2")
    exponents.padding = points.padding = (0, 1, 0, 0)
    for row in result["sweeps"]:
        fit = row["fit"]
        exponents.add_row(
            row["name"],
            row["variable"],
            f"{row['theorem_1']:+.1f}",
            f"{row['theorem_2']:+.1f}",
            f"{fit['exponent']:+.2f}",
            f"{fit['low']:+.2f}, {fit['high']:+.2f}",
            f"{min(fit['steps']):+.2f}, {max(fit['steps']):+.2f}",
            _least_ratio(row["points"]),
        )
        for point in row["points"]:
            points.add_row(
                f"{row['name']}: {point['label']}",
                f"{point['x']:.3g}",
                f"{point['mean']:.3g} ({point['smallest']:.3g} to {point['largest']:.3g})",
                "" if point["bound"] is None else f"{point['bound']:.3g}",
                f"{point['trivial']:.3g}",
            )
    console.print(points)
    console.print(exponents)
    console.print(_LEGEND, style="bright_black", highlight=False)
    held = [row["bound_holds"] for row in result["sweeps"]]
    if None in held:
        console.print("Theorem 2 does not speak of this LAMB: there is no bound.")
    else:
        console.print(f"measured <= bound at every point with every seed: {'yes' if all(held) else 'NO'}")


def _least_ratio(points: Sequence[dict[str, Any]]) -> str:
    if points[0]["bound"] is None:
        return ""
    return f"{min(point['bound'] / point['mean'] for point in points):.1e}"
