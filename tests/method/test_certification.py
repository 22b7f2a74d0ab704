"""CERTIFY against binomial tails, a half-space whose radius is known, and a naive loop."""

from __future__ import annotations

import math
import re
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from common.errors import SpecError
from tests.method.support import CLASSES, SIDE, batch, batch_norm_model, generator, state_of
from worker.certification import (
    NOISE_BLOCK,
    Certificate,
    CertificationSettings,
    certificate,
    certify,
    class_counts,
    lower_confidence_bound,
)
from worker.models import Normalize
from worker.randomness import Purpose, stream_generator

IMAGE = batch(1)[0][0]


def settings(**changes: float) -> CertificationSettings:
    values = {"noise_std": 0.5, "n0": 20, "n": 250, "alpha": 0.01, "seed": 3}
    return CertificationSettings(**{**values, **changes})  # type: ignore[arg-type]


def tail(successes: int, trials: int, p: float) -> float:
    """P[Binomial(trials, p) >= successes], term by term."""
    logs = (
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(p)
        + (trials - k) * math.log1p(-p)
        for k in range(successes, trials + 1)
    )
    return math.fsum(map(math.exp, logs))


def bound_by_bisection(successes: int, trials: int, alpha: float) -> float:
    """The p at which the tail is alpha; it grows with p."""
    low, high = 0.0, 1.0
    for _ in range(45):
        middle = (low + high) / 2
        if tail(successes, trials, middle) < alpha:
            low = middle
        else:
            high = middle
    return low


class HalfSpace(nn.Module):
    """Class 1 where w x + b > 0, else class 0."""

    def __init__(self, weights: list[float], bias: float) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.bias = bias

    def forward(self, images: Tensor) -> Tensor:
        side = images.flatten(1) @ self.weights + self.bias
        return torch.stack([torch.zeros_like(side), side], dim=1)


class Probe(nn.Module):
    """Passes images on and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images.clone())
        return images


class Answers(nn.Module):
    """Fixed logits, whatever the images are."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits.expand(len(images), *self.logits.shape) if self.logits.dim() < 3 else self.logits


def recorded(batch_: int, **changes: float) -> Tensor:
    """All noisy copies that one certification shows the model."""
    probe = Probe()
    certify(nn.Sequential(probe, batch_norm_model()), IMAGE, settings(**changes), index=0, batch=batch_)
    return torch.cat(probe.seen)


# The bound


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
@pytest.mark.parametrize(
    ("successes", "trials"), [(1, 1), (1, 10), (9, 10), (10, 10), (53, 100), (100, 100), (870, 1000), (99_900, 100_000)]
)
def test_lower_bound_is_where_the_binomial_tail_has_probability_alpha(
    successes: int, trials: int, alpha: float
) -> None:
    expected = bound_by_bisection(successes, trials, alpha)
    assert lower_confidence_bound(successes, trials, alpha) == pytest.approx(expected, rel=1e-9)


def test_lower_bound_has_its_closed_forms_at_both_ends() -> None:
    assert lower_confidence_bound(0, 50, 0.01) == 0.0
    assert lower_confidence_bound(50, 50, 0.01) == pytest.approx(0.01 ** (1 / 50), rel=1e-13)


@pytest.mark.parametrize("p", [0.5, 0.77, 0.9, 0.99])
@pytest.mark.parametrize("alpha", [0.001, 0.1])
def test_lower_bound_exceeds_the_truth_with_probability_alpha_at_most(p: float, alpha: float) -> None:
    trials = 400
    too_great = min(k for k in range(trials + 1) if k == trials or lower_confidence_bound(k, trials, alpha) > p)
    wrong = tail(too_great, trials, p) if lower_confidence_bound(too_great, trials, alpha) > p else 0.0
    assert wrong <= alpha
    assert tail(too_great - 1, trials, p) > alpha, "one success fewer could not be told from chance"


# From counts to a certificate


def test_class_comes_from_selection_and_radius_from_estimation() -> None:
    found = certificate([3, 60, 37], [900, 90, 10], noise_std=0.25, alpha=0.001)
    assert found == Certificate(predicted=None, radius=0.0, votes=90), "class 1 was selected, whatever came later"

    found = certificate([60, 3, 37], [900, 90, 10], noise_std=0.25, alpha=0.001)
    expected = 0.25 * NormalDist().inv_cdf(bound_by_bisection(900, 1000, 0.001))
    assert (found.predicted, found.votes) == (0, 900)
    assert found.radius == pytest.approx(expected, rel=1e-9)


