"""The bound of Theorem 2, the codecs' variance within A4, Algorithm A1 against a plain loop, and fits of known laws."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.theory.algorithm import START_DISTANCE, Averaging, Run, Start, start_of, train
from bench.theory.bound import Constants, Quantization, is_covered, quantization_of, theorem_2
from bench.theory.fit import fit_exponent
from bench.theory.points import Point, measure
from bench.theory.problem import Float64, Problem, ProblemSpec
from bench.theory.sweeps import LambVariant, levels_of, sweeps
from common.codecs import Float32
from common.config import CodecSpec, OptimizerSpec
from common.errors import SpecError
from worker.randomness import Purpose, stream_generator

NONE = CodecSpec(name="none")
OPTIMIZER = OptimizerSpec(
    learning_rate=0.05, beta1=0.0, beta2=0.6, weight_decay=0.0, trust_low=0.8, trust_high=1.7, stability_eps=1e-9
)
SMALL = ProblemSpec(samples=32)
RUN = Run(
    rounds=12,
    workers=4,
    batch=3,
    codec=NONE,
    attack_steps=2,
    optimizer=OPTIMIZER,
    start=Start.FAR,
    seed=5,
)


def constants(gradients: Float64, deviations: float = 0.0) -> Constants:
    """Of a problem that is not needed otherwise."""
    return Constants(
        smoothness=np.array([2.0, 3.0]),
        block_smoothness=np.diag([2.0, 3.0]),
        gradients=gradients,
        deviations=np.full_like(gradients, deviations),
        concavity=1.0,
        cross_smoothness=1.0,
    )


# Algorithm A1


def plain_mean_squared_gradient(problem: Problem, run: Run) -> float:
    """Algorithms A1 and A2 in float64, sample by sample, without codec: nothing of ours but phi's gradient."""
    own = problem.spec.samples // run.workers
    draws = [
        torch.randint(
            own, (run.rounds, run.batch or 0), generator=stream_generator(run.seed, Purpose.PERMUTATION, worker)
        )
        for worker in range(run.workers)
    ]
    theta, v, total = start_of(problem, run.start, run.seed), np.zeros(problem.spec.d), 0.0
    o = run.optimizer
    for t in range(1, run.rounds + 1):
        total += float((problem.full_gradient(theta) ** 2).sum())
        g = np.zeros(problem.spec.d)
        for worker in range(run.workers):
            for place in draws[worker][t - 1].tolist():
                sample = worker * own + place
                delta = np.zeros(problem.spec.inner)
                for _ in range(run.attack_steps or 0):
                    w = problem.mixing @ np.sin(theta) + problem.shifts[sample]
                    delta = delta + (w - problem.concavities * delta) / problem.concavities.max()
                    delta = delta.clip(-problem.spec.epsilon, problem.spec.epsilon)
                g += problem.gradient(theta, problem.tilts[sample], delta) / (run.workers * (run.batch or 0))
        v = o.beta2 * v + (1 - o.beta2) * g**2
        u = g / np.sqrt(v / (1 - o.beta2**t) + o.stability_eps)
        for layer in range(problem.spec.layers):
            part = slice(layer * problem.spec.width, (layer + 1) * problem.spec.width)
            tau = min(max(float(np.linalg.norm(theta[part])), o.trust_low), o.trust_high)
            theta[part] = theta[part] - o.learning_rate * tau / np.linalg.norm(u[part]) * u[part]  # (A30)
    return total / run.rounds


def test_a_training_is_that_of_a_plain_loop() -> None:
    problem = Problem(SMALL)
    found = train(problem, RUN)
    assert found.mean_squared_gradient == pytest.approx(plain_mean_squared_gradient(problem, RUN), rel=1e-4)
    assert found.descent_left == pytest.approx(
        problem.value(start_of(problem, Start.FAR, 5)) - problem.lower_bound(), rel=1e-6
    )
    assert 0 < found.inner_error <= found.certified_inner_error


def test_a_training_depends_on_its_seed_alone() -> None:
    problem = Problem(SMALL)
    run = replace(RUN, codec=CodecSpec(name="paper", bits=3))
    first = train(problem, run).mean_squared_gradient
    assert train(problem, run).mean_squared_gradient == first
    assert train(problem, replace(run, seed=6)).mean_squared_gradient != first


def test_starts_are_at_a_stationary_point_or_far_away() -> None:
    problem = Problem(SMALL)
    assert np.abs(problem.full_gradient(start_of(problem, Start.STATIONARY, 0))).max() < 1e-9
    far = [start_of(problem, Start.FAR, seed) for seed in range(2)]
    assert np.allclose(np.abs(far[0] - problem.centre), START_DISTANCE)
    assert (far[0] != far[1]).any()


