"""The sweeps: one term of Theorem 1 each, with all other terms absent or small.

Where a term is absent: `batch=None` (no sampling noise), codec none, the exact inner maximum, a start at a stationary
point (no descent left). Then eta is so small that its own term stays below the one in question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

from bench.theory.algorithm import Run, Start
from bench.theory.points import Point
from bench.theory.problem import ProblemSpec
from common.config import CodecName, CodecSpec, OptimizerSpec


class LambVariant(StrEnum):
    """Which LAMB."""

    THEOREM = "theorem"
    """beta_1 = 0, c_l = 1, c_u = 2: Theorem 2 speaks of it."""
    DEFAULTS = "defaults"
    """The job spec's: beta_1 = 0.9, beta_2 = 0.999, c_l = 0, c_u = 10. It has no bound: kappa would be infinite."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One variable, and the exponents that the theorems give it where their term for it dominates.

    Attributes:
        name: in the table and on the command line.
        variable: what x is.
        theorem_1: exponent by equation (4), as printed.
        theorem_2: exponent by the largest term of (A25).
        points: at least two.
    """

    name: str
    variable: str
    theorem_1: float
    theorem_2: float
    points: tuple[Point, ...]


_NONE = CodecSpec(name=CodecName.NONE)
_SMALL = ProblemSpec()
_UNEQUAL = ProblemSpec(tilt=1.0, samples=64)
"""Few samples, so that workers' gradients differ by much, and there is something to quantize at a stationary point."""
_ONE_WAY = ProblemSpec(offset=0.5)
"""At its minimum the errors of perturbations do not cancel over the samples."""
_LONG = ProblemSpec(tilt=1.0, samples=64, width=3072)
"""d = 12,288, so that 2^b is well below sqrt(d) up to b = 4."""
_BASE = Run(
    rounds=1000,
    workers=4,
    batch=None,
    codec=_NONE,
    attack_steps=None,
    optimizer=OptimizerSpec(),
    start=Start.STATIONARY,
    seed=0,
)
_MakeLamb = Callable[[float], OptimizerSpec]
_HALF = -0.5


def sweeps(lamb: LambVariant, *, smoke: bool = False) -> tuple[Sweep, ...]:
    """All sweeps; `smoke`: two points of each and few rounds, which shows that it works and nothing else."""
    make = partial(_lamb, lamb)
    return (*_rounds(make, smoke), *_noise(make, smoke), *_bits(make, smoke), _inner(make, smoke))


def levels_of(codec: CodecSpec) -> int:
    """s: 2^b of the paper, 2^(b - 1) - 1 where b counts the sign."""
    return 1 << codec.bits if codec.name is CodecName.PAPER else (1 << (codec.bits - 1)) - 1


def _lamb(lamb: LambVariant, learning_rate: float) -> OptimizerSpec:
    if lamb is LambVariant.DEFAULTS:
        return OptimizerSpec(learning_rate=learning_rate, weight_decay=0.0)
    return OptimizerSpec(
        learning_rate=learning_rate, beta1=0.0, beta2=0.5, weight_decay=0.0, trust_low=1.0, trust_high=2.0
    )


def _rounds(make: _MakeLamb, smoke: bool) -> tuple[Sweep, ...]:
    """eta = 1 / sqrt(T): without noise, and with that of 2 samples a round, symmetric and skewed."""
    counts = (16, 64) if smoke else (64, 128, 256, 512, 1024, 2048, 4096)

    def sweep(name: str, exponent: float, few: Sequence[int], problem: ProblemSpec, base: Run) -> Sweep:
        points = (
            Point(
                x=rounds,
                label=f"T={rounds}",
                problem=problem,
                run=replace(base, rounds=rounds, optimizer=make(rounds**-0.5)),
            )
            for rounds in few
        )
        return Sweep(name=name, variable="T", theorem_1=exponent, theorem_2=exponent, points=tuple(points))

    whole = replace(_BASE, start=Start.FAR)
    two = replace(whole, workers=2, batch=1)
    some = counts if smoke else counts[::2]
    return (
        sweep("rounds", _HALF, counts, _SMALL, whole),
        sweep("rounds, noise", 0.0, some, _SMALL, two),
        sweep("rounds, skewed noise", 0.0, some, ProblemSpec(skew=8.0), two),
    )


def _noise(make: _MakeLamb, smoke: bool) -> tuple[Sweep, ...]:
    """M and B; sigma / sqrt(M B) is large beside a step of eta."""
    base = replace(_BASE, rounds=50 if smoke else 1000, optimizer=make(0.02))

    def sweep(name: str, variable: str, runs: Sequence[tuple[int, Run]]) -> Sweep:
        points = (Point(x=value, label=f"{variable}={value}", problem=_SMALL, run=run) for value, run in runs)
        return Sweep(name=name, variable=variable, theorem_1=_HALF, theorem_2=_HALF, points=tuple(points))

    workers, batches = ((2, 8), (2, 16)) if smoke else ((2, 4, 8, 16, 32), (2, 4, 8, 16, 32, 64))
    return (
        sweep("workers", "M", [(count, replace(base, workers=count, batch=4)) for count in workers]),
        sweep("batch", "B", [(count, replace(base, batch=count)) for count in batches]),
    )


def _bits(make: _MakeLamb, smoke: bool) -> tuple[Sweep, ...]:
    """Levels s of the quantizers, with whole batches: above sqrt(d), below it, and in both directions."""
    many = replace(_BASE, workers=16, rounds=30 if smoke else 1000, optimizer=make(0.0003))
    few = replace(_BASE, rounds=10 if smoke else 500, optimizer=make(0.2))

    def sweep(
        name: str, exponents: tuple[float, float], problem: ProblemSpec, base: Run, codecs: list[CodecSpec]
    ) -> Sweep:
        points = (
            Point(x=levels_of(codec), label=f"b={codec.bits}", problem=problem, run=replace(base, codec=codec))
            for codec in codecs
        )
        return Sweep(name=name, variable="s", theorem_1=exponents[0], theorem_2=exponents[1], points=tuple(points))

    bits, few_bits = ((3, 6), (2, 4)) if smoke else ((3, 4, 5, 6, 7, 8), (2, 3, 4))
    paper, long_paper = ([CodecSpec(name=CodecName.PAPER, bits=b) for b in each] for each in (bits, few_bits))
    blocks = [CodecSpec(name=CodecName.RANDOMIZED, bits=b, two_sided=True) for b in bits]
    return (
        sweep("bits, many levels", (-2.0, -1.0), _UNEQUAL, many, paper),
        sweep("bits, few levels", (-1.0, _HALF), _LONG, few, long_paper),
        sweep("bits, blocks, 2-sided", (-2.0, -1.0), _UNEQUAL, many, blocks),
    )


def _inner(make: _MakeLamb, smoke: bool) -> Sweep:
    """Attack steps K; x is the root of the largest squared error of a sample's gradient, Theorem 1's epsilon."""
    base = replace(_BASE, rounds=50 if smoke else 1000, optimizer=make(0.0003))
    points = (
        Point(x=None, label=f"K={count}", problem=_ONE_WAY, run=replace(base, attack_steps=count))
        for count in ((4, 8) if smoke else (6, 8, 10, 12, 14))
    )
    return Sweep(name="inner accuracy", variable="e", theorem_1=1.0, theorem_2=1.0, points=tuple(points))