def test_abstains_exactly_where_the_bound_is_not_above_one_half() -> None:
    first = next(k for k in range(500, 1001) if tail(k, 1000, 0.5) < 0.001)

    below, above = (certificate([1, 0], [k, 1000 - k], noise_std=1.0, alpha=0.001) for k in (first - 1, first))

    assert 540 < first < 560
    assert below == Certificate(predicted=None, radius=0.0, votes=first - 1)
    assert (above.predicted, above.votes) == (0, first)
    assert 0 < above.radius < 0.01


def test_maximal_radius_is_that_of_unanimous_draws() -> None:
    found = certificate([0, 100], [0, 100_000], noise_std=0.12, alpha=0.001)
    assert found.radius == settings(noise_std=0.12, n=100_000, alpha=0.001).maximal_radius
    # why the paper's Table 2 has 0 at r = 0.5 for noise_std 0.12
    assert found.radius == pytest.approx(0.12 * NormalDist().inv_cdf(0.001 ** (1 / 100_000)), rel=1e-6)
    assert 0.4 < found.radius < 0.5


# A half-space, of which everything is known


@pytest.mark.parametrize("distance", [0.1, 0.4, 0.9])
def test_radius_of_a_half_space_approaches_the_distance_from_below(distance: float) -> None:
    model, image = HalfSpace([3.0, 4.0], bias=5 * distance - 3.5), torch.full((2, 1, 1), 0.5)
    few, many = (
        certify(model, image, settings(n0=200, n=n, alpha=0.001), index=0, batch=5000) for n in (1_000, 100_000)
    )
    p = NormalDist().cdf(distance / 0.5)
    assert (few.predicted, many.predicted) == (1, 1)
    assert many.votes / 100_000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 100_000))
    assert few.radius < many.radius < distance
    assert many.radius > distance - 0.015


def test_a_certificate_is_wrong_as_often_as_its_alpha_allows() -> None:
    """Over 500 samples, of which each has the same distance: how often the radius exceeds it."""
    trials, alpha, repetitions, p = 120, 0.1, 500, 0.9
    distance = 0.5 * NormalDist().inv_cdf(p)
    model, image = HalfSpace([0.6, 0.8], bias=distance - 0.7), torch.full((2, 1, 1), 0.5)
    chosen = settings(n0=40, n=trials, alpha=alpha)

    found = [certify(model, image, chosen, index=index, batch=200) for index in range(repetitions)]

    wrong = sum(each.radius > distance for each in found) / repetitions
    exact = next(each for each in (tail(k, trials, p) for k in range(1, trials + 1)) if each < alpha)
    assert 0.05 < exact <= alpha
    assert wrong == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / repetitions))
    assert wrong <= alpha + 4 * math.sqrt(alpha * (1 - alpha) / repetitions)
    assert sum(each.votes for each in found) / (repetitions * trials) == pytest.approx(
        p, abs=4 * math.sqrt(p * (1 - p) / (repetitions * trials))
    )


# Sampling


def test_certify_is_what_a_loop_over_single_draws_computes() -> None:
    model = batch_norm_model().eval()
    certificates = []
    for index, image in enumerate(batch(5, seed=5)[0]):
        selection, estimation = [0] * CLASSES, [0] * CLASSES
        for purpose, draws, counts in (
            (Purpose.SELECTION_NOISE, 20, selection),
            (Purpose.ESTIMATION_NOISE, 250, estimation),
        ):
            stream = stream_generator(3, purpose, index)
            blocks = [torch.randn(NOISE_BLOCK, 1, SIDE, SIDE, generator=stream) for _ in range(3)]
            for noise in torch.cat(blocks)[:draws]:
                with torch.no_grad():
                    counts[int(model((image + 0.5 * noise)[None])[0].argmax())] += 1
        top = selection.index(max(selection))
        bound = bound_by_bisection(estimation[top], 250, 0.01)
        expected = (top, 0.5 * NormalDist().inv_cdf(bound)) if bound > 0.5 else (None, 0.0)

        found = certify(model, image, settings(), index=index, batch=64)

        assert (found.predicted, found.votes) == (expected[0], estimation[top])
        assert found.radius == pytest.approx(expected[1], rel=1e-9)
        certificates.append(found)
    assert len({each.predicted for each in certificates}) > 2, "classes and an abstention"
    assert None in {each.predicted for each in certificates}


@pytest.mark.parametrize("size", [1, 7, 64, NOISE_BLOCK, 1000])
def test_noise_does_not_depend_on_the_batch(size: int) -> None:
    assert torch.equal(recorded(size), recorded(130))


@pytest.mark.parametrize("size", [1, 13, 1000])
def test_counts_do_not_depend_on_the_batch(size: int) -> None:
    model = batch_norm_model().eval()
    counts = [
        class_counts(model, IMAGE, noise_std=0.5, draws=500, batch=each, generator=generator()) for each in (size, 100)
    ]
    assert torch.equal(counts[0], counts[1])
    assert int(counts[0].sum()) == 500
    assert int(counts[0].max()) < 500


