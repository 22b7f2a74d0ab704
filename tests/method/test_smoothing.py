"""Noisy copies: whose noise it is, the smoothed classifier that is attacked, and the update's cost."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import AttackSpec, ModelSpec, ObjectiveSpec, SmoothingSpec
from tests.method.support import CLASSES, SIDE, batch, batch_norm_model, generator, randomize, state_of
from tests.method.test_attacks import ExplodingModel
from tests.method.test_norms_and_losses import attack_of, double_batch, smooth_model
from worker.models import build_model
from worker.objectives import local_cost
from worker.smoothing import SmoothedModel, draw_noise, noise_generators, noisy_copies, smoothed

SPEC = SmoothingSpec(noise_std=0.25, samples=5)


def noise_of(images: Tensor, numbers: list[int], spec: SmoothingSpec = SPEC) -> Tensor:
    noise = draw_noise(spec, images, [generator(number) for number in numbers])
    assert noise is not None
    return noise


def mean_softmax(model: nn.Module, images: Tensor, noise: Tensor) -> Tensor:
    """Copy by copy, by the definition."""
    copies = noise.shape[1]
    return torch.stack([torch.softmax(model(images + noise[:, copy_]), dim=1) for copy_ in range(copies)]).mean(0)


def test_without_noise_nothing_is_drawn_and_the_model_itself_is_attacked() -> None:
    images, _ = batch(3)
    assert draw_noise(SmoothingSpec(), images, iter(())) is None
    model = batch_norm_model()
    assert smoothed(model, None) is model


def test_noise_is_gaussian_with_the_standard_deviation_of_the_spec() -> None:
    images = torch.rand(40, 1, 10, 10, generator=generator())
    noise = noise_of(images, list(range(40)))
    assert noise.shape == (40, 5, 1, 10, 10)
    assert abs(noise.std() / 0.25 - 1) < 0.015
    assert abs(noise.mean()) < 3.5 * 0.25 / 20_000**0.5
    assert (noise.abs() < 0.25).float().mean() == pytest.approx(0.683, abs=0.012)
    flat = noise.view(200, 100)
    correlation = torch.corrcoef(flat) - torch.eye(200)
    assert correlation.abs().max() < 0.55  # 5.5 standard deviations of a correlation of 100 pairs


def test_a_sample_has_the_same_noise_in_every_batch() -> None:
    images, _ = batch(6)
    together = noise_of(images, [0, 1, 2, 3, 4, 5])
    apart = torch.cat([noise_of(images[part], numbers) for part, numbers in ((slice(4, 6), [4, 5]), (slice(1), [0]))])
    assert torch.equal(apart, together[[4, 5, 0]])


def test_the_noise_of_a_sample_depends_on_seed_batch_number_and_owner() -> None:
    images, _ = batch(2)

    def drawn(seed: int, number: int, indices: list[int], owner: int | None) -> list[Tensor]:
        noise = draw_noise(SPEC, images[: len(indices)], noise_generators(seed, number, indices, owner))
        assert noise is not None
        return list(noise)

    (first, second), (again,) = drawn(0, 3, [7, 8], None), drawn(0, 3, [8], None)
    assert torch.equal(second, again)
    others = [drawn(*key)[0] for key in ((1, 3, [7], None), (0, 4, [7], None), (0, 3, [7], 0), (0, 3, [7], 1))]
    different = [first, second, *others]
    assert not any(torch.equal(a, b) for number, a in enumerate(different) for b in different[:number])


def test_copies_stand_sample_by_sample_and_are_not_clamped() -> None:
    images, _ = batch(3)
    noise = noise_of(images, [0, 1, 2])
    copies = noisy_copies(images, noise)
    assert copies.shape == (15, 1, SIDE, SIDE)
    assert torch.equal(copies[7], images[1] + noise[1, 2])
    assert copies.min() < 0
    assert copies.max() > 1


def test_noise_is_added_before_normalization() -> None:
    mean, std = (0.3, 0.4, 0.5), (0.2, 0.25, 0.5)
    model = build_model(
        ModelSpec.model_validate({"name": "resnet8", "width": 4}),
        in_channels=3,
        image_size=8,
        classes=4,
        mean=mean,
        std=std,
        seed=0,
    ).eval()
    images = torch.rand(2, 3, 8, 8, generator=generator())
    noise = noise_of(images, [0, 1])
    seen: list[Tensor] = []
    first_convolution = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first_convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    SmoothedModel(model, noise)(images)
    channels = [torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std)]
    expected = (noisy_copies(images, noise) - channels[0]) / channels[1]
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("samples", [1, 5])
def test_the_loss_of_the_attack_and_its_gradient_are_those_of_the_mean_softmax(samples: int) -> None:
    model, (images, labels) = smooth_model(), double_batch()
    noise = noise_of(images.float(), list(range(16)), SmoothingSpec(noise_std=0.25, samples=samples)).double()
    ours, plain = images.clone().requires_grad_(), images.clone().requires_grad_()
    loss = F.cross_entropy(SmoothedModel(model, noise)(ours), labels, reduction="sum")
    expected = -mean_softmax(model, plain, noise).gather(1, labels[:, None]).log().sum()
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-9, atol=1e-13)
    if samples > 1:
        single = F.cross_entropy(model(noisy_copies(images, noise)), labels.repeat_interleave(samples)) * len(labels)
        assert abs(single - loss) > 1e-3  # the mean of the copies' losses is another function


def test_the_smoothed_loss_stays_finite_where_every_probability_underflows() -> None:
    class Sure(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([images.flatten(1).sum(1) * 1e4, images.flatten(1).sum(1) * 0], dim=1)

    images, labels = torch.full((2, 1, 2, 2), 0.5), torch.ones(2, dtype=torch.int64)
    variable = images.clone().requires_grad_()
    loss = F.cross_entropy(SmoothedModel(Sure(), noise_of(images, [0, 1]) * 0.1)(variable), labels)
    loss.backward()
    assert loss > 1e4
    assert variable.grad is not None
    assert variable.grad.abs().min() > 0


def test_smoothadv_pgd_is_the_loop_written_out_with_the_same_noise_in_every_step() -> None:
    model, (images, labels) = smooth_model(), double_batch()
    noise = noise_of(images.float(), list(range(16))).double()
    spec = AttackSpec.model_validate({"norm": "l2", "epsilon": 0.5, "steps": 4, "random_start": False})
    x = images
    for _ in range(4):
        x = x.detach().requires_grad_()
        (-mean_softmax(model, x, noise).gather(1, labels[:, None]).log().mean()).backward()
        assert x.grad is not None
        offset = x.detach() + 2.5 * 0.5 / 4 * x.grad / x.grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        offset = offset.clamp(0, 1) - images
        x = images + torch.renorm(offset, p=2, dim=0, maxnorm=0.5)
    perturbed = attack_of(spec)(SmoothedModel(model, noise), images, labels, None)
    torch.testing.assert_close(perturbed, x.detach(), rtol=0, atol=1e-6)  # renorm divides by the norm + 1e-7
    without = attack_of(spec)(model, images, labels, None)
    assert (perturbed - without).abs().max() > 0.01


@pytest.mark.parametrize("exploding", [False, True])
def test_an_attack_on_the_smoothed_model_leaves_the_model_as_it_was(exploding: bool) -> None:
    model: nn.Module = ExplodingModel() if exploding else batch_norm_model()
    images, labels = batch(4)
    attacked = SmoothedModel(model, noise_of(images, [0, 1, 2, 3]))
    before = dict(state_of(model))
    attack = attack_of(AttackSpec.model_validate({"epsilon": 0.1, "steps": 3, "batch_norm": "train"}))
    if exploding:
        with pytest.raises(RuntimeError, match="second pass"):
            attack(attacked, images, labels, generator())
    else:
        attack(attacked, images, labels, generator())
    assert dict(state_of(model)) == before


@pytest.mark.parametrize(
    "objective", [{}, {"clean_weight": 0.5}, {"name": "trades", "beta": 3}], ids=["perturbed", "both", "trades"]
)
def test_the_update_has_the_mean_cost_over_all_noisy_copies(objective: dict[str, object]) -> None:
    spec = ObjectiveSpec.model_validate(objective)
    model, (images, labels) = smooth_model(), double_batch()
    perturbed = (1 - images).contiguous()
    noise = noise_of(images.float(), list(range(16))).double()
    cost = local_cost(spec, model, images, perturbed, labels, noise_NSCHW=noise)
    other = copy.deepcopy(model)
    by_copy = [local_cost(spec, other, images + n, perturbed + n, labels) for n in noise.unbind(1)]
    expected = torch.stack([each.loss for each in by_copy]).mean()
    torch.testing.assert_close(cost.loss, expected, rtol=1e-12, atol=0)
    assert cost.samples == 80
    assert int(cost.perturbed_correct) == sum(int(each.perturbed_correct) for each in by_copy)
    cost.loss.backward()
    expected.backward()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)


def test_batch_norm_sees_all_noisy_copies_in_one_pass() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(SIDE * SIDE, momentum=1.0), nn.Linear(SIDE * SIDE, CLASSES))
    randomize(model)
    images, labels = batch()
    noise = noise_of(images, list(range(16)))
    local_cost(ObjectiveSpec(), model.train(), images, images, labels, noise_NSCHW=noise)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, noisy_copies(images, noise).flatten(1).mean(0))
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 1
