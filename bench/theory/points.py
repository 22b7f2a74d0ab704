"""One point of a sweep: what is measured, and the bound of Theorem 2 beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bench.theory.algorithm import Run, train
from bench.theory.bound import constants_of, inner_errors, is_covered, quantization_of, theorem_2
from bench.theory.problem import Problem, ProblemSpec


@dataclass(frozen=True, kw_only=True)
class Point:
    """A problem and a run whose seeds are yet to be given; `x` is None where it is the inner error that is found."""

    x: float | None
    label: str
    problem: ProblemSpec
    run: Run


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point with one seed.

    Attributes:
        x: of the point.
        measured: (1 / T) sum_t |grad Psi(theta_t)|^2.
        terms: of (A25) by name; None where Theorem 2 does not speak of the optimizer.
        trivial: G^2, which no squared gradient exceeds, theorem or not.
        inner_error, certified_inner_error: see `Outcome`.
    """

    x: float
    measured: float
    terms: dict[str, float] | None
    trivial: float
    inner_error: float
    certified_inner_error: float

    @property
    def bound(self) -> float | None:
        """The right-hand side of (A25)."""
        return None if self.terms is None else sum(self.terms.values())

    def as_dict(self) -> dict[str, Any]:
        """For the result."""
        return {**asdict(self), "bound": self.bound}


def measure(point: Point, seed: int) -> Measured:
    """Trains once; the seed draws the problem's data, the start, the batches and the codec's rounding."""
    problem = Problem(replace(point.problem, seed=seed))
    run = replace(point.run, seed=seed)
    outcome = train(problem, run)
    constants = constants_of(problem, run.workers, whole_batches=run.batch is None)
    terms = None
    if is_covered(run.optimizer):
        bound = theorem_2(
            constants,
            quantization_of(run.codec, constants),
            inner_errors(problem, run.attack_steps),
            run.optimizer,
            rounds=run.rounds,
            workers=run.workers,
            batch=run.batch or 1,
            descent_left=outcome.descent_left,
        )
        terms = asdict(bound)
    return Measured(
        x=float(np.sqrt(outcome.inner_error)) if point.x is None else point.x,
        measured=outcome.mean_squared_gradient,
        terms=terms,
        trivial=constants.gradient_bound**2,
        inner_error=outcome.inner_error,
        certified_inner_error=outcome.certified_inner_error,
    )
