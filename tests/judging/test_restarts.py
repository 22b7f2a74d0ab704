"""PGD and FGSM on a batch: against foolbox and a closed form, with restarts, and what is left as it was."""

from __future__ import annotations

import copy

import foolbox
import pytest
import torch
from torch import Tensor, nn

from tests.judging.support import exactly_robust, request
from tests.method.support import batch, batch_norm_model, state_of
from worker.data import Dataset
from worker.evaluation import evaluate
from worker.judging.restarts import attack_batch, clean_batch, left_alone
from worker.judging.verdicts import Verdict

CPU = torch.device("cpu")


def judge(text: str, model: nn.Module, images: Tensor, labels: Tensor, *, seed: int = 0) -> Verdict:
    with left_alone(model):
        return attack_batch(
            request(text), model, images, labels, indices_N=torch.arange(len(labels)), seed=seed, device=CPU
        )


def test_ra_agrees_with_foolbox_within_a_point(two_layers: nn.Module, digits: Dataset) -> None:
    """Neither knows the other's random starts."""
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    verdict = judge("pgd:20,epsilon=0.05", two_layers, images, labels)
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=0.05 / 8, steps=20, random_start=True)
    torch.manual_seed(0)
    _, _, success = theirs(foolbox.PyTorchModel(two_layers, bounds=(0, 1), device="cpu"), images, labels, epsilons=0.05)
    ours = sum(verdict.right(labels.tolist())) / 360
    clean = sum(clean_batch(two_layers, images, labels, CPU).right(labels.tolist())) / 360
    assert abs(ours - (~success).float().mean().item()) <= 0.01
    assert 0.2 < ours < clean - 0.2, "the comparison must not be one of extremes"


def test_ra_agrees_with_foolbox_in_l2(two_layers: nn.Module, digits: Dataset) -> None:
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    verdict = judge("pgd:20,norm=l2,epsilon=0.3", two_layers, images, labels)
    theirs = foolbox.attacks.L2PGD(abs_stepsize=0.3 / 8, steps=20, random_start=True)
    torch.manual_seed(0)
    _, _, success = theirs(foolbox.PyTorchModel(two_layers, bounds=(0, 1), device="cpu"), images, labels, epsilons=0.3)
    ours = sum(verdict.right(labels.tolist())) / 360
    assert abs(ours - (~success).float().mean().item()) <= 0.01
    assert 0.2 < ours < 0.8
    assert max(far for far in verdict.distance if far is not None) == pytest.approx(0.3, abs=1e-5)


def test_a_linear_model_resists_where_the_closed_form_says_and_hardly_elsewhere(
    linear: nn.Sequential, digits: Dataset
) -> None:
    """Ten times the logits: where all classes are nearly as probable the gradient points to none of them."""
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    sharper = copy.deepcopy(linear)
    with torch.no_grad():
        for parameter in sharper.parameters():
            parameter.mul_(10)
    exact = exactly_robust(sharper, images, labels, 0.1)
    found = judge("pgd:20,epsilon=0.1", sharper, images, labels).right(labels.tolist())
    assert all(resists for resists, true in zip(found, exact, strict=True) if true)
    assert sum(exact) <= sum(found) <= sum(exact) + 5
    assert 100 < sum(exact) < 300


def test_without_restarts_it_is_the_evaluation_of_the_training(two_layers: nn.Module, digits: Dataset) -> None:
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    spec = request("pgd:5,epsilon=0.1").spec
    assert sum(judge("pgd:5,epsilon=0.1", two_layers, images, labels, seed=4).right(labels.tolist())) == (
        evaluate(two_layers, digits.test, spec, batch=360, seed=4).robust_correct
    )


def test_restarts_only_lower_ra_and_keep_what_fewer_have_found(two_layers: nn.Module, digits: Dataset) -> None:
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    one, two, six = (judge(f"pgd:2x{n},epsilon=0.1", two_layers, images, labels) for n in (1, 2, 6))
    robust = [verdict.right(labels.tolist()) for verdict in (one, two, six)]
    for fewer, more in ((0, 1), (1, 2)):
        assert all(not later or earlier for earlier, later in zip(robust[fewer], robust[more], strict=True))
    assert sum(robust[2]) < sum(robust[0])
    for sample, stage in enumerate(one.found_by):
        if stage is not None:
            assert (six.found_by[sample], six.predicted[sample]) == (stage, one.predicted[sample])
    assert {"restart 1", "restart 2", None} <= set(six.found_by)


def test_a_sample_resists_only_if_it_is_right_after_every_restart() -> None:
    """A model that is wrong only where a start is above the image: half of the starts, each time others."""

    class WrongAbove(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            above = images.flatten(1)[:, :1] - 0.5
            return torch.cat([-above, above], dim=1) * 1e-3

    images, labels = torch.full((400, 1, 1, 1), 0.5), torch.zeros(400, dtype=torch.int64)
    counts = [
        sum(judge(f"pgd:1x{n},epsilon=0.1,step_size=1e-9", WrongAbove(), images, labels).right(labels.tolist()))
        for n in (1, 3, 8)
    ]
    for count, expected in zip(counts, (200, 50, 1.6), strict=True):
        assert abs(count - expected) <= 4 * expected**0.5


def test_distance_is_that_of_the_wrong_image(linear: nn.Sequential, digits: Dataset) -> None:
    images, labels = digits.test.images(torch.arange(60)), digits.test.labels[:60]
    verdict = judge("fgsm,epsilon=0.1", linear, images, labels)
    for far, stage, right in zip(verdict.distance, verdict.found_by, verdict.right(labels.tolist()), strict=True):
        assert (far is None) == (stage is None) == right
        assert far is None or far == pytest.approx(0.1, abs=1e-6)


def test_nothing_of_the_model_is_changed() -> None:
    model, (images, labels) = batch_norm_model(), batch()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], 7.0)
    before = dict(state_of(model))
    judge("pgd:3x2,epsilon=0.3", model, images, labels)
    with left_alone(model):
        clean = clean_batch(model, images, labels, CPU)
    assert dict(state_of(model)) == before
    with torch.no_grad():
        expected = model.eval()(images).argmax(1).tolist()
    assert expected == list(clean.predicted)


def test_modes_and_flags_are_put_back_after_an_exception() -> None:
    model = batch_norm_model()
    before = dict(state_of(model))

    def fails() -> None:
        with left_alone(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not any(module.training for module in model.modules())
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert dict(state_of(model)) == before
