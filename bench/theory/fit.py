"""Exponents of power laws: least squares on logarithms, with a bootstrap over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench.theory.problem import Float64

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Fit:
    """y = factor * x^exponent.

    Attributes:
        exponent, factor: of the means over the seeds.
        low, high: 95 % interval of the exponent, from resampled seeds. It is about chance, not about whether a power
            law fits: for that see `steps`.
        steps: the exponent between each two neighbouring points; these differ where it is no power law.
    """

    exponent: float
    factor: float
    low: float
    high: float
    steps: tuple[float, ...]


def fit_exponent(x: Sequence[float], y: Float64, generator: torch.Generator, resamples: int = 2000) -> Fit:
    """Fits the means over the seeds; a resample draws whole seeds, since what is measured with one may hang together.

    Args:
        x: of the points, positive and distinct.
        y: shape (points, seeds), positive.
        generator: draws the resamples.
        resamples: of the bootstrap.
    """
    seeds = y.shape[1]
    log_x = np.log(np.asarray(x, np.float64))
    log_means = np.log(y.mean(axis=1))
    exponent, intercept = _line(log_x, log_means[None])
    draws = torch.randint(seeds, (resamples, seeds), generator=generator).numpy()
    resampled, _ = _line(log_x, np.log(y[:, draws].mean(axis=2)).T)
    low, high = np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return Fit(
        exponent=float(exponent[0]),
        factor=float(np.exp(intercept[0])),
        low=float(low),
        high=float(high),
        steps=tuple((np.diff(log_means) / np.diff(log_x)).tolist()),
    )


def _line(x: Float64, y: Float64) -> tuple[Float64, Float64]:
    """Slopes and intercepts of the least-squares lines through rows of y, shape (rows, points)."""
    centred = x - x.mean()
    slopes = (y @ centred) / (centred @ centred)
    return slopes, y.mean(axis=1) - slopes * x.mean()
