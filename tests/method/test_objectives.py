"""The local cost of equation (2) and its gradient (A2)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ObjectiveSpec
from tests.method.support import batch, batch_norm_model
from worker.objectives import local_cost


class CountsSamples(nn.Module):
    """Records how many samples each forward pass has."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = batch_norm_model().eval()
        self.samples: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.samples.append(len(images))
        logits: Tensor = self.inner(images)
        return logits


def perturbed_batch() -> tuple[Tensor, Tensor, Tensor]:
    images, labels = batch()
    return images, 1 - images, labels


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_cost_is_the_weighted_clean_loss_plus_the_adversarial_loss(weight: float) -> None:
    images, perturbed, labels = perturbed_batch()
    model = batch_norm_model().eval()
    cost = local_cost(ObjectiveSpec(clean_weight=weight), model, images, perturbed, labels)
    expected = weight * F.cross_entropy(model(images), labels) + F.cross_entropy(model(perturbed), labels)
    torch.testing.assert_close(cost.loss, expected)


def test_gradient_is_the_weighted_sum_of_both_gradients() -> None:
    images, perturbed, labels = perturbed_batch()
    model = batch_norm_model().eval()
    parameters = list(model.parameters())
    cost = local_cost(ObjectiveSpec(clean_weight=0.7), model, images, perturbed, labels)
    gradients = torch.autograd.grad(cost.loss, parameters)
    clean = torch.autograd.grad(F.cross_entropy(model(images), labels), parameters)
    adversarial = torch.autograd.grad(F.cross_entropy(model(perturbed), labels), parameters)
    for gradient, a, b in zip(gradients, clean, adversarial, strict=True):
        torch.testing.assert_close(gradient, 0.7 * a + b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("weight", "passes"), [(0.0, [16]), (1.0, [32])])
def test_one_forward_pass_is_enough_and_without_lambda_clean_images_take_no_part(
    weight: float, passes: list[int]
) -> None:
    images, perturbed, labels = perturbed_batch()
    model = CountsSamples()
    local_cost(ObjectiveSpec(clean_weight=weight), model, images, perturbed, labels)
    assert model.samples == passes


def test_counts_of_correct_samples_are_those_of_separate_forward_passes() -> None:
    images, perturbed, _ = perturbed_batch()
    model = batch_norm_model().eval()
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    robust = int((model(perturbed).argmax(1) == labels).sum())
    assert robust != 13
    cost = local_cost(ObjectiveSpec(clean_weight=1), model, images, perturbed, labels)
    assert (cost.samples, int(cost.perturbed_correct)) == (16, robust)
    assert cost.clean_correct is not None
    assert int(cost.clean_correct) == 13
    assert int(local_cost(ObjectiveSpec(), model, images, perturbed, labels).perturbed_correct) == robust
    assert local_cost(ObjectiveSpec(), model, images, perturbed, labels).clean_correct is None


def test_batch_norm_records_the_mixture_of_both_halves_once() -> None:
    images, perturbed, labels = perturbed_batch()
    model = batch_norm_model().train()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    activations = model[0](torch.cat([images, perturbed])).detach()
    local_cost(ObjectiveSpec(clean_weight=1), model, images, perturbed, labels)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, 0.1 * activations.mean(dim=(0, 2, 3)))
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 1