def test_whole_batches_with_the_exact_maximum_leave_the_gradient_of_psi() -> None:
    """One round's direction is then the sign of the exact gradient, layer by layer of length eta * tau."""
    problem = Problem(SMALL)
    start = start_of(problem, Start.FAR, 0)
    run = replace(RUN, rounds=2, batch=None, attack_steps=None, seed=0)
    steps = np.sign(problem.full_gradient(start)).reshape(problem.spec.layers, -1) / problem.spec.width**0.5
    norms = np.linalg.norm(start.reshape(problem.spec.layers, -1), axis=1).clip(0.8, 1.7)
    second = start - 0.05 * (norms[:, None] * steps).ravel()
    expected = [float((problem.full_gradient(theta) ** 2).sum()) for theta in (start, second)]
    assert train(problem, run).mean_squared_gradient == pytest.approx(np.mean(expected), rel=1e-5)


# A4


CODECS = [
    CodecSpec(name="paper", bits=2),
    CodecSpec(name="paper", bits=5),
    CodecSpec(name="randomized", bits=3, block=8),
    CodecSpec(name="paper", bits=3, two_sided=True),
    CodecSpec(name="randomized", bits=4, block=8, two_sided=True),
]
LIMITS = np.linspace(0.2, 2.0, 24)
"""Bounds of |g_j|."""
DRAWS = 800


def averages(codec: CodecSpec, gradients: Float32) -> Float64:
    """What workers decode, over many rounds: shape (DRAWS, d)."""
    averaging = Averaging([12, 12], replace(RUN, codec=codec, workers=len(gradients)))
    return np.stack([averaging.average(gradients, round_).astype(np.float64) for round_ in range(DRAWS)])


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: f"{codec.name}-{codec.bits}-{codec.two_sided}")
def test_a4_averages_are_unbiased_with_no_more_than_the_bounds_variance_and_magnitude(codec: CodecSpec) -> None:
    rng = np.random.default_rng(0)
    bounds = quantization_of(codec, constants(LIMITS))
    # at the limits, inside them, and one worker alone, where nothing averages out
    for gradients in (np.sign(rng.standard_normal((1, 24))) * LIMITS, rng.uniform(-LIMITS, LIMITS, (2, 24))):
        exact = gradients.astype(np.float32).astype(np.float64).mean(axis=0)
        found = averages(codec, gradients.astype(np.float32))
        squared = ((found - exact) ** 2).mean(axis=0)
        assert (squared <= bounds.variances * (1 + 8 / DRAWS**0.5) + 1e-12).all()
        assert (np.abs(found.mean(axis=0) - exact) <= 5 * np.sqrt(squared / DRAWS) + 1e-6).all()
        assert np.abs(found).max() <= bounds.gradient_bound * (1 + 1e-6)
        if len(gradients) == 1:
            assert squared.sum() >= 0.1 * bounds.variances.sum()  # it is no empty promise


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_remark_2_the_variances_together_are_within_lemma_3_1_of_qsgd(bits: int) -> None:
    d, s, g = len(LIMITS), 2**bits, float(np.linalg.norm(LIMITS))
    variances = quantization_of(CodecSpec(name="paper", bits=bits), constants(LIMITS)).variances
    assert variances.sum() <= min(d / s**2, d**0.5 / s) * g**2


def test_levels_are_those_of_the_codecs() -> None:
    assert levels_of(CodecSpec(name="paper", bits=5)) == 32
    assert levels_of(CodecSpec(name="randomized", bits=5)) == 15


def test_no_codec_is_the_mean_and_costs_nothing() -> None:
    gradients = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    found = Averaging([12, 12], replace(RUN, workers=3)).average(gradients, 0)
    assert np.allclose(found, gradients.mean(axis=0), atol=1e-6)
    assert (quantization_of(NONE, constants(LIMITS)).variances == 0).all()


@pytest.mark.parametrize("codec", [CodecSpec(name="sign"), CodecSpec(name="randomized", block="all")])
def test_a_codec_without_a_bound_is_refused(codec: CodecSpec) -> None:
    with pytest.raises(SpecError, match="expected codec none, paper, or randomized with blocks and scale linf"):
        quantization_of(codec, constants(LIMITS))


# Theorem 2


def test_the_bound_is_equation_a25_with_the_4_of_a77() -> None:
    g, sigma, variances, errors = np.array([0.3, 0.4, 1.2, 0.0]), 0.5, 0.02, 0.03
    found = theorem_2(
        constants(g, sigma),
        Quantization(variances=np.full(4, variances), gradient_bound=1.3),
        np.full(4, errors),
        OPTIMIZER,
        rounds=50,
        workers=4,
        batch=3,
        descent_left=7.0,
    )
    c = 0.25 * (2 * (1 - 0.6) / ((1.3**2 + 1e-9) * 4)) ** 0.5
    kappa = 1.7 / 0.8
    sampling = 4 * sigma**2 / 12
    chi = 4 * (sigma**2 / 12 + errors + variances) ** 0.5
    assert found.descent == pytest.approx(7.0 / (0.05 * 0.8 * c * 50))
    assert found.sampling_and_inner == pytest.approx(4 * (4 * errors + sampling))
    assert found.quantization == pytest.approx(4 * 4 * variances)
    assert found.bias == pytest.approx(kappa * 3**0.5 / c * chi)
    assert found.step == pytest.approx(0.05 * 1.7 * kappa * (2.0 + 3.0) / (2 * c))
    parts = (found.descent, found.sampling_and_inner, found.quantization, found.bias, found.step)
    assert found.total == pytest.approx(sum(parts))


