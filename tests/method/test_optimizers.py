"""The outer minimization (A4): LAMB and SGD against PyTorch, timm and a plain loop over the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import timm.optim.lamb
import torch
from torch import Tensor, nn

from common.config import OptimizerName, OptimizerSpec
from common.errors import CheckpointError, SpecError
from tests.method.support import batch, batch_norm_model, generator
from worker.optimizers import FlatParameters, Lamb, Layer, Optimizer, Sgd, layer_rules, make_optimizer
from worker.optimizers.lamb import PIECE

SHAPES = ((24, 3, 3, 3), (24,), (7, 331), (7,), (1,), (5, 5), (2 * PIECE + 11, 2))
"""Lengths with every kind of tail, and a layer of several pieces."""


def layers_of(shapes: tuple[tuple[int, ...], ...] = SHAPES) -> tuple[Layer, ...]:
    lengths = [math.prod(shape) for shape in shapes]
    return tuple(Layer(name=f"p{i}", shape=shape, offset=sum(lengths[:i])) for i, shape in enumerate(shapes))


def vector(seed: int, length: int | None = None, size: float = 1.0) -> Tensor:
    length = sum(layer.length for layer in layers_of()) if length is None else length
    return torch.randn(length, generator=generator(seed)).mul_(size)


def tensors(flat: Tensor, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> list[Tensor]:
    """Copies of the layers, each in memory of its own."""
    pieces = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [piece.clone().view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def flatten(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32)


# A flat vector for the parameters


def test_parameters_and_gradients_become_views_in_order() -> None:
    model = batch_norm_model()
    names = [name for name, _ in model.named_parameters()]
    before = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    flat = FlatParameters(model)
    assert torch.equal(flat.theta, before)
    assert flat.names == tuple(names)
    assert flat.shapes == tuple(tuple(parameter.shape) for parameter in model.parameters())
    assert flat.edges[0] == 0
    assert flat.edges[-1] == flat.theta.numel() == flat.gradient.numel()
    for parameter, start, stop in zip(model.parameters(), flat.edges, flat.edges[1:], strict=False):
        assert torch.equal(parameter.detach().reshape(-1), flat.theta[start:stop])
    flat.theta.fill_(2.0)
    assert all(bool((parameter == 2.0).all()) for parameter in model.parameters())


def test_backward_accumulates_into_the_flat_gradient_until_it_is_zeroed() -> None:
    model, reference = batch_norm_model().eval(), batch_norm_model().eval()
    flat = FlatParameters(model)
    images, labels = batch()
    for network in (model, reference):
        for _ in range(2):
            nn.functional.cross_entropy(network(images), labels).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in reference.parameters() if p.grad is not None])
    assert torch.equal(flat.gradient, expected)
    flat.zero_gradient()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def tied_modules() -> nn.Module:
    first = nn.Linear(3, 3)
    second = nn.Linear(3, 3)
    second.weight = first.weight
    return nn.Sequential(first, second)


def aliased_storage() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight.data = model[0].weight.data
    return model


def frozen_parameter() -> nn.Module:
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tied_modules, r"share nothing, not even with 0.weight, got tied=1.weight"),
        (aliased_storage, r"share nothing, not even with 0.weight, got tied=1.weight"),
        (frozen_parameter, r"expected parameters that require grad, got bias=frozen"),
        (lambda: nn.Linear(3, 3).double(), r"expected float32 parameters, got weight=torch.float64"),
        (nn.ReLU, r"expected at least one parameter"),
    ],
)
def test_unfit_parameters_are_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        FlatParameters(build())


# SGD


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_sgd_is_bitwise_equal_to_that_of_pytorch(momentum: float, weight_decay: float, threads: int) -> None:
    spec = OptimizerSpec(name=OptimizerName.SGD, momentum=momentum, weight_decay=weight_decay)
    theta = vector(0)
    theta[0] = -0.0
    parameters = [nn.Parameter(tensor) for tensor in tensors(theta)]
    theirs = torch.optim.SGD(parameters, lr=1.0, momentum=momentum, weight_decay=weight_decay, foreach=False)
    ours = Sgd(spec, layers_of())
    torch.set_num_threads(threads)
    try:
        for round_ in range(8):
            gradient, rate = vector(100 + round_), 0.1 / (round_ + 1)
            gradient[0] = -0.0
            for parameter, part in zip(parameters, tensors(gradient), strict=True):
                parameter.grad = part
            theirs.param_groups[0]["lr"] = rate
            theirs.step()
            ours.update(theta, gradient, rate)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(bits(theta), bits(flatten([parameter.detach() for parameter in parameters])))


def test_sgd_can_leave_one_dimensional_tensors_undecayed() -> None:
    spec = OptimizerSpec(name=OptimizerName.SGD, momentum=0, weight_decay=0.5, decay_one_dimensional=False)
    theta = torch.ones(sum(layer.length for layer in layers_of()))
    Sgd(spec, layers_of()).update(theta, torch.zeros_like(theta), 1.0)
    for tensor in tensors(theta):
        assert bool((tensor == (1.0 if tensor.dim() == 1 else 0.5)).all())


# LAMB


def plain_lamb(
    spec: OptimizerSpec,
    theta: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    gradient: list[Tensor],
    t: int,
    eta: float,
) -> None:
    """Algorithm A2 tensor by tensor: the second, naive implementation."""

    def norm(tensor: Tensor) -> Tensor:
        return torch.stack([piece.norm() for piece in torch.split(tensor.flatten(), PIECE)]).norm()

    for i, g in enumerate(gradient):
        exempt = theta[i].dim() <= 1
        m[i] = torch.lerp(m[i], g, 1 - spec.beta1)
        v[i] = torch.addcmul(v[i] * spec.beta2, g, g, value=1 - spec.beta2)
        m_hat, v_hat = m[i], v[i]
        if spec.bias_correction:
            v_hat = v_hat / (1 - spec.beta2**t)
        u = m_hat / torch.sqrt(v_hat + spec.stability_eps)
        if spec.bias_correction:
            u = u / (1 - spec.beta1**t)
        if spec.decay_one_dimensional or not exempt:
            u = u.add(theta[i], alpha=spec.weight_decay)
        ratio = torch.tensor(1.0)
        tau = norm(theta[i]).clamp(spec.trust_low, spec.trust_high)
        if tau > 0 and norm(u) > 0 and (spec.adapt_one_dimensional or not exempt):
            ratio = tau / norm(u)
        theta[i] = theta[i] - u * (ratio * eta)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "spec",
    [
        OptimizerSpec(weight_decay=0.1),
        OptimizerSpec(bias_correction=False, weight_decay=0.0, stability_eps=1e-6),
        OptimizerSpec(decay_one_dimensional=False, adapt_one_dimensional=False, weight_decay=0.1),
        OptimizerSpec(trust_low=1.0, trust_high=3.0, beta1=0.8, beta2=0.95),
    ],
    ids=["default", "uncorrected", "exempt", "clipped"],
)
def test_lamb_is_bitwise_equal_to_a_plain_loop_over_the_tensors(spec: OptimizerSpec, threads: int) -> None:
    theta = vector(0)
    parts = tensors(theta)
    m, v = ([torch.zeros_like(part) for part in parts] for _ in range(2))
    optimizer = Lamb(spec, layers_of())
    torch.set_num_threads(threads)
    try:
        for round_ in range(10):
            gradient, rate = vector(100 + round_, size=10.0 ** (round_ - 5)), 0.3 / (round_ + 1)
            optimizer.update(theta, gradient, rate)
            torch.set_num_threads(1)
            plain_lamb(spec, parts, m, v, tensors(gradient), round_ + 1, rate)
            torch.set_num_threads(threads)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(bits(theta), bits(flatten(parts)))
    state = optimizer.state_tensors()
    assert torch.equal(bits(state["m"]), bits(flatten(m)))
    assert torch.equal(bits(state["v"]), bits(flatten(v)))


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("exempt", [False, True])
def test_lamb_agrees_with_that_of_timm_over_50_steps(bias_correction: bool, exempt: bool) -> None:
    """They coincide without gradient clipping, bounds of tau and denominator terms, and with coupled decay."""
    spec = OptimizerSpec(
        weight_decay=0.05,
        stability_eps=1e-30,
        trust_high=1e30,
        bias_correction=bias_correction,
        decay_one_dimensional=not exempt,
        adapt_one_dimensional=not exempt,
    )
    theta = vector(0)
    parameters = [nn.Parameter(tensor) for tensor in tensors(theta)]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0 if exempt else 0.05},
    ]
    theirs = timm.optim.lamb.Lamb(
        groups, lr=0.01, eps=1e-30, max_grad_norm=None, bias_correction=bias_correction, foreach=False
    )
    ours = Lamb(spec, layers_of())
    for round_ in range(50):
        gradient = vector(100 + round_)
        for parameter, part in zip(parameters, tensors(gradient), strict=True):
            parameter.grad = part
        theirs.step()
        ours.update(theta, gradient, 0.01)
    moved = (theta - vector(0)).abs().mean()
    assert moved > 0.01
    expected = flatten([parameter.detach() for parameter in parameters])
    for ours_part, theirs_part in zip(tensors(theta), tensors(expected), strict=True):
        assert (ours_part - theirs_part).norm() / theirs_part.norm() < 1e-6


def first_step(theta: Tensor, gradient: Tensor, shapes: tuple[tuple[int, ...], ...], **settings: float) -> Tensor:
    """-theta's change in one update with learning rate 1, where m_hat / sqrt(v_hat) is the gradient's sign."""
    spec = OptimizerSpec(weight_decay=0, stability_eps=1e-30, **settings)
    after = theta.clone()
    Lamb(spec, layers_of(shapes)).update(after, gradient, 1.0)
    return theta - after


def test_layer_of_zero_weights_moves_with_trust_ratio_one() -> None:
    change = first_step(torch.tensor([0.0, 0.0, 3.0, 4.0]), torch.tensor([5.0, -2.0, 1.0, 1.0]), ((2,), (2, 1)))
    torch.testing.assert_close(change, torch.tensor([1.0, -1.0, 5 / math.sqrt(2), 5 / math.sqrt(2)]))


def numpy_lamb_step(theta: list[float], gradient: list[float], low: float, high: float) -> list[float]:
    """Algorithm A2 for one layer from its start, with eta = 1: m_hat = g, v_hat = g^2, and tau of equation (3)."""
    w, g = np.array(theta), np.array(gradient)
    u = g / np.sqrt(g * g)
    length = np.sqrt((w * w).sum())
    tau = low if length < low else high if length > high else length
    stepped: list[float] = (w - tau / np.sqrt((u * u).sum()) * u).tolist()
    return stepped


@pytest.mark.parametrize("theta", [[0.0, 0.0, 0.0], [0.1, 0.0, -0.1], [3.0, -4.0, 0.0]], ids=["zero", "below", "above"])
def test_a_lower_bound_of_tau_counts_for_layers_of_zero_weights_too(theta: list[float]) -> None:
    gradient = [5.0, -2.0, 0.3]
    change = first_step(torch.tensor(theta), torch.tensor(gradient), ((3, 1),), trust_low=0.25, trust_high=2.0)
    assert (torch.tensor(theta) - change).tolist() == pytest.approx(numpy_lamb_step(theta, gradient, 0.25, 2.0))


def test_layer_of_zero_update_stays_and_nothing_becomes_nan() -> None:
    change = first_step(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 0.0, 1.0]), ((2,), (1,)))
    assert change.tolist() == pytest.approx([0.0, 0.0, 3.0])


@pytest.mark.parametrize(("norm", "tau"), [(0.25, 0.5), (1.0, 1.0), (7.0, 2.0)])
def test_tau_clips_the_norm_of_the_weights(norm: float, tau: float) -> None:
    theta = torch.full((4,), norm / 2)
    change = first_step(theta, torch.ones(4), ((2, 2),), trust_low=0.5, trust_high=2.0)
    assert change.norm().item() == pytest.approx(tau, rel=1e-5)


def test_update_has_the_size_of_the_weights_whatever_the_size_of_the_gradient() -> None:
    theta = vector(0, 60)
    small, large = (first_step(theta, vector(1, 60) * size, ((60, 1),)) for size in (1e-6, 1e6))
    torch.testing.assert_close(small, large)
    assert small.norm().item() == pytest.approx(theta.norm().item(), rel=1e-5)


# Rules and state


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("adapt", [False, True])
def test_table_says_which_layers_are_decayed_and_adapted(decay: bool, adapt: bool) -> None:
    spec = OptimizerSpec(decay_one_dimensional=decay, adapt_one_dimensional=adapt)
    rules = layer_rules(spec, layers_of(((3, 2), (3,), ())))
    assert [(rule.name, rule.decayed, rule.adapted) for rule in rules] == [
        ("p0", True, True),
        ("p1", decay, adapt),
        ("p2", decay, adapt),
    ]


def two_optimizers(name: OptimizerName) -> tuple[Optimizer, Optimizer]:
    spec = OptimizerSpec(name=name, weight_decay=0.1)
    flat = FlatParameters(batch_norm_model())
    return make_optimizer(spec, flat), make_optimizer(spec, flat)


@pytest.mark.parametrize(("name", "names"), [(OptimizerName.LAMB, {"m", "v", "t"}), (OptimizerName.SGD, {"b", "t"})])
def test_loaded_state_continues_as_if_there_had_been_no_break(name: OptimizerName, names: set[str]) -> None:
    original, restored = two_optimizers(name)
    length = FlatParameters(batch_norm_model()).theta.numel()
    theta = vector(0, length)
    for round_ in range(3):
        original.update(theta, vector(10 + round_, length), 0.1)
    copy = theta.clone()
    saved = {key: tensor.clone() for key, tensor in original.state_tensors().items()}
    assert set(saved) == names
    assert int(saved["t"]) == 3
    restored.load_state(saved)
    for round_ in range(3, 6):
        original.update(theta, vector(10 + round_, length), 0.1)
        restored.update(copy, vector(10 + round_, length), 0.1)
    assert torch.equal(bits(theta), bits(copy))
    assert restored.t == 6


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    optimizer, other = two_optimizers(OptimizerName.LAMB)
    length = other.state_tensors()["m"].numel()
    good = {"m": vector(0, length), "v": vector(1, length), "t": torch.tensor(5)}
    unfit = [
        ({"m": good["m"], "t": good["t"]}, r"expected tensors \['m', 't', 'v'\], got tensors=\['m', 't'\]"),
        (good | {"extra": good["m"]}, r"got tensors=\['extra', 'm', 't', 'v'\]"),
        (good | {"v": vector(1, length - 1)}, rf"expected shape \({length},\) and torch.float32, got v="),
        (good | {"v": good["v"].double()}, r"got v=\(.*torch.float64\)"),
        (good | {"t": torch.tensor(5.0)}, r"torch.int64, got t="),
        (good | {"t": torch.tensor(-1)}, r"expected a count >= 0, got t=-1"),
    ]
    for state, message in unfit:
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state(state)
    assert optimizer.t == 0
    assert not optimizer.state_tensors()["m"].any()
