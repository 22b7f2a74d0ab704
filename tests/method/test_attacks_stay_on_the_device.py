"""No attack waits for its device within its loop: no value is read, and nothing is copied to another device.

The device `meta` stands for an accelerator that the CPU must not ask anything: its tensors have no values to read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.config import AttackLoss, AttackName, AttackNorm, AttackSpec, BatchNormMode
from tests.method.support import CLASSES, SIDE, batch_norm_model
from worker.attacks import make_attack
from worker.smoothing import SmoothedModel

WAITS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero"),  # a value for Python: item, bool, float
    *("aten::nonzero", "aten::masked_select", "aten::unique_dim", "aten::_unique2"),  # a shape that depends on values
    *("aten::equal", "aten::allclose"),
}
STEPS = 3
DEVICES = ("cpu", "meta")


def is_mask(index: object) -> bool:
    """Whether how much an index takes depends on its values."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


class StaysOn(TorchDispatchMode):
    """Lets no operation pass that waits for the device, or that has a tensor elsewhere; counts the others by name."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)
        self.passed: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        mask = name.startswith("aten::index") and any(is_mask(leaf) for leaf in tree_leaves(args[1]))
        assert name not in WAITS | ({name} if mask else set()), f"waits: {name}"
        result = func(*args, **(kwargs or {}))
        elsewhere = {
            str(leaf.device)
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, Tensor) and leaf.device != self._device
        }
        assert not elsewhere, f"{name} has a tensor on {elsewhere}"
        self.passed[name] = self.passed.get(name, 0) + 1
        return result


def spec(**keys: Any) -> AttackSpec:
    return AttackSpec(epsilon=0.1, steps=STEPS, **keys)


ATTACKS = {
    "PGD": spec(),
    "PGD with the batch's statistics": spec(batch_norm=BatchNormMode.TRAIN),
    "PGD in l2": spec(norm=AttackNorm.L2),
    "KL": spec(loss=AttackLoss.KL),
    "KL in l2": spec(loss=AttackLoss.KL, norm=AttackNorm.L2),
    "FGSM": AttackSpec(name=AttackName.FGSM, epsilon=0.1),
    "FGSM in l2": AttackSpec(name=AttackName.FGSM, epsilon=0.1, norm=AttackNorm.L2),
}


def on(device: str, copies: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, smoothed if there are copies of each image; images, where their attack starts, and labels."""
    draws = torch.Generator().manual_seed(3)
    images = torch.rand(8, 1, SIDE, SIDE, generator=draws)
    start = (images + 0.01).clamp(0, 1)
    labels = torch.randint(CLASSES, (8,), generator=draws)
    model: nn.Module = batch_norm_model().to(device)
    if copies:
        noise = torch.randn(8, copies, 1, SIDE, SIDE, generator=draws)
        model = SmoothedModel(model, 0.1 * noise.to(device))
    return model, images.to(device), start.to(device), labels.to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copies", [0, 2], ids=["plain", "SmoothAdv"])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_never_waits_for_its_device(name: str, copies: int, device: str) -> None:
    model, images, start, labels = on(device, copies)
    attack = make_attack(ATTACKS[name])
    with StaysOn(device) as stays:
        perturbed = attack.perturb(model, images, labels, start)
    assert (perturbed.device.type, perturbed.shape) == (device, images.shape)
    steps = 1 if ATTACKS[name].name is AttackName.FGSM else STEPS
    assert stays.passed["aten::convolution_backward"] == steps  # the backward passes were watched, too
    if device == "cpu":
        assert not torch.equal(perturbed, start)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("wait", "said"),
    [
        (lambda x: x.sum().item(), "waits: aten::_local_scalar_dense"),
        (lambda x: float(x.sum()), "waits: aten::_local_scalar_dense"),
        (lambda x: bool((x > 0).all()), "waits: aten::(is_nonzero|_local_scalar_dense)"),
        (lambda x: x.nonzero(), "waits: aten::nonzero"),
        (lambda x: x[x > 0], "waits: aten::index"),
        (lambda x: x.index_put_((x > 0,), torch.zeros_like(x[0])), "waits: aten::index_put_"),
        (lambda x: torch.equal(x, x), "waits: aten::equal"),
    ],
    ids=["item", "float", "bool", "nonzero", "mask", "mask to write", "equal"],
)
def test_what_waits_is_seen(wait: Callable[[Tensor], object], said: str, device: str) -> None:
    x = torch.ones(3, device=device)
    with StaysOn(device), pytest.raises(AssertionError, match=said):
        wait(x)


def test_a_copy_from_another_device_is_seen() -> None:
    with StaysOn("meta"), pytest.raises(AssertionError, match=r"has a tensor on \{'cpu'\}"):
        torch.tensor(0.5).to("meta")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("part", ["forward", "backward"])
def test_a_wait_within_the_loop_is_seen(part: str, device: str) -> None:
    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            if part == "forward":
                x.sum().item()
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, gradient: Tensor) -> Tensor:
            if part == "backward":
                gradient.sum().item()
            return gradient

    class Waiting(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return Reads.apply(self.model(images))  # type: ignore[no-untyped-call, no-any-return]

    model, images, start, labels = on(device, 0)
    with StaysOn(device), pytest.raises(AssertionError, match="waits: aten::_local_scalar_dense"):
        make_attack(ATTACKS["PGD"]).perturb(Waiting(model), images, labels, start)