@pytest.mark.parametrize("changes", [{"beta1": 0.9}, {"weight_decay": 1e-4}, {"trust_low": 0.0}])
def test_an_optimizer_that_the_theorem_does_not_speak_of_has_no_bound(changes: dict[str, float]) -> None:
    optimizer = OptimizerSpec(**{**OPTIMIZER.model_dump(), **changes})
    assert not is_covered(optimizer)
    with pytest.raises(SpecError, match="expected beta1=0, weight_decay=0 and trust_low > 0"):
        theorem_2(
            constants(LIMITS),
            quantization_of(NONE, constants(LIMITS)),
            np.zeros(24),
            optimizer,
            rounds=1,
            workers=1,
            batch=1,
            descent_left=1.0,
        )


SHORT = [
    Point(x=1, label="plain", problem=SMALL, run=replace(RUN, rounds=40)),
    Point(x=1, label="from afar", problem=SMALL, run=replace(RUN, rounds=40, batch=None, attack_steps=None)),
    Point(x=1, label="skewed", problem=replace(SMALL, skew=8.0), run=replace(RUN, rounds=40, workers=1, batch=1)),
    Point(x=1, label="2 bits", problem=SMALL, run=replace(RUN, rounds=40, codec=CODECS[0])),
    Point(x=1, label="both ways", problem=SMALL, run=replace(RUN, rounds=40, codec=CODECS[3])),
    Point(x=None, label="1 step", problem=replace(SMALL, offset=0.5), run=replace(RUN, rounds=40, attack_steps=1)),
]


@pytest.mark.parametrize("point", SHORT, ids=lambda point: point.label)
def test_no_training_exceeds_the_bound(point: Point) -> None:
    for seed in range(2):
        found = measure(point, seed)
        assert found.bound is not None
        assert 0 < found.measured <= found.bound
        assert found.measured <= found.trivial


def test_the_terms_that_a_sweep_is_not_about_are_small_in_the_bound_or_absent() -> None:
    """Of the default sweeps, without training: what is left of the descent is 0 where they start at the minimum."""
    by_name = {sweep.name: sweep for sweep in sweeps(LambVariant.THEOREM)}

    def terms(name: str) -> list[dict[str, float]]:
        short = (replace(point, run=replace(point.run, rounds=1)) for point in by_name[name].points)
        return [measure(point, 0).terms or {} for point in short]

    for each in terms("rounds"):
        assert each["bias"] == each["quantization"] == each["sampling_and_inner"] == 0
    for name in ("workers", "batch", "bits, many levels", "bits, blocks, 2-sided"):
        for each in terms(name):
            assert each["descent"] < 1e-4 * each["bias"]
            assert each["bias"] > 3 * (each["step"] + each["sampling_and_inner"] + each["quantization"])


# Fits


def test_a_fit_recovers_a_known_exponent_within_its_interval() -> None:
    x = 2.0 ** np.arange(3, 10)
    noise = np.random.default_rng(3).lognormal(0.0, 0.05, (len(x), 8))
    found = fit_exponent(list(x), 0.7 * x[:, None] ** -0.5 * noise, torch.Generator().manual_seed(0))
    assert found.exponent == pytest.approx(-0.5, abs=0.03)
    assert found.factor == pytest.approx(0.7, rel=0.15)
    assert found.low <= -0.5 <= found.high
    assert 0.005 < found.high - found.low < 0.1


def test_a_fit_without_noise_is_exact_and_its_line_is_numpys() -> None:
    x = np.array([1.0, 3.0, 10.0, 11.0])
    exact = fit_exponent(list(x), np.tile(2 * x**1.5, (3, 1)).T, torch.Generator().manual_seed(0))
    assert (exact.exponent, exact.low, exact.high) == pytest.approx((1.5, 1.5, 1.5))
    y = np.array([[1.0], [2.0], [9.0], [4.0]])
    found = fit_exponent(list(x), y, torch.Generator().manual_seed(0))
    slope, intercept = np.polyfit(np.log(x), np.log(y[:, 0]), 1)
    assert (found.exponent, np.log(found.factor)) == pytest.approx((slope, intercept))


def test_what_is_no_power_law_shows_from_point_to_point() -> None:
    x = 2.0 ** np.arange(6)
    found = fit_exponent(list(x), (1 / x + 0.2)[:, None], torch.Generator().manual_seed(0))
    assert found.steps[0] == pytest.approx(np.log2(0.7 / 1.2))
    assert found.steps[0] < -0.7
    assert found.steps[-1] > -0.3
