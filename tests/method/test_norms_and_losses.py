"""The l2 ball and the divergence of TRADES: compared with loops that are written out here, and with foolbox."""

from __future__ import annotations

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import AttackLoss, AttackName, AttackNorm, AttackSpec, BatchNormMode
from tests.method.support import CLASSES, SIDE, batch, batch_norm_model, generator
from worker.attacks import GradientAttack, make_attack
from worker.data import Dataset

ROUNDING = 2e-6
"""Of a norm of 36 float32 differences, up to 6."""


def l2(epsilon: float = 0.8, **changes: object) -> AttackSpec:
    return AttackSpec.model_validate({"name": "pgd", "norm": "l2", "epsilon": epsilon, **changes})


def kl(epsilon: float = 0.1, **changes: object) -> AttackSpec:
    return AttackSpec.model_validate({"name": "pgd", "loss": "kl", "epsilon": epsilon, **changes})


def attack_of(spec: AttackSpec) -> GradientAttack:
    attack = make_attack(spec)
    assert isinstance(attack, GradientAttack)
    return attack


def norms(images: Tensor) -> Tensor:
    return images.flatten(1).norm(dim=1)


def smooth_model(seed: int = 1) -> nn.Sequential:
    """Without batch norm and kinks, in double precision: two programs' gradients agree to the last digits."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 9), nn.Tanh(), nn.Linear(9, CLASSES)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.7, generator=generator(seed))
    return model


def double_batch() -> tuple[Tensor, Tensor]:
    images, labels = batch()
    return images.double(), labels


# The balls


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([AttackName.FGSM, AttackName.PGD]),
    norm_loss=st.sampled_from([(AttackNorm.L2, AttackLoss.CROSS_ENTROPY), *((n, AttackLoss.KL) for n in AttackNorm)]),
    epsilon=st.one_of(st.just(0.0), st.floats(1e-6, 1)),
    wide=st.booleans(),
    steps=st.integers(1, 4),
    step_size=st.floats(1e-4, 9),
    random_start=st.booleans(),
    mode=st.sampled_from([None, *BatchNormMode]),
    seed=st.integers(0, 1000),
)
def test_perturbed_images_stay_in_their_ball_and_in_the_unit_interval(
    name: AttackName,
    norm_loss: tuple[AttackNorm, AttackLoss],
    epsilon: float,
    wide: bool,
    steps: int,
    step_size: float,
    random_start: bool,
    mode: BatchNormMode | None,
    seed: int,
) -> None:
    norm, loss = norm_loss
    epsilon *= 8 if wide and norm is AttackNorm.L2 else 1
    spec = AttackSpec(
        name=name,
        norm=norm,
        loss=loss,
        epsilon=epsilon,
        steps=steps,
        step_size=step_size,
        random_start=random_start,
        batch_norm=mode,
    )
    images, labels = batch(seed=seed)
    perturbed = make_attack(spec)(batch_norm_model(seed), images, labels, generator(seed))
    offsets = perturbed - images
    radius = norms(offsets).max() if norm is AttackNorm.L2 else offsets.abs().max()
    assert radius <= epsilon * (1 + 1e-6) + ROUNDING
    assert perturbed.min() >= 0
    assert perturbed.max() <= 1
    assert not perturbed.requires_grad


def test_a_start_in_the_l2_ball_is_uniform_in_it() -> None:
    images = torch.full((4000, 1, 2, 2), 0.5)
    offsets = attack_of(l2(0.3)).start(images, generator()) - images
    share_of_volume = (norms(offsets) / 0.3).pow(4)
    assert stats.kstest(share_of_volume.numpy(), "uniform").pvalue > 0.01
    direction = offsets / norms(offsets).view(-1, 1, 1, 1)
    assert direction.mean(0).abs().max() < 3.5 * 0.5 / 4000**0.5  # each coordinate of a direction in 4-d varies by 1/4
    angle = torch.atan2(offsets[:, 0, 0, 0], offsets[:, 0, 1, 1]) / (2 * torch.pi) + 0.5
    assert stats.kstest(angle.numpy(), "uniform").pvalue > 0.01


def test_a_start_in_the_l2_ball_stays_in_the_unit_interval_and_in_the_ball() -> None:
    images, _ = batch(64)
    start = attack_of(l2(2.0)).start(images, generator())
    assert start.min() >= 0
    assert start.max() <= 1
    assert norms(start - images).max() <= 2.0 + ROUNDING
    assert norms(start - images).min() > 0.3


# l2 ascent


def l2_pgd_by_hand(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, spec: AttackSpec) -> np.ndarray:
    """Sample by sample, in NumPy; torch gives nothing but the gradient."""
    result = []
    for image, label, begin in zip(images, labels, start, strict=True):
        x, now = image.numpy(), begin.numpy()
        for _ in range(spec.steps):
            variable = torch.from_numpy(now).clone().requires_grad_()
            F.cross_entropy(model(variable[None]), label[None]).backward()
            g = variable.grad.numpy()
            length = np.sqrt((g * g).sum())
            stepped = now + (spec.resolved_step_size * g / length if length > 0 else 0)
            offset = np.clip(stepped, 0, 1) - x
            radius = np.sqrt((offset * offset).sum())
            now = x + (offset * spec.epsilon / radius if radius > spec.epsilon else offset)
        result.append(now)
    return np.stack(result)


@pytest.mark.parametrize("epsilon", [0.2, 1.5])
def test_l2_pgd_is_the_loop_written_out_in_numpy(epsilon: float) -> None:
    model, (images, labels), spec = smooth_model(), double_batch(), l2(epsilon, steps=7)
    start = attack_of(spec).start(images, generator(3))
    perturbed = attack_of(spec).perturb(model, images, labels, start)
    expected = l2_pgd_by_hand(model, images, labels, start, spec)
    np.testing.assert_allclose(perturbed.numpy(), expected, rtol=0, atol=1e-12)
    offsets = norms(perturbed - images)
    assert offsets.max() > 0.999 * epsilon
    assert (perturbed == 1).any()
    assert (perturbed == 0).any()


def test_l2_fgsm_takes_one_step_of_one_and_a_quarter_epsilon_along_the_gradient() -> None:
    model, (images, labels) = smooth_model(), double_batch()
    images = 0.3 + 0.4 * images
    spec = AttackSpec(name=AttackName.FGSM, norm=AttackNorm.L2, epsilon=0.2, steps=9, random_start=False)
    assert spec.resolved_step_size == 0.25
    variable = images.clone().requires_grad_()
    F.cross_entropy(model(variable), labels).backward()
    assert variable.grad is not None
    direction = variable.grad / norms(variable.grad).view(-1, 1, 1, 1)
    perturbed = attack_of(spec)(model, images, labels, None)
    torch.testing.assert_close(perturbed, images + 0.2 * direction, rtol=0, atol=1e-12)  # projected from 0.25 to 0.2


def test_l2_robust_accuracy_agrees_with_foolbox_from_the_same_starts(trained_model: nn.Module, digits: Dataset) -> None:
    """On images away from 0 and 1, where foolbox's order of ball and interval does not matter."""
    images, labels = 0.25 + 0.5 * digits.test.images(torch.arange(360)), digits.test.labels
    attack = attack_of(l2(0.2, steps=10, step_size=0.05))
    start = attack.start(images, generator())

    class SameStart(foolbox.attacks.L2PGD):
        def get_random_start(self, x0: object, epsilon: float) -> object:  # noqa: ARG002
            return foolbox.models.base.ep.astensor(start)

    theirs = SameStart(abs_stepsize=0.05, steps=10, random_start=True)
    _, perturbed, success = theirs(
        foolbox.PyTorchModel(trained_model, bounds=(-9, 9), device="cpu"), images, labels, epsilons=0.2
    )
    ours = attack.perturb(trained_model, images, labels, start)
    with torch.no_grad():
        accuracy = (trained_model(ours).argmax(1) == labels).float().mean()
        clean_accuracy = (trained_model(images).argmax(1) == labels).float().mean()
    assert abs(accuracy - (~success).float().mean()) <= 0.01
    assert 0.2 < accuracy < clean_accuracy - 0.1, "the comparison must not be one of extremes"
    assert (ours - perturbed).abs().mean() < 1e-4


