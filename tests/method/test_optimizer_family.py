"""Nesterov's momentum, AdamW, LARS and clipping against PyTorch, NumPy and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.config import OptimizerName, OptimizerSpec
from tests.method.test_optimizers import bits, flatten, layers_of, tensors, vector
from worker.optimizers import AdamW, Lamb, Lars, Optimizer, Sgd

KINDS: dict[OptimizerName, type[Optimizer]] = {
    OptimizerName.LAMB: Lamb,
    OptimizerName.LARS: Lars,
    OptimizerName.SGD: Sgd,
    OptimizerName.ADAMW: AdamW,
}
every_optimizer = pytest.mark.parametrize("name", list(KINDS))


def make(spec: OptimizerSpec, shapes: tuple[tuple[int, ...], ...] | None = None) -> Optimizer:
    return KINDS[spec.name](spec, layers_of(shapes) if shapes else layers_of())


def side_by_side(
    spec: OptimizerSpec, make_theirs: Callable[[list[nn.Parameter]], torch.optim.Optimizer], threads: int
) -> tuple[Tensor, Tensor]:
    """Eight updates with rising and falling gradients and rates: our parameters, and those of PyTorch's optimizer."""
    theta = vector(0)
    theta[0] = -0.0
    parameters = [nn.Parameter(tensor) for tensor in tensors(theta)]
    theirs, ours = make_theirs(parameters), make(spec)
    torch.set_num_threads(threads)
    try:
        for round_ in range(8):
            gradient, rate = vector(100 + round_, size=10.0 ** (round_ % 3 - 1)), 0.1 / (round_ + 1)
            gradient[0] = -0.0
            for parameter, part in zip(parameters, tensors(gradient), strict=True):
                parameter.grad = part
            theirs.param_groups[0]["lr"] = rate
            theirs.step()
            ours.update(theta, gradient, rate)
    finally:
        torch.set_num_threads(1)
    return theta, flatten([parameter.detach() for parameter in parameters])


# Against PyTorch


@pytest.mark.parametrize(("weight_decay", "threads"), [(0.0, 1), (1e-2, 2)])
def test_nesterov_is_bitwise_equal_to_that_of_pytorch(weight_decay: float, threads: int) -> None:
    spec = OptimizerSpec(name=OptimizerName.SGD, nesterov=True, weight_decay=weight_decay)
    ours, theirs = side_by_side(
        spec,
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9, nesterov=True, weight_decay=weight_decay, foreach=False),
        threads,
    )
    assert torch.equal(bits(ours), bits(theirs))
    plain, _ = side_by_side(spec.model_copy(update={"nesterov": False}), torch.optim.SGD, 1)
    assert not torch.equal(ours, plain)


@pytest.mark.parametrize(("weight_decay", "eps", "threads"), [(0.0, 1e-8, 1), (1e-2, 1e-12, 2)])
def test_adamw_is_bitwise_equal_to_that_of_pytorch(weight_decay: float, eps: float, threads: int) -> None:
    spec = OptimizerSpec(name=OptimizerName.ADAMW, weight_decay=weight_decay, beta2=0.99, stability_eps=eps)
    ours, theirs = side_by_side(
        spec,
        lambda p: torch.optim.AdamW(p, betas=(0.9, 0.99), eps=eps, weight_decay=weight_decay, foreach=False),
        threads,
    )
    assert torch.equal(bits(ours), bits(theirs))


def test_adamw_can_leave_one_dimensional_tensors_undecayed() -> None:
    spec = OptimizerSpec(name=OptimizerName.ADAMW, weight_decay=0.5, decay_one_dimensional=False)
    theta = torch.ones(sum(layer.length for layer in layers_of()))
    make(spec).update(theta, torch.zeros_like(theta), 1.0)
    for tensor in tensors(theta):
        assert bool((tensor == (1.0 if tensor.dim() == 1 else 0.5)).all())


# LARS


def numpy_lars(
    spec: OptimizerSpec, theta: list[np.ndarray], gradients: list[list[np.ndarray]], rates: list[float]
) -> None:
    """You et al. 2017, Algorithm 1, layer by layer in float64; `theta` is updated in place."""
    momenta = [np.zeros_like(layer) for layer in theta]
    for gradient, rate in zip(gradients, rates, strict=True):
        for w, g, v in zip(theta, gradient, momenta, strict=True):
            exempt = w.ndim <= 1
            decay = 0.0 if exempt and not spec.decay_one_dimensional else spec.weight_decay
            local_rate = 1.0
            if spec.adapt_one_dimensional or not exempt:
                norm = math.sqrt(float((w * w).sum()))
                bounded = min(max(norm, spec.trust_low), spec.trust_high)
                local_rate = spec.trust_coefficient * bounded / (math.sqrt(float((g * g).sum())) + decay * norm)
            v[...] = spec.momentum * v + rate * local_rate * (g + decay * w)
            w -= v


