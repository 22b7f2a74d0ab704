"""Inner maximization, equation (A1): the ball, the ascent, and that nothing but the images is touched."""

from __future__ import annotations

import foolbox
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import AttackName, AttackSpec, BatchNormMode
from tests.method.support import CLASSES, batch, batch_norm_model, fgsm, generator, pgd, state_of
from worker.attacks import GradientSignAttack, make_attack
from worker.data import Dataset

ROUNDING = 1e-7
"""x + epsilon and its difference to x are each rounded, at values up to 1."""


class ExplodingModel(nn.Module):
    """A model whose second forward pass fails."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = batch_norm_model()
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += 1
        if self.passes == 2:
            raise RuntimeError("second pass")
        return self.inner(images)


class SeesParameters(nn.Module):
    """A linear model that records whether its parameters asked for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, CLASSES)
        self.asked: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.asked.append(any(parameter.requires_grad for parameter in self.parameters()))
        return self.linear(images.flatten(1))


every_mode = pytest.mark.parametrize("mode", list(BatchNormMode))


def mean_loss(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()


# The ball


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([AttackName.FGSM, AttackName.PGD]),
    epsilon=st.floats(0, 1),
    steps=st.integers(1, 4),
    step_size=st.one_of(st.none(), st.floats(1e-4, 2)),
    random_start=st.booleans(),
    mode=st.sampled_from([None, *BatchNormMode]),
    seed=st.integers(0, 1000),
)
def test_perturbed_images_stay_in_the_ball_and_in_the_unit_interval(
    name: AttackName,
    epsilon: float,
    steps: int,
    step_size: float | None,
    random_start: bool,
    mode: BatchNormMode | None,
    seed: int,
) -> None:
    if epsilon == 0 and step_size is None:
        step_size = 0.1
    spec = AttackSpec(
        name=name, epsilon=epsilon, steps=steps, step_size=step_size, random_start=random_start, batch_norm=mode
    )
    images, labels = batch(seed=seed)
    perturbed = make_attack(spec)(batch_norm_model(seed), images, labels, generator(seed))
    assert (perturbed - images).abs().max() <= epsilon + ROUNDING
    assert perturbed.min() >= 0
    assert perturbed.max() <= 1
    assert perturbed.dtype is torch.float32
    assert perturbed.shape == images.shape
    assert not perturbed.requires_grad


def test_random_start_fills_the_ball_and_stays_in_the_unit_interval() -> None:
    images = torch.cat([torch.full((1, 1, 100, 100), value) for value in (0.0, 0.5, 1.0)])
    start = make_attack(pgd(0.2)).start(images, generator())
    assert start.min() >= 0
    assert start.max() <= 1
    offsets = (start - images)[1]
    assert offsets.abs().max() <= 0.2 + ROUNDING
    assert offsets.min() < -0.199
    assert offsets.max() > 0.199
    assert offsets.mean().abs() < 0.004  # 3.5 standard errors of the mean of 10,000 draws


def test_without_a_random_start_the_ascent_starts_at_the_images_and_needs_no_generator() -> None:
    images, labels = batch()
    attack = make_attack(pgd(random_start=False))
    assert torch.equal(attack.start(images, None), images)
    first, second = (attack(batch_norm_model(), images, labels, None) for _ in range(2))
    assert torch.equal(first, second)