class Scaled(nn.Module):
    """Logits whose gradient with respect to the image has elements of about `factor`."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return torch.stack([flat @ torch.linspace(-1, 1, flat.shape[1]) * self.factor, flat[:, 0] * 0], dim=1)


@pytest.mark.parametrize("factor", [1e-30, 1e-42, 1e30])
def test_a_gradient_whose_squares_leave_float32_gives_a_whole_l2_step(factor: float) -> None:
    images, labels = torch.full((3, 1, 3, 3), 0.5), torch.ones(3, dtype=torch.int64)
    if factor == 1e30:
        labels = torch.zeros(3, dtype=torch.int64)
        images = images - torch.linspace(0, 0.01, 9).view(1, 1, 3, 3)  # on the wrong side: the loss has a gradient
    attack = attack_of(l2(0.4, steps=1, step_size=0.1, random_start=False))
    moved = attack(Scaled(factor), images, labels, None) - images
    torch.testing.assert_close(norms(moved), torch.full((3,), 0.1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("norm", list(AttackNorm))
def test_where_the_gradient_is_zero_the_perturbation_stays_where_it_is(norm: AttackNorm) -> None:
    images, labels = batch(4)
    spec = AttackSpec(name=AttackName.PGD, norm=norm, epsilon=0.3, steps=3)
    attack = attack_of(spec)
    start = attack.start(images, generator())
    perturbed = attack.perturb(Scaled(0.0), images, labels % 2, start)
    torch.testing.assert_close(perturbed, start, rtol=0, atol=ROUNDING)
    no_ball = attack_of(spec.model_copy(update={"epsilon": 0.0, "step_size": 0.1}))
    assert torch.equal(no_ball(Scaled(1.0), images, labels % 2, generator()), images)


# The divergence


def trades_attack_by_hand(model: nn.Module, images: Tensor, start: Tensor, spec: AttackSpec) -> Tensor:
    """The inner loop of TRADES, from its definition."""
    x = start
    for _ in range(spec.steps):
        x = x.detach().requires_grad_()
        p = torch.softmax(model(images), dim=1).detach()
        q = torch.softmax(model(x), dim=1)
        value = (p * (p.log() - q.log())).sum()
        value.backward()
        assert x.grad is not None
        x = x.detach() + spec.resolved_step_size * x.grad.sign()
        x = torch.minimum(torch.maximum(x, images - spec.epsilon), images + spec.epsilon).clamp(0, 1)
    return x


def test_the_kl_attack_is_the_inner_loop_of_trades_from_the_same_start() -> None:
    model, (images, labels), spec = smooth_model(), double_batch(), kl(0.1, steps=5)
    start = attack_of(spec).start(images, generator(2))
    perturbed = attack_of(spec).perturb(model, images, labels, start)
    torch.testing.assert_close(perturbed, trades_attack_by_hand(model, images, start, spec), rtol=0, atol=1e-12)
    clean, found = (torch.log_softmax(model(x), dim=1) for x in (images, perturbed))
    reached = F.kl_div(found, clean, reduction="batchmean", log_target=True)
    beside = F.kl_div(torch.log_softmax(model(start), 1), clean, reduction="batchmean", log_target=True)
    assert reached > 100 * beside


def test_the_kl_attack_asks_for_no_label() -> None:
    model, (images, labels) = smooth_model(), double_batch()
    first, other = (attack_of(kl())(model, images, y, generator()) for y in (labels, (labels + 1) % CLASSES))
    assert torch.equal(first, other)


@pytest.mark.parametrize("norm", list(AttackNorm))
@pytest.mark.parametrize("random_start", [True, False])
def test_the_kl_attack_starts_a_thousandth_beside_the_image_and_moves(norm: AttackNorm, random_start: bool) -> None:
    images = torch.full((500, 1, SIDE, SIDE), 0.5)
    attack = attack_of(kl(0.1, norm=norm, random_start=random_start))
    noise = attack.start(images, generator()) - images
    assert abs(noise.std() / 0.001 - 1) < 0.02
    assert abs(noise.mean()) < 3e-5
    images, labels = batch()
    moved = attack(batch_norm_model(), images, labels, generator()) - images
    radius = norms(moved) if norm is AttackNorm.L2 else moved.abs().flatten(1).amax(1)
    assert radius.min() > 0.09


@pytest.mark.parametrize("name", [AttackName.FGSM, AttackName.PGD])
def test_the_kl_attack_runs_in_eval_mode_and_computes_the_clean_prediction_once(name: AttackName) -> None:
    class SeesModes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = batch_norm_model()
            self.modes: list[tuple[bool, bool]] = []

        def forward(self, images: Tensor) -> Tensor:
            self.modes.append((self.inner.training, images.requires_grad))
            logits: Tensor = self.inner(images)
            return logits

    model, (images, labels) = SeesModes(), batch()
    attack_of(kl(name=name, steps=3))(model, images, labels, generator())
    steps = 1 if name is AttackName.FGSM else 3
    assert model.modes == [(False, False)] + [(False, True)] * steps