@pytest.mark.parametrize(
    "settings",
    [
        {"trust_high": 1e6},
        {"trust_high": 1e6, "weight_decay": 0.1, "trust_coefficient": 0.02, "momentum": 0.5},
        {"trust_low": 2.0, "trust_high": 5.0, "weight_decay": 1e-2},
        {"momentum": 0.0, "decay_one_dimensional": False, "adapt_one_dimensional": False, "weight_decay": 0.1},
    ],
    ids=["as published", "strong decay", "bounded", "exempt"],
)
def test_lars_agrees_with_a_numpy_loop_over_the_layers(settings: dict[str, float]) -> None:
    """In float32 against float64: ten updates round each weight a few times 2^-24 relative to its size, about 1e-6."""
    spec = OptimizerSpec(name=OptimizerName.LARS, **settings)
    start, rates = vector(0), [3.0 / (round_ + 1) for round_ in range(10)]
    gradients = [vector(100 + round_, size=10.0 ** (round_ - 5)) for round_ in range(10)]
    theta, ours = start.clone(), make(spec)
    for gradient, rate in zip(gradients, rates, strict=True):
        ours.update(theta, gradient.clone(), rate)
    expected = [layer.double().numpy() for layer in tensors(start)]
    numpy_lars(spec, expected, [[g.double().numpy() for g in tensors(gradient)] for gradient in gradients], rates)
    for before, layer, reference in zip(tensors(start), tensors(theta), expected, strict=True):
        error, moved = np.linalg.norm(layer.numpy() - reference), np.linalg.norm(reference - before.numpy())
        assert error / np.linalg.norm(reference) < 1e-6
        assert error < 1e-3 * moved


def lars_step(theta: list[float], gradient: list[float], **settings: float) -> list[float]:
    """How far one layer moves in one update with learning rate 1 and trust coefficient 1, without decay."""
    spec = OptimizerSpec(name=OptimizerName.LARS, weight_decay=0, trust_coefficient=1, **settings)
    before = torch.tensor(theta)
    after = before.clone()
    make(spec, ((len(theta), 1),)).update(after, torch.tensor(gradient), 1.0)
    return (before - after).tolist()


@pytest.mark.parametrize(("norm", "tau"), [(0.0, 0.5), (0.25, 0.5), (1.0, 1.0), (7.0, 2.0)])
def test_tau_bounds_the_norm_of_the_weights_in_lars_too(norm: float, tau: float) -> None:
    moved = lars_step([norm * 0.6, norm * 0.8], [30.0, -40.0], trust_low=0.5, trust_high=2.0)
    assert moved == pytest.approx([0.6 * tau, -0.8 * tau], rel=1e-6)


def test_lars_moves_weights_of_zero_by_the_gradient_and_not_at_all_without_one() -> None:
    assert lars_step([0.0, 0.0], [3.0, -4.0]) == [3.0, -4.0]
    assert lars_step([3.0, 4.0], [0.0, 0.0]) == [0.0, 0.0]


# Clipping


@every_optimizer
def test_clipped_gradients_give_the_update_of_gradients_clipped_by_pytorch(name: OptimizerName) -> None:
    """PyTorch divides by the norm + 1e-6, and adds its squares in another order: gradients differ by less than 1e-6.

    The weights, of size 1, change by 0.003 each and are rounded by up to 6e-8: changes agree to 2e-5.
    """
    spec = OptimizerSpec(name=name, learning_rate=0.1, clip_norm=3.0)
    theta, expected = vector(0), vector(0)
    clipping, plain = make(spec), make(spec.model_copy(update={"clip_norm": None}))
    for round_ in range(4):
        gradient = vector(10 + round_, size=10.0 ** (round_ - 3))
        parameter = nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient.clone()
        norm = float(nn.utils.clip_grad_norm_([parameter], 3.0))
        clipping.update(theta, gradient, 0.1)
        plain.update(expected, parameter.grad, 0.1)
        assert float(gradient.double().norm()) == pytest.approx(min(norm, 3.0), rel=1e-6)
        assert float((gradient - parameter.grad).norm() / gradient.norm()) < 1e-6
    assert float((theta - expected).norm() / (expected - vector(0)).norm()) < 2e-5


def test_gradients_that_are_short_enough_keep_their_bits_and_a_gradient_of_zero_stays_one() -> None:
    spec = OptimizerSpec(name=OptimizerName.SGD, clip_norm=1.0)
    length = vector(0).numel()
    for gradient in (vector(1) / (vector(1).norm() * 1.001), torch.zeros(length)):
        given = gradient.clone()
        make(spec).update(vector(0), given, 0.1)
        assert torch.equal(bits(given), bits(gradient))


def test_a_gradient_that_is_too_long_keeps_its_direction() -> None:
    gradient, theta = torch.tensor([30.0, -40.0]), torch.zeros(2)
    spec = OptimizerSpec(name=OptimizerName.SGD, clip_norm=5.0, momentum=0, weight_decay=0)
    make(spec, ((2, 1),)).update(theta, gradient, 1.0)
    assert theta.tolist() == pytest.approx([-3.0, 4.0], rel=1e-6)


# State


@every_optimizer
def test_two_optimizers_with_the_same_state_stay_together(name: OptimizerName) -> None:
    spec = OptimizerSpec(name=name, clip_norm=0.5, weight_decay=0.1)
    original, restored = make(spec), make(spec)
    theta = vector(0)
    for round_ in range(3):
        original.update(theta, vector(10 + round_), 0.1)
    copy = theta.clone()
    restored.load_state({key: tensor.clone() for key, tensor in original.state_tensors().items()})
    for optimizer, parameters in ((original, theta), (restored, copy)):
        for round_ in range(3, 6):
            optimizer.update(parameters, vector(10 + round_), 0.1)
    assert torch.equal(bits(theta), bits(copy))
    assert set(original.state_tensors()) == {"t", *({"m", "v"} if name in ("lamb", "adamw") else {"b"})}
