"""The right-hand side of Theorem 2, equation (A25), with the constants of one problem.

Every constant is an upper bound that holds everywhere, derived from the problem's numbers; `docs/theory.md` has the
proofs.
Deviation: where (A25) has 2 (epsilon + (1 + lambda) sigma^2 / (M B)), this file has 4, which is what (A77) gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.theory.problem import LARGEST_CURVATURE, LARGEST_SLOPE, Float64, Problem
from common.config import CodecName, CodecSpec, OptimizerSpec, ScaleNorm
from common.errors import SpecError, refusal


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Constants of A1-A3 for a problem whose samples are divided among workers.

    Attributes:
        smoothness: L_i of (A54), shape (h,).
        block_smoothness: bounds of the blocks of the Hessian of Psi, shape (h, h); L_i are its row sums.
        gradients: bounds of |g_j| over all workers' gradients, shape (d,).
        deviations: sigma_ij of (A18) within each worker's samples, shape (d,); 0 where batches are whole.
        concavity: mu of A2.
        cross_smoothness: L_phi of (A12).
    """

    smoothness: Float64
    block_smoothness: Float64
    gradients: Float64
    deviations: Float64
    concavity: float
    cross_smoothness: float

    @property
    def gradient_bound(self) -> float:
        """G of A1: of the l2 norm of any worker's gradient."""
        return float(np.linalg.norm(self.gradients))


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What a codec may do to a gradient within the constants.

    Attributes:
        variances: delta_ij^2 of (A19), shape (d,).
        gradient_bound: of an element of the average that the optimizer sees, the G under its root.
    """

    variances: Float64
    gradient_bound: float


@dataclass(frozen=True, kw_only=True)
class Bound:
    """The terms of (A25), in its order."""

    descent: float
    sampling_and_inner: float
    quantization: float
    bias: float
    """kappa sqrt(3) / C * ||chi||_1."""
    step: float

    @property
    def total(self) -> float:
        """The right-hand side."""
        return self.descent + self.sampling_and_inner + self.quantization + self.bias + self.step


def constants_of(problem: Problem, workers: int, *, whole_batches: bool) -> Constants:
    """The constants, with `workers` equal runs of the samples; `whole_batches`: every batch is all of a worker's."""
    spec, mixing = problem.spec, problem.mixing
    shares = problem.shares(workers)
    own_tilts, own_shifts = problem.tilts[shares], problem.shifts[shares]
    largest_tilts = np.abs(own_tilts.mean(axis=1) if whole_batches else problem.tilts).max(axis=0)
    deltas = _largest_deltas(problem)
    # clip((w + c) / mu_k) moves at most 1 / mu_k as fast as c does, and no variable in [-e, e] deviates by more than e
    delta_deviations = np.minimum(own_shifts.std(axis=1) / problem.concavities, deltas)
    deviations = own_tilts.std(axis=1) + delta_deviations @ np.abs(mixing)
    blocks = np.stack(np.split(mixing / np.sqrt(problem.concavities)[:, None], spec.layers, axis=1))
    norms = np.linalg.norm(blocks, 2, axis=(1, 2))
    block_smoothness = np.outer(norms, norms)
    turning = (deltas @ np.abs(mixing)).reshape(spec.layers, -1).max(axis=1)  # of sin'' times A^T delta
    block_smoothness += np.diag(LARGEST_CURVATURE + turning)
    return Constants(
        smoothness=block_smoothness.sum(axis=1),
        block_smoothness=block_smoothness,
        gradients=LARGEST_SLOPE + largest_tilts + deltas @ np.abs(mixing),
        deviations=np.zeros(spec.d) if whole_batches else deviations.max(axis=0),
        concavity=float(problem.concavities.min()),
        cross_smoothness=float(np.linalg.norm(mixing, 2)),
    )