def test_same_generator_state_gives_the_same_perturbation_and_another_gives_another() -> None:
    images, labels = batch()
    attack = make_attack(pgd())
    first, second, other = (attack(batch_norm_model(), images, labels, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_attack_none_returns_the_images_themselves() -> None:
    images, labels = batch()
    attack = make_attack(AttackSpec(name=AttackName.NONE))
    assert attack(batch_norm_model(), images, labels, None) is images


# The ascent


def test_fgsm_takes_one_step_of_one_and_a_quarter_epsilon_from_its_start_and_projects() -> None:
    images, labels = batch()
    model = batch_norm_model()
    attack = make_attack(AttackSpec(name=AttackName.FGSM, epsilon=0.1, steps=9, batch_norm=BatchNormMode.EVAL))
    assert isinstance(attack, GradientSignAttack)
    assert attack.steps == 1
    start = attack.start(images, generator(5))

    perturbed = attack(model, images, labels, generator(5))

    variable = start.clone().requires_grad_()
    F.cross_entropy(model.eval()(variable), labels).backward()
    assert variable.grad is not None
    stepped = start + 0.125 * variable.grad.sign()
    expected = (images + (stepped - images).clamp(-0.1, 0.1)).clamp(0, 1)
    torch.testing.assert_close(perturbed, expected, rtol=0, atol=ROUNDING)


def test_loss_rises_with_every_attack_step_on_average(trained_model: nn.Module, digits: Dataset) -> None:
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    losses = [mean_loss(trained_model, images, labels)]
    for steps in range(1, 9):
        attack = make_attack(pgd(0.2, steps, 0.03, random_start=False))
        losses.append(mean_loss(trained_model, attack(trained_model, images, labels, None), labels))
    assert losses == sorted(losses)
    assert losses[-1] > 5 * losses[0]


def test_perturbation_of_a_sample_does_not_depend_on_its_batch_in_eval_mode() -> None:
    model = batch_norm_model()
    images, labels = batch()
    attack = make_attack(pgd(0.2, 6, random_start=False, batch_norm=BatchNormMode.EVAL))
    together = attack(model, images, labels, None)
    alone = attack(model, images[3:4], labels[3:4], None)
    torch.testing.assert_close(together[3:4], alone, rtol=0, atol=1e-6)


def test_robust_accuracy_agrees_with_foolbox_from_the_same_starts(trained_model: nn.Module, digits: Dataset) -> None:
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    attack = make_attack(pgd(0.15, 10, 0.02))
    start = attack.start(images, generator())

    class SameStart(foolbox.attacks.LinfPGD):
        def get_random_start(self, x0: object, epsilon: float) -> object:  # noqa: ARG002
            return foolbox.models.base.ep.astensor(start)

    theirs = SameStart(abs_stepsize=0.02, steps=10, random_start=True)
    _, perturbed, success = theirs(
        foolbox.PyTorchModel(trained_model, bounds=(0, 1), device="cpu"), images, labels, epsilons=0.15
    )
    ours = attack.perturb(trained_model, images, labels, start)
    with torch.no_grad():
        accuracy = (trained_model(ours).argmax(1) == labels).float().mean()
        clean_accuracy = (trained_model(images).argmax(1) == labels).float().mean()
    assert abs(accuracy - (~success).float().mean()) <= 0.01
    assert 0.3 < accuracy < clean_accuracy - 0.1, "the comparison must not be one of extremes"
    assert (ours - perturbed).abs().mean() < 1e-3


# What it must leave alone


@every_mode
@pytest.mark.parametrize("exploding", [False, True])
def test_attack_leaves_modes_gradients_buffers_and_tensors_as_they_were(mode: BatchNormMode, exploding: bool) -> None:
    model = ExplodingModel() if exploding else batch_norm_model()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.full_like(parameters[1], 7.0)
    images, labels = batch()
    images.requires_grad_()
    start = images.detach().clone()
    copies = (images.detach().clone(), labels.clone(), start.clone())
    before = dict(state_of(model))

    if exploding:
        with pytest.raises(RuntimeError, match="second pass"):
            make_attack(pgd(batch_norm=mode)).perturb(model, images, labels, start)
    else:
        make_attack(pgd(batch_norm=mode)).perturb(model, images, labels, start)

    assert dict(state_of(model)) == before
    assert images.requires_grad
    assert images.grad is None
    assert all(torch.equal(a, b) for a, b in zip(copies, (images, labels, start), strict=True))


def test_parameters_ask_for_no_gradient_while_the_attack_runs() -> None:
    model = SeesParameters()
    images, labels = batch()
    make_attack(pgd(steps=3))(model, images, labels, generator())
    assert model.asked == [False] * 3
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_mode
def test_batch_norm_runs_in_the_mode_of_the_spec(mode: BatchNormMode) -> None:
    class SeesModes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = batch_norm_model()
            self.outputs: list[Tensor] = []

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images)
            self.outputs.append(logits.detach())
            return logits

    model = SeesModes()
    images, labels = batch()
    make_attack(pgd(steps=1, random_start=False, batch_norm=mode))(model, images, labels, None)
    expected = model.inner.train(mode is BatchNormMode.TRAIN)(images)
    torch.testing.assert_close(model.outputs[0], expected.detach(), rtol=0, atol=0)


def test_attack_works_for_a_caller_without_gradients() -> None:
    images, labels = batch()
    attack = make_attack(pgd())
    with torch.no_grad():
        perturbed = attack(batch_norm_model(), images, labels, generator())
    assert torch.equal(perturbed, attack(batch_norm_model(), images, labels, generator()))


def test_attack_leaves_the_global_random_state_alone() -> None:
    images, labels = batch()
    model = batch_norm_model()
    state = torch.get_rng_state()
    make_attack(fgsm())(model, images, labels, generator())
    assert torch.equal(torch.get_rng_state(), state)