def test_more_draws_begin_with_those_of_fewer() -> None:
    few, many = recorded(50, n=250), recorded(50, n=400)
    assert torch.equal(few[:270], many[:270])
    assert len(many) == 420


def test_every_draw_sample_seed_and_phase_has_noise_of_its_own() -> None:
    def shown(index: int, seed: int) -> Tensor:
        probe = Probe()
        certify(nn.Sequential(probe, batch_norm_model()), IMAGE, settings(n0=250, seed=seed), index=index, batch=1000)
        return torch.cat(probe.seen).flatten(1)

    everything = torch.cat([shown(0, 3), shown(1, 3), shown(0, 4)])
    assert len(torch.unique(everything, dim=0)) == len(everything) == 1500
    centred = everything - IMAGE.flatten()
    correlation = torch.corrcoef(torch.stack([centred[:250].flatten(), centred[250:500].flatten()]))[0, 1]
    assert abs(float(correlation)) < 4 / math.sqrt(250 * SIDE**2), "selection and estimation are independent"


def test_noise_comes_before_normalization_and_is_not_clamped() -> None:
    probe, after = Probe(), Probe()
    model = nn.Sequential(probe, Normalize((0.4,), (0.2,)), after, batch_norm_model())

    certify(model, IMAGE, settings(noise_std=0.25, n0=1, n=4000), index=0, batch=500)

    noisy = torch.cat(probe.seen)
    noise = (noisy - IMAGE) / 0.25
    numbers = noise.numel()
    assert float(noisy.min()) < -0.5
    assert float(noisy.max()) > 1.5
    assert float(noise.mean()) == pytest.approx(0, abs=4 / math.sqrt(numbers))
    assert float(noise.var()) == pytest.approx(1, abs=4 * math.sqrt(2 / numbers))
    at_edge = IMAGE == 0
    assert int(at_edge.sum()) > 0
    assert float((noise[:, at_edge] < 0).double().mean()) == pytest.approx(0.5, abs=0.02), "no pixel stops at 0"
    assert torch.equal(torch.cat(after.seen), (noisy - 0.4) / 0.2)


def test_model_runs_in_eval_mode_without_gradients_and_is_left_as_it_was() -> None:
    model, modes = batch_norm_model(), []
    model.register_forward_hook(lambda module, _, logits: modes.append((module.training, logits.requires_grad)))
    before = dict(state_of(model))

    certify(model, IMAGE, settings(), index=0, batch=100)

    assert modes == [(False, False)] * 4
    assert dict(state_of(model)) == before


def test_modes_are_restored_after_an_exception() -> None:
    model = nn.Sequential(batch_norm_model(), nn.Linear(CLASSES + 1, 2))
    before = dict(state_of(model))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        certify(model, IMAGE, settings(), index=0, batch=100)
    assert dict(state_of(model)) == before


def test_progress_is_told_of_every_draw() -> None:
    drawn: list[int] = []
    certify(batch_norm_model(), IMAGE, settings(), index=0, batch=100, drawn=drawn.append)
    assert drawn == [20, 100, 100, 50]


# What is refused


def test_a_draw_with_nan_votes_for_no_class() -> None:
    with pytest.raises(SpecError, match="expected logits without NaN, got draws with NaN=20"):
        certify(Answers(torch.tensor([0.0, math.nan, 1.0])), IMAGE, settings(), index=0, batch=100)


def test_what_are_no_logits_is_refused() -> None:
    with pytest.raises(SpecError, match=re.escape("expected logits of shape [20, K], got shape=[20, 2, 3]")):
        certify(Answers(torch.zeros(2, 3)), IMAGE, settings(), index=0, batch=100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_std": 0.0}, "expected a standard deviation above 0, got noise_std=0.0"),
        ({"noise_std": math.nan}, "got noise_std=nan"),
        ({"noise_std": math.inf}, "got noise_std=inf"),
        ({"alpha": 0.0}, "expected a probability between 0 and 1, got alpha=0.0"),
        ({"alpha": 1.0}, "got alpha=1.0"),
        ({"n0": 0}, "expected at least 1 draw to select the class, got n0=0"),
        ({"n": 0}, "expected at least 7 draws, got n=0"),
        ({"n": 6, "alpha": 0.01}, "expected at least 7 draws, got n=6 (alpha=0.01; with fewer every sample abstains)"),
        ({"n": 2, "alpha": 0.25}, "expected at least 3 draws, got n=2"),
    ],
)
def test_settings_that_certify_nothing_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        settings(**changes)


def test_the_fewest_draws_that_are_allowed_certify() -> None:
    assert 0 < settings(n=7).maximal_radius < 0.03
