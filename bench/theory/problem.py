"""A finite-sum min-max problem that satisfies A1-A3, with everything in closed form.

A sample x = (z, c) has a tilt z in R^d and a shift c in R^n. With theta in R^d and a perturbation delta in R^n,

    phi(theta, delta; x) = sum_j r(theta_j - b_j) + <z, theta> + <delta, w(theta; x)> - sum_k mu_k / 2 * delta_k^2
    w(theta; x) = A sin(theta) + c            r(t) = log(1 + t^2) / 2, not convex beyond |t| = 1

to be maximized over |delta_k| <= epsilon; lambda of equation (2) is 0. For every sample the maximum is at
delta*_k = clip(w_k / mu_k, -epsilon, epsilon), and its gradient is that of phi there (Danskin's theorem, (A39)).

The tilts of all samples cancel, and so do their shifts but for -A sin(b) + offset: for each sample there is one with
the opposite deviation. Hence Psi of (A9) has a lower bound in closed form, and with offset 0 its minimum is at b.

Source: our own; `docs/theory.md` has the proofs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from common.errors import SpecError, refusal
from worker.randomness import Purpose, stream_generator

Float64 = NDArray[np.float64]
Indices = NDArray[np.int64]

LARGEST_SLOPE = 0.5
"""sup |r'|, at t = 1."""
LARGEST_CURVATURE = 1.0
"""sup |r''|, at t = 0."""


@dataclass(frozen=True, kw_only=True)
class ProblemSpec:
    """Which problem.

    Attributes:
        layers: h.
        width: elements of a layer, d / h.
        inner: n, elements of a perturbation.
        samples: of all workers together, an even number.
        tilt: standard deviation of an element of z over all samples.
        skew: z is a power of a uniform number, centred: 1 is symmetric; with more, many samples pull a little one way
            and a few pull much the other way.
        shift: c deviates from its mean by a uniform number in [-shift, shift].
        offset: the mean of c over all samples is -A sin(b) plus this; other than 0 it makes perturbations at the
            minimum point one way.
        coupling: the l2 norm of A.
        epsilon: radius of the l-infinity ball.
        concavity: mu, the smallest mu_k; the others go up to `condition` times that.
        condition: the largest mu_k over the smallest.
        seed: of A, b, z and c.
    """

    layers: int = 4
    width: int = 2
    inner: int = 4
    samples: int = 256
    tilt: float = 0.5
    skew: float = 1.0
    shift: float = 1.0
    offset: float = 0.0
    coupling: float = 1.0
    epsilon: float = 0.5
    concavity: float = 1.0
    condition: float = 4.0
    seed: int = 0

    @property
    def d(self) -> int:
        """Elements of theta."""
        return self.layers * self.width


