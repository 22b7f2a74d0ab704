"""Number format, memory layout and compilation change how logits are computed, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from common.config import AttackSpec, ComputeSpec, ModelName, ModelSpec, ObjectiveSpec, Precision
from common.errors import SpecError
from worker.attacks import make_attack
from worker.computing import Computing, computing
from worker.models import build_model
from worker.objectives import local_cost
from worker.optimizers import FlatParameters

ATTACK = make_attack(AttackSpec(steps=3, epsilon=0.1))
COST = ObjectiveSpec(clean_weight=1.0)


def resnet8(width: int = 16) -> nn.Module:
    spec = ModelSpec(name=ModelName.RESNET8, width=width)
    model = build_model(spec, in_channels=3, image_size=16, classes=5, mean=(0.4,) * 3, std=(0.2,) * 3, seed=3)
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(16, 3, 16, 16, generator=generator), torch.randint(5, (16,), generator=generator)


def gradient(model: nn.Module, spec: ComputeSpec) -> Tensor:
    """The flat gradient of one round, at perturbed images that do not depend on `spec`."""
    return _cost_gradient(model, computing(spec, model))


def test_the_default_is_the_very_model() -> None:
    model = resnet8()
    assert computing(ComputeSpec(), model) is model


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SpecError, match=r"expected a C\+\+ compiler .*, got compute\.compile=True"):
        computing(ComputeSpec(compile=True), resnet8())


@pytest.mark.parametrize("width", [2, 15])
def test_a_layer_in_which_channels_last_corrupts_memory_is_refused(width: int) -> None:
    rule = r"expected strided 1x1 convolutions of at least 16 channels with compute\.channels_last on the CPU"
    with pytest.raises(SpecError, match=rf"{rule}, got channels={width} \(.*shortcut"):
        computing(ComputeSpec(channels_last=True), resnet8(width))
    assert computing(ComputeSpec(), resnet8(width))


def test_channels_last_gives_the_same_gradient_to_rounding() -> None:
    plain = gradient(resnet8(), ComputeSpec())
    other = gradient(resnet8(), ComputeSpec(channels_last=True))
    assert torch.allclose(plain, other, rtol=1e-3, atol=1e-5)


def test_the_network_sees_images_in_the_layout_that_was_asked_for() -> None:
    seen: list[bool] = []

    class Probe(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.is_contiguous(memory_format=torch.channels_last))
            return images.flatten(1)

    images, _ = batch()
    Computing(Probe(), ComputeSpec(channels_last=True))(images)
    Computing(Probe(), ComputeSpec(precision=Precision.BFLOAT16))(images)
    assert seen == [True, False]


def test_bfloat16_computes_products_in_bfloat16_and_hands_out_float32() -> None:
    layer = nn.Linear(48, 7)
    images = torch.rand(4, 3, 4, 4)
    model = nn.Sequential(nn.Flatten(), layer)
    logits = computing(ComputeSpec(precision=Precision.BFLOAT16), model)(images)
    by_hand = images.flatten(1).bfloat16() @ layer.weight.bfloat16().T + layer.bias.bfloat16()
    assert logits.dtype is torch.float32
    assert torch.allclose(logits, by_hand.float(), atol=2**-7)
    assert not torch.equal(logits, model(images))


def test_bfloat16_gives_float32_gradients_near_those_of_float32() -> None:
    plain = gradient(resnet8(), ComputeSpec())
    other = gradient(resnet8(), ComputeSpec(precision=Precision.BFLOAT16))
    cosine = torch.nn.functional.cosine_similarity(plain, other, dim=0).item()
    assert other.dtype is torch.float32
    assert 0.98 < cosine < 1 - 1e-6


@pytest.mark.parametrize("spec", [ComputeSpec(precision=Precision.BFLOAT16), ComputeSpec(channels_last=True)])
def test_modes_and_statistics_are_those_of_the_model(spec: ComputeSpec) -> None:
    model = resnet8()
    before = copy.deepcopy(dict(model.named_buffers()))
    images, labels = batch()
    ATTACK(computing(spec, model), images, labels, torch.Generator().manual_seed(2))
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())


def test_a_compiled_network_gives_the_perturbation_and_the_gradient_of_the_plain_one() -> None:
    def small() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5)).train()

    images, labels = batch()
    plain, compiled = small(), small()
    computed = computing(ComputeSpec(compile=True), compiled)
    by_plain = ATTACK(plain, images, labels, torch.Generator().manual_seed(2))
    by_compiled = ATTACK(computed, images, labels, torch.Generator().manual_seed(2))
    same = (by_plain == by_compiled).float().mean().item()
    assert same > 0.99  # the sign of a gradient next to zero may differ
    assert torch.allclose(gradient(plain, ComputeSpec()), _cost_gradient(compiled, computed), rtol=1e-3, atol=1e-5)


def _cost_gradient(model: nn.Module, computed: nn.Module) -> Tensor:
    images, labels = batch()
    flat = FlatParameters(model)
    local_cost(COST, computed, images, (images + 0.05).clamp(0, 1), labels).loss.backward()
    return flat.gradient