def quantization_of(codec: CodecSpec, constants: Constants) -> Quantization:
    """Bounds of A4 for the codecs that are unbiased and linear in their scale: `none`, `paper`, `randomized` (linf).

    An element at fraction f of a step of c / s has the variance (c / s)^2 f (1 - f), at most (c / s)^2 / 4 and at most
    |g_j| c / s. With c <= G their sum is within min(d / s^2, sqrt(d) / s) G^2 (Remark 2). With `two_sided` the server's
    error adds its variance, which is what the proof needs of it.

    Raises:
        SpecError: another codec.
    """
    gradients = constants.gradients
    if codec.name is CodecName.NONE:
        return Quantization(variances=np.zeros_like(gradients), gradient_bound=constants.gradient_bound)
    if codec.name is CodecName.PAPER:
        scale, levels = constants.gradient_bound, 2**codec.bits
        push = _variances(gradients, scale, levels)
        if not codec.two_sided:
            return Quantization(variances=push, gradient_bound=scale)
        received = gradients + scale / levels  # an element is rounded up by one step at most
        pull_scale = float(np.linalg.norm(received))
        return Quantization(variances=push + _variances(received, pull_scale, levels), gradient_bound=pull_scale)
    if codec.name is CodecName.RANDOMIZED and codec.scale is ScaleNorm.LINF and isinstance(codec.block, int):
        blocks = np.arange(len(gradients)) // codec.block
        scales = np.maximum.reduceat(gradients, np.flatnonzero(np.diff(blocks, prepend=-1)))[blocks]
        levels = 2 ** (codec.bits - 1) - 1
        variances = _variances(gradients, scales, levels)
        if codec.two_sided:
            variances = variances + _variances(scales, scales, levels)
        return Quantization(variances=variances, gradient_bound=constants.gradient_bound)
    raise SpecError(refusal("codec none, paper, or randomized with blocks and scale linf", "codec", codec.name))


def inner_errors(problem: Problem, steps: int | None) -> Float64:
    """Bounds epsilon_ij of (A23) after so many ascent steps (None: the maximum itself), shape (d,).

    From 0 a step brings delta_k closer to delta*_k by the factor 1 - mu_k / max mu at least.
    """
    if steps is None:
        return np.zeros(problem.spec.d)
    errors = (1 - problem.concavities / problem.concavities.max()) ** steps * _largest_deltas(problem)
    squared: Float64 = (errors @ np.abs(problem.mixing)) ** 2
    return squared


def is_covered(optimizer: OptimizerSpec) -> bool:
    """Whether Theorem 2 speaks of such a LAMB: no momentum, no decay, and a lower bound on tau."""
    return not optimizer.beta1 and not optimizer.weight_decay and optimizer.trust_low > 0


def theorem_2(
    constants: Constants,
    quantization: Quantization,
    errors: Float64,
    optimizer: OptimizerSpec,
    *,
    rounds: int,
    workers: int,
    batch: int,
    descent_left: float,
) -> Bound:
    """The terms of (A25).

    Args:
        constants: of A1-A3.
        quantization: of A4.
        errors: epsilon_ij, shape (d,).
        optimizer: eta, beta_2, c_l, c_u and zeta; the theorem wants beta_1 = 0, no decay and c_l > 0.
        rounds: T.
        workers: M.
        batch: B.
        descent_left: E Psi(theta_1) minus a lower bound of Psi, at least Delta_Psi.

    Raises:
        SpecError: an optimizer that the theorem does not speak of.
    """
    if not is_covered(optimizer):
        got = f"{optimizer.beta1}, {optimizer.weight_decay}, {optimizer.trust_low}"
        raise SpecError(refusal("beta1=0, weight_decay=0 and trust_low > 0 (Theorem 2)", "optimizer", got))
    eta, low, high = optimizer.learning_rate, optimizer.trust_low, optimizer.trust_high
    d, h = len(constants.gradients), len(constants.smoothness)
    squared_bound = quantization.gradient_bound**2 + optimizer.stability_eps
    c = 0.25 * float(np.sqrt(h * (1 - optimizer.beta2) / (squared_bound * d)))
    sampling = constants.deviations**2 / (workers * batch)
    kappa = high / low
    chi = float(np.sqrt(sampling + errors + quantization.variances).sum())
    return Bound(
        descent=descent_left / (eta * low * c * rounds),
        sampling_and_inner=4 * float(errors.sum() + sampling.sum()),
        quantization=4 * float(quantization.variances.sum()),
        bias=kappa * 3**0.5 / c * chi,
        step=eta * high * kappa * float(constants.smoothness.sum()) / (2 * c),
    )


def _largest_deltas(problem: Problem) -> Float64:
    """Bounds of |delta_k|, of the maximizer and of every iterate of the ascent from 0, shape (n,)."""
    slopes = np.abs(problem.mixing).sum(axis=1) + np.abs(problem.shifts).max(axis=0)
    largest: Float64 = np.minimum(problem.spec.epsilon, slopes / problem.concavities)
    return largest


def _variances(elements: Float64, scales: Float64 | float, levels: int) -> Float64:
    """Bounds of the variance of elements of at most these magnitudes, with scales of at most `scales`."""
    variances: Float64 = np.minimum(np.square(scales) / (4 * levels**2), scales * elements / levels)
    return variances
