"""The objective of TRADES, compared with its definition in separate forward passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ObjectiveName, ObjectiveSpec
from tests.method.support import batch, batch_norm_model
from tests.method.test_norms_and_losses import double_batch, smooth_model
from worker.objectives import local_cost

TRADES = ObjectiveSpec(name=ObjectiveName.TRADES)


def trades_by_hand(model: nn.Module, images: Tensor, perturbed: Tensor, labels: Tensor, beta: float) -> Tensor:
    """From the paper of TRADES, with a pass for each half."""
    p, q = torch.softmax(model(images), dim=1), torch.softmax(model(perturbed), dim=1)
    return -p.gather(1, labels[:, None]).log().mean() + beta * (p * (p / q).log()).sum(dim=1).mean()


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_cost_and_gradient_are_those_of_the_definition(beta: float) -> None:
    model, (images, labels) = smooth_model(), double_batch()
    perturbed = (images + 0.1).clamp(0, 1)
    parameters = list(model.parameters())
    cost = local_cost(TRADES.model_copy(update={"beta": beta}), model, images, perturbed, labels)
    expected = trades_by_hand(model, images, perturbed, labels, beta)
    torch.testing.assert_close(cost.loss, expected, rtol=1e-12, atol=0)
    ours, theirs = torch.autograd.grad(cost.loss, parameters), torch.autograd.grad(expected, parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def test_beta_is_6_and_the_weight_of_the_clean_loss_is_1_whatever_lambda() -> None:
    model, (images, labels) = smooth_model(), double_batch()
    expected = trades_by_hand(model, images, 1 - images, labels, 6.0)
    for weight in (0.0, 3.0):
        spec = TRADES.model_copy(update={"clean_weight": weight})
        torch.testing.assert_close(local_cost(spec, model, images, 1 - images, labels).loss, expected)


def test_the_gradient_flows_through_the_clean_prediction_too() -> None:
    """TRADES detaches it in the attack only."""
    model, (images, labels) = smooth_model(), double_batch()
    cost = local_cost(TRADES, model, images, 1 - images, labels)
    p = torch.softmax(model(images), dim=1)
    detached = F.cross_entropy(model(images), labels)
    detached = detached + 6 * F.kl_div(torch.log_softmax(model(1 - images), 1), p.detach(), reduction="batchmean")
    torch.testing.assert_close(cost.loss, detached)
    ours, other = (torch.autograd.grad(loss, model[1].weight)[0] for loss in (cost.loss, detached))
    assert (ours - other).norm() > 0.1 * other.norm()


def test_a_probability_that_underflows_gives_no_nan() -> None:
    images = torch.eye(4).view(4, 1, 2, 2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4) * 200)
    local_cost(TRADES, model, images, images.flip(0), torch.arange(4)).loss.backward()
    assert model[1].weight.grad is not None
    assert torch.isfinite(model[1].weight.grad).all()
    assert model[1].weight.grad.abs().max() > 0


def test_both_halves_go_through_in_one_pass_and_both_are_counted() -> None:
    sizes: list[int] = []
    images, _ = batch()
    model = batch_norm_model().eval()
    model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    labels = model(images).argmax(1)
    labels[:3] = (labels[:3] + 1) % 4
    robust = int((model(1 - images).argmax(1) == labels).sum())
    sizes.clear()
    cost = local_cost(TRADES, model, images, 1 - images, labels)
    assert sizes == [32]
    assert cost.clean_correct is not None
    assert (cost.samples, int(cost.clean_correct), int(cost.perturbed_correct)) == (16, 13, robust)
