"""The problem of `bench theory` satisfies A1-A3: gradients against autograd, constants as inequalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from bench.theory.bound import constants_of, inner_errors
from bench.theory.problem import Float64, Problem, ProblemSpec
from common.errors import SpecError

SPECS = [
    ProblemSpec(samples=32),
    ProblemSpec(
        layers=3, width=5, inner=7, samples=30, tilt=1.3, skew=8.0, coupling=2.5, offset=0.5, epsilon=0.3, seed=4
    ),
]
WORKERS = 2
each_problem = pytest.mark.parametrize("problem", [Problem(spec) for spec in SPECS], ids=["default", "another"])


def phi(problem: Problem, theta: torch.Tensor, delta: torch.Tensor, sample: int) -> torch.Tensor:
    """phi(theta, delta; x) as the head of `problem.py` writes it."""
    tilt, shift = torch.from_numpy(problem.tilts[sample]), torch.from_numpy(problem.shifts[sample])
    w = torch.from_numpy(problem.mixing) @ torch.sin(theta) + shift
    loss = 0.5 * torch.log(1 + (theta - torch.from_numpy(problem.centre)) ** 2)
    concave = 0.5 * torch.from_numpy(problem.concavities) * delta**2
    return loss.sum() + tilt @ theta + delta @ w - concave.sum()


def psi(problem: Problem, theta: torch.Tensor) -> torch.Tensor:
    """The mean over all samples at their maximizers."""
    slopes = torch.from_numpy(problem.mixing) @ torch.sin(theta)
    total = torch.zeros((), dtype=torch.float64)
    for sample, shift in enumerate(problem.shifts):
        pull = (slopes + torch.from_numpy(shift)) / torch.from_numpy(problem.concavities)
        total = total + phi(problem, theta, pull.clamp(-problem.spec.epsilon, problem.spec.epsilon), sample)
    return total / problem.spec.samples


def thetas(problem: Problem, count: int, spread: float = 3.0) -> Float64:
    rng = np.random.default_rng(1)
    return problem.centre + spread * rng.standard_normal((count, problem.spec.d))


def boxed(problem: Problem, count: int) -> Float64:
    """Perturbations in the ball, many of their elements at its surface."""
    radius = problem.spec.epsilon
    return np.clip(np.random.default_rng(2).normal(0, radius, (count, problem.spec.inner)), -radius, radius)


@each_problem
def test_the_exact_maximizer_is_that_of_a_general_optimizer(problem: Problem) -> None:
    theta = thetas(problem, 1)[0]
    exact = problem.maximizers(problem.slopes(theta), problem.shifts)
    bounds = [(-problem.spec.epsilon, problem.spec.epsilon)] * problem.spec.inner
    for sample in range(2):

        def negative(delta: Float64, sample: int = sample) -> float:
            return -phi(problem, torch.from_numpy(theta), torch.from_numpy(delta), sample).item()

        found = minimize(negative, np.zeros(problem.spec.inner), method="L-BFGS-B", bounds=bounds)
        assert np.allclose(found.x, exact[sample], atol=1e-4)


@each_problem
def test_the_gradient_of_psi_is_that_of_autograd_and_of_differences(problem: Problem) -> None:
    for theta in thetas(problem, 2):
        variable = torch.from_numpy(theta).requires_grad_()
        value = psi(problem, variable)
        (by_autograd,) = torch.autograd.grad(value, variable)
        assert problem.value(theta) == pytest.approx(value.item(), abs=1e-12)
        gradient = problem.full_gradient(theta)
        assert np.allclose(gradient, by_autograd.numpy(), atol=1e-12)
        step = 1e-5 * np.eye(problem.spec.d)
        differences = [(problem.value(theta + e) - problem.value(theta - e)) / 2e-5 for e in step]
        assert np.allclose(gradient, differences, atol=1e-6)


@each_problem
def test_the_gradient_of_a_sample_is_that_of_autograd_at_any_perturbation(problem: Problem) -> None:
    theta, delta = thetas(problem, 1)[0], boxed(problem, 1)[0]
    variable = torch.from_numpy(theta).requires_grad_()
    (by_autograd,) = torch.autograd.grad(phi(problem, variable, torch.from_numpy(delta), 3), variable)
    assert np.allclose(problem.gradient(theta, problem.tilts[3], delta), by_autograd.numpy(), atol=1e-12)


@each_problem
def test_a3_gradients_of_a_workers_samples_average_to_its_own_and_these_to_psis(problem: Problem) -> None:
    theta = thetas(problem, 1)[0]
    deltas = problem.maximizers(problem.slopes(theta), problem.shifts)
    of_samples = problem.gradient(theta, problem.tilts, deltas)
    of_workers = of_samples[problem.shares(WORKERS)].mean(axis=1)
    assert np.allclose(of_workers.mean(axis=0), problem.full_gradient(theta), atol=1e-12)
    assert np.abs(of_workers[0] - of_workers[1]).max() > 0.01  # each has data of its own


@each_problem
def test_a3_no_sample_gradients_deviate_more_than_the_deviations_say(problem: Problem) -> None:
    found = np.zeros(problem.spec.d)
    for theta in thetas(problem, 150):
        deltas = problem.maximizers(problem.slopes(theta), problem.shifts)
        of_samples = problem.gradient(theta, problem.tilts, deltas)[problem.shares(WORKERS)]
        found = np.maximum(found, of_samples.std(axis=1).max(axis=0))
    said = constants_of(problem, WORKERS, whole_batches=False).deviations
    assert (found <= said).all()
    assert (found >= 0.5 * said).all()  # it is no empty promise
    assert (constants_of(problem, WORKERS, whole_batches=True).deviations == 0).all()


@each_problem
@pytest.mark.parametrize("whole", [False, True])
def test_a1_no_gradient_exceeds_the_bound_whatever_batch_and_perturbation(problem: Problem, whole: bool) -> None:
    constants = constants_of(problem, WORKERS, whole_batches=whole)
    tilts = problem.tilts[problem.shares(WORKERS)].mean(axis=1) if whole else problem.tilts
    points = thetas(problem, 200, spread=1.5)
    corners = np.sign(boxed(problem, 1)) * problem.spec.epsilon
    for tilt in tilts:
        gradients = np.abs(problem.gradient(points, tilt, corners))
        assert (gradients <= constants.gradients + 1e-12).all()
        assert (np.linalg.norm(gradients, axis=1) <= constants.gradient_bound).all()


@each_problem
def test_a1_gradients_are_lipschitz_layer_by_layer_and_psi_has_its_quadratic_upper_bound(problem: Problem) -> None:
    constants = constants_of(problem, WORKERS, whole_batches=False)
    layers, rng = problem.spec.layers, np.random.default_rng(3)
    greatest = 0.0
    for theta in thetas(problem, 60, spread=1.0):
        for size in (1e-4, 0.3, 3.0):
            other = theta + size * rng.standard_normal(problem.spec.d) * (rng.random(problem.spec.d) < 0.7)
            one, two = problem.full_gradient(theta), problem.full_gradient(other)
            moved = np.linalg.norm((other - theta).reshape(layers, -1), axis=1)
            changed = np.linalg.norm((two - one).reshape(layers, -1), axis=1)
            assert (changed <= constants.block_smoothness @ moved + 1e-12).all()
            upper = problem.value(theta) + one @ (other - theta) + 0.5 * constants.smoothness @ moved**2  # (A54)
            assert problem.value(other) <= upper + 1e-12
            greatest = max(greatest, float((changed / np.maximum(constants.block_smoothness @ moved, 1e-12)).max()))
    assert greatest > 0.2  # it is no empty promise
    assert np.allclose(constants.smoothness, constants.block_smoothness.sum(axis=1))


@each_problem
def test_psi_is_not_convex_and_never_below_its_lower_bound(problem: Problem) -> None:
    points = thetas(problem, 100)
    values = np.array([problem.value(theta) for theta in points])
    assert values.min() >= problem.lower_bound()
    middle = np.array([problem.value((a + b) / 2) for a, b in zip(points[::2], points[1::2], strict=True)])
    assert (middle > (values[::2] + values[1::2]) / 2 + 1e-3).any()


def test_without_an_offset_the_minimum_is_at_b_and_is_the_lower_bound() -> None:
    problem = Problem(SPECS[0])
    assert np.abs(problem.full_gradient(problem.centre)).max() < 1e-12
    assert problem.value(problem.centre) == pytest.approx(problem.lower_bound(), abs=1e-12)
    assert np.array_equal(problem.stationary_point(), problem.centre)


def test_with_an_offset_the_stationary_point_is_elsewhere_and_is_found() -> None:
    problem = Problem(SPECS[1])
    found = problem.stationary_point()
    assert np.abs(problem.full_gradient(found)).max() <= 1e-10
    assert np.abs(found - problem.centre).max() > 0.01
    with pytest.raises(SpecError, match="expected a stationary point within 3 steps"):
        problem.stationary_point(steps=3)


@each_problem
def test_a2_phi_is_strongly_concave_in_the_perturbation(problem: Problem) -> None:
    constants = constants_of(problem, WORKERS, whole_batches=False)
    theta = torch.from_numpy(thetas(problem, 1)[0])
    a, b = torch.from_numpy(boxed(problem, 40)), torch.from_numpy(boxed(problem, 80)[40:])
    for one, two in zip(a, b, strict=True):
        variable = two.clone().requires_grad_()
        value = phi(problem, theta, variable, 0)
        (slope,) = torch.autograd.grad(value, variable)
        difference = one - two
        upper = value + slope @ difference - 0.5 * constants.concavity * difference @ difference
        assert phi(problem, theta, one, 0).item() <= upper.item() + 1e-12
    assert constants.concavity == problem.concavities.min() > 0


@each_problem
def test_a2_the_gradient_is_lipschitz_in_the_perturbation_and_no_smaller_constant_would_do(problem: Problem) -> None:
    constants = constants_of(problem, WORKERS, whole_batches=False)
    a, b = boxed(problem, 40), boxed(problem, 80)[40:]
    for theta in thetas(problem, 20):
        tilt = np.zeros(problem.spec.d)
        changed = np.linalg.norm(problem.gradient(theta, tilt, a) - problem.gradient(theta, tilt, b), axis=1)
        assert (changed <= constants.cross_smoothness * np.linalg.norm(a - b, axis=1) + 1e-12).all()
    direction = np.linalg.svd(problem.mixing)[0][:, 0]  # at sin(theta) = 0 the whole norm of A shows
    changed = problem.gradient(np.zeros(problem.spec.d), tilt, direction) - problem.gradient(
        theta * 0, tilt, 0 * direction
    )
    assert np.linalg.norm(changed) == pytest.approx(constants.cross_smoothness)


@each_problem
def test_ascent_is_projected_gradient_ascent_and_comes_as_close_as_the_bound_says(problem: Problem) -> None:
    theta = thetas(problem, 1)[0]
    slopes = problem.slopes(theta)
    exact = problem.maximizers(slopes, problem.shifts)
    for steps in (0, 1, 3, 8):
        found = problem.ascend(slopes, problem.shifts, steps)
        for sample in (0, 7):
            delta = torch.zeros(problem.spec.inner, dtype=torch.float64)
            for _ in range(steps):
                delta.requires_grad_()
                (slope,) = torch.autograd.grad(phi(problem, torch.from_numpy(theta), delta, sample), delta)
                delta = (delta.detach() + slope / problem.concavities.max()).clamp(
                    -problem.spec.epsilon, problem.spec.epsilon
                )
            assert np.allclose(found[sample], delta.numpy(), atol=1e-12)
        error = (((found - exact) @ problem.mixing) * np.cos(theta)) ** 2
        assert (error <= inner_errors(problem, steps) + 1e-15).all()
    assert (inner_errors(problem, None) == 0).all()


@each_problem
def test_lemma_1_a_gap_of_mu_epsilon_over_l_phi_squared_leaves_an_error_of_epsilon_at_most(problem: Problem) -> None:
    constants = constants_of(problem, WORKERS, whole_batches=False)
    for theta in thetas(problem, 20):
        slopes = problem.slopes(theta)
        deltas = boxed(problem, problem.spec.samples)
        gaps = problem.gaps(slopes, problem.shifts, deltas)
        errors = ((deltas - problem.maximizers(slopes, problem.shifts)) @ problem.mixing) * np.cos(theta)
        assert ((errors**2).sum(axis=1) <= constants.cross_smoothness**2 / constants.concavity * gaps + 1e-12).all()
        assert np.allclose(
            problem.gaps(slopes, problem.shifts, problem.maximizers(slopes, problem.shifts)), 0, atol=1e-12
        )


def test_definition_1_as_printed_is_met_by_every_perturbation() -> None:
    """(A20) takes the gradient at the maximizer, where no point of the ball gains: hence our reading of it as (A33)."""
    problem = Problem(SPECS[0])
    slopes = problem.slopes(thetas(problem, 1)[0])
    exact = problem.maximizers(slopes, problem.shifts)
    at_exact = slopes + problem.shifts - problem.concavities * exact
    gains = ((boxed(problem, problem.spec.samples) - exact) * at_exact).sum(axis=1)
    assert gains.max() <= 1e-12


def test_workers_that_cannot_have_equal_shares_are_refused() -> None:
    with pytest.raises(SpecError, match="expected a divisor of samples=32, got workers=5"):
        Problem(SPECS[0]).shares(5)