class Problem:
    """The functions of the problem, over all samples or over some of them.

    Attributes:
        spec: which.
        mixing: A, shape (n, d).
        concavities: mu_k, shape (n,).
        centre: b, shape (d,).
        tilts: z of all samples, shape (samples, d).
        shifts: c of all samples, shape (samples, n).
    """

    def __init__(self, spec: ProblemSpec) -> None:
        generator = stream_generator(spec.seed, Purpose.PARAMETERS)
        self.spec = spec
        mixing = torch.randn(spec.inner, spec.d, generator=generator, dtype=torch.float64)
        self.mixing: Float64 = (mixing * (spec.coupling / torch.linalg.matrix_norm(mixing, 2))).numpy()
        self.concavities: Float64 = spec.concavity * np.linspace(1.0, spec.condition, spec.inner)
        signs = torch.randint(2, (spec.d,), generator=generator) * 2 - 1
        self.centre: Float64 = (signs * (0.5 + 0.5 * _uniform((spec.d,), generator))).numpy()
        powers = _uniform((spec.samples, spec.d), generator).pow_(spec.skew).numpy()
        powers -= powers.mean(axis=0)
        self.tilts: Float64 = powers * (spec.tilt / powers.std(axis=0))
        half = (2 * _uniform((spec.samples // 2, spec.inner), generator) - 1).numpy() * spec.shift
        self._deviations: Float64 = np.stack([half, -half], axis=1).reshape(-1, spec.inner)
        self.shifts: Float64 = self._deviations + spec.offset - self.slopes(self.centre)

    def shares(self, workers: int) -> Indices:
        """Whose samples are whose: equal runs, shape (M, samples / M).

        Raises:
            SpecError: they cannot be divided equally.
        """
        samples = self.spec.samples
        if samples % workers:
            raise SpecError(refusal(f"a divisor of samples={samples}", "workers", workers))
        return np.arange(samples).reshape(workers, -1)

    def slopes(self, theta: Float64) -> Float64:
        """w(theta; x) without the sample's shift: A sin(theta), shape (n,)."""
        product: Float64 = self.mixing @ np.sin(theta)
        return product

    def maximizers(self, slopes: Float64, shifts: Float64) -> Float64:
        """delta* of (A21), exactly.

        Args:
            slopes: of `slopes`.
            shifts: c of some samples, shape (..., n).

        Returns:
            Shape (..., n).
        """
        radius = self.spec.epsilon
        return np.clip((slopes + shifts) / self.concavities, -radius, radius)

    def ascend(self, slopes: Float64, shifts: Float64, steps: int) -> Float64:
        """delta after some steps of projected gradient ascent from 0, step size 1 / the largest mu_k."""
        radius, step = self.spec.epsilon, 1.0 / self.concavities.max()
        pull = step * (slopes + shifts)
        keep = 1.0 - step * self.concavities
        deltas = np.zeros_like(shifts)
        for _ in range(steps):
            deltas *= keep
            deltas += pull
            np.clip(deltas, -radius, radius, out=deltas)
        return deltas

    def gaps(self, slopes: Float64, shifts: Float64, deltas: Float64) -> Float64:
        """Per sample max over delta' of <delta' - delta, grad_delta phi(delta)>: Definition 1, read as (A33)."""
        gradient = slopes + shifts - self.concavities * deltas
        gaps: Float64 = (self.spec.epsilon * np.abs(gradient) - deltas * gradient).sum(axis=-1)
        return gaps

    def gradient(self, theta: Float64, tilt: Float64, delta: Float64) -> Float64:
        """grad_theta phi: it is linear in z and in delta, so averages over samples give the average gradient.

        Args:
            theta: shape (d,).
            tilt: z of a sample, or an average, shape (..., d).
            delta: of the same samples, shape (..., n).

        Returns:
            Shape (..., d).
        """
        offset = theta - self.centre
        return offset / (1 + offset**2) + tilt + (delta @ self.mixing) * np.cos(theta)

    def value(self, theta: Float64) -> float:
        """Psi(theta), equation (A9), over all samples."""
        return float(0.5 * np.log1p((theta - self.centre) ** 2).sum()) + self._inner_value(
            self.slopes(theta) + self.shifts
        )

    def lower_bound(self) -> float:
        """A number that Psi nowhere falls below; its minimum, if offset is 0.

        The maximum over delta is a convex and even function H of w, and deviations come in opposite pairs:
        H(v + x) + H(v - x) = H(x + v) + H(x - v) >= 2 H(x) for every v, and r >= 0.
        """
        return self._inner_value(self._deviations)

    def _inner_value(self, pulls: Float64) -> float:
        """Mean over samples of max <delta, w> - sum mu_k / 2 delta_k^2, with w in rows."""
        deltas = self.maximizers(np.zeros(self.spec.inner), pulls)
        return float((deltas * pulls - 0.5 * self.concavities * deltas**2).sum(axis=1).mean())

    def full_gradient(self, theta: Float64) -> Float64:
        """grad Psi(theta), exactly: equations (A40)-(A42) over all samples, shape (d,)."""
        delta = self.maximizers(self.slopes(theta), self.shifts).mean(axis=0)
        return self.gradient(theta, np.zeros(self.spec.d), delta)

    def stationary_point(self, *, tolerance: float = 1e-10, steps: int = 10_000, step_size: float = 0.3) -> Float64:
        """A point where no element of grad Psi exceeds `tolerance`: gradient descent from b.

        Raises:
            SpecError: so many steps did not lead to one.
        """
        theta = self.centre.copy()
        for _ in range(steps):
            gradient = self.full_gradient(theta)
            if np.abs(gradient).max() <= tolerance:
                return theta
            theta -= step_size * gradient
        raise SpecError(refusal(f"a stationary point within {steps} steps", "problem", self.spec))


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64)
