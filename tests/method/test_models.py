"""The networks: their sizes, their initialization, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.config import ModelName, ModelSpec, ShortcutStart
from common.errors import SpecError
from worker.models import averaged_buffers, build_model
from worker.models.normalize import Normalize

SMALL = (ModelName.SMALL_CNN, ModelName.RESNET8, ModelName.RESNET20)


def build(
    name: ModelName,
    *,
    width: int | None = None,
    in_channels: int = 3,
    image_size: int = 32,
    classes: int = 10,
    seed: int = 0,
    shortcut: ShortcutStart = ShortcutStart.ACTIVATION,
) -> nn.Module:
    constants = (0.5,) * in_channels
    return build_model(
        ModelSpec(name=name, width=width, shortcut=shortcut),
        in_channels=in_channels,
        image_size=image_size,
        classes=classes,
        mean=constants,
        std=constants,
        seed=seed,
    )


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        (ModelName.RESNET8, 10, 78_042),
        (ModelName.RESNET20, 10, 272_474),
        (ModelName.PREACT_RESNET18, 10, 11_172_170),
        (ModelName.WIDE_RESNET28_10, 10, 36_479_194),
        (ModelName.RESNET50, 1000, 25_557_032),
    ],
)
def test_networks_have_the_published_number_of_parameters(name: ModelName, classes: int, count: int) -> None:
    with torch.device("meta"):  # counts without drawing a single weight
        assert parameter_count(build(name, classes=classes)) == count


def test_small_cnn_has_75242_parameters_on_the_digits_and_no_batch_norm() -> None:
    model = build(ModelName.SMALL_CNN, in_channels=1, image_size=8)
    assert parameter_count(model) == 75_242
    assert averaged_buffers(model) == {}


@pytest.mark.parametrize("image_size", [8, 9, 15, 16, 17, 31, 32, 64, 100])
def test_small_cnn_takes_images_of_any_size_from_8(image_size: int) -> None:
    model = build(ModelName.SMALL_CNN, image_size=image_size, classes=7)
    assert model(torch.rand(2, 3, image_size, image_size)).shape == (2, 7)
    assert parameter_count(model) < 120_000


@pytest.mark.parametrize(
    ("name", "image_size", "in_channels"),
    [
        *((name, 8, 1) for name in SMALL),
        (ModelName.PREACT_RESNET18, 16, 1),
        (ModelName.WIDE_RESNET28_10, 16, 1),
        (ModelName.RESNET50, 32, 3),
    ],
)
def test_smallest_images_pass_through_and_smaller_ones_are_refused(
    name: ModelName, image_size: int, in_channels: int
) -> None:
    model = build(name, image_size=image_size, in_channels=in_channels, classes=5).eval()
    with torch.no_grad():
        assert model(torch.rand(1, in_channels, image_size, image_size)).shape == (1, 5)
    with pytest.raises(SpecError, match=rf"expected images of at least .* got image_size={image_size - 1} \(m"):
        build(name, image_size=image_size - 1, in_channels=in_channels)


@pytest.mark.parametrize("name", SMALL)
def test_width_scales_the_network(name: ModelName) -> None:
    assert parameter_count(build(name, width=8)) < parameter_count(build(name)) < parameter_count(build(name, width=48))


@pytest.mark.parametrize("name", [name for name in ModelName if name not in SMALL])
def test_width_is_refused_where_the_architecture_has_none(name: ModelName) -> None:
    with pytest.raises(SpecError, match=rf"expected no width but for .*, got model.width=8 \(model.name={name}\)"):
        build(name, width=8)


def test_where_shortcuts_start_is_refused_where_the_architecture_has_one_answer() -> None:
    reason = r"expected no shortcut but for preact_resnet18, wide_resnet28_10, got model.shortcut=input"
    with pytest.raises(SpecError, match=reason):
        build(ModelName.RESNET20, shortcut=ShortcutStart.INPUT)


def test_resnet50_refuses_images_without_colour() -> None:
    with pytest.raises(SpecError, match=r"expected images of 3 channels, got in_channels=1"):
        build(ModelName.RESNET50, in_channels=1, image_size=64)


@pytest.mark.parametrize("name", SMALL)
def test_weights_depend_on_the_seed_alone_and_the_global_random_state_is_left_alone(name: ModelName) -> None:
    torch.manual_seed(1)
    first = build(name)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second, other = build(name), build(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_input_is_normalized_inside_by_constants_that_are_neither_averaged_nor_saved() -> None:
    normalize = Normalize((0.5, 0.25), (0.5, 0.125))
    normalized = normalize(torch.tensor([0.75, 0.5]).view(1, 2, 1, 1))
    assert normalized.flatten().tolist() == [0.5, 2.0]
    model = build(ModelName.RESNET8)
    assert isinstance(next(model.children()), Normalize)
    assert not any(name.startswith("0.") for name in [*model.state_dict(), *averaged_buffers(model)])


def test_averaged_buffers_are_the_live_batch_norm_statistics() -> None:
    model = build(ModelName.RESNET8)
    buffers = averaged_buffers(model)
    assert len(buffers) == 2 * sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert {name.rpartition(".")[2] for name in buffers} == {"running_mean", "running_var"}
    model(torch.rand(4, 3, 32, 32))
    assert all(buffer.any() for buffer in buffers.values())


@pytest.mark.parametrize("name", [ModelName.RESNET8, ModelName.PREACT_RESNET18])
def test_every_parameter_gets_a_gradient(name: ModelName) -> None:
    model = build(name, image_size=16)
    model(torch.rand(2, 3, 16, 16)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []
