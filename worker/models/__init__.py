"""Networks by name, one file per family; every model takes pixels in [0, 1] and normalizes them itself."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.config import ModelName, ModelSpec, ShortcutStart
from common.errors import SpecError, refusal
from worker.models import preact, resnet, small_cnn
from worker.models.enlarge import Enlarge
from worker.models.fixed_norm import fixed_statistics
from worker.models.normalize import Normalize
from worker.randomness import Purpose, stream_seed

__all__ = ["Normalize", "averaged_buffers", "build_model", "draw_linear"]

_SMALLEST_IMAGE = {
    ModelName.SMALL_CNN: 8,
    ModelName.RESNET8: 8,
    ModelName.RESNET20: 8,
    ModelName.PREACT_RESNET18: 16,
    ModelName.WIDE_RESNET28_10: 16,
    ModelName.RESNET50: 32,
}
_WIDTHS = {
    ModelName.SMALL_CNN: small_cnn.WIDTH,
    ModelName.RESNET8: resnet.WIDTH,
    ModelName.RESNET20: resnet.WIDTH,
}
"""Default width of the families that take one."""

_PREACT = (ModelName.PREACT_RESNET18, ModelName.WIDE_RESNET28_10)
"""The families of which it can be said where a block's shortcut starts."""

_LENDING = threading.Lock()
"""The CPU's global generator can be lent to one model at a time."""


def build_model(
    spec: ModelSpec,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    mean: Sequence[float],
    std: Sequence[float],
    seed: int,
) -> nn.Module:
    """The network that `spec` names, initialized from `seed` alone, on the CPU and in train mode.

    Args:
        spec: architecture, width, and the size to which the model enlarges its images.
        in_channels: channels of the images, 1 or 3.
        image_size: side of the square images in pixels.
        classes: K, the logits.
        mean, std: per channel, for the normalization inside.
        seed: the job's; the global random state is neither used nor changed.

    Raises:
        SpecError: a width where the architecture has none, or images that it cannot take.
    """
    input_size = image_size if spec.input_size is None else spec.input_size
    if input_size < image_size:
        rule = f"at least {image_size}, the images' own size"
        raise SpecError(refusal(rule, "model.input_size", input_size))
    _refuse_unfit(spec, in_channels=in_channels, image_size=input_size)
    width = spec.width if spec.width is not None else _WIDTHS.get(spec.name, 0)
    # layers draw their weights from the CPU's global generator: lend it to them, and seed it alone
    with _LENDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, Purpose.PARAMETERS))
        network = _network(spec, in_channels=in_channels, image_size=input_size, classes=classes, width=width)
    first: nn.Module = Normalize(mean, std)
    if input_size > image_size:
        first = nn.Sequential(Enlarge(image_size, input_size), first)
    return nn.Sequential(first, network)  # the network's names do not depend on what is before it


def draw_linear(layer: nn.Linear, seed: int, purpose: Purpose, *counters: int) -> None:
    """Initializes a layer again, in place, from a stream of its own."""
    with _LENDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed(seed, purpose, *counters))
        layer.reset_parameters()


def averaged_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that workers average each round: batch-norm statistics, float32, in a fixed order.

    Constants (non-persistent) and counters (not floating) are no statistics; statistics that are frozen stay as they
    are, and an average of equal numbers may be rounded.
    """
    averaged = model.state_dict(keep_vars=True).keys() - fixed_statistics(model)
    return {name: b for name, b in model.named_buffers() if name in averaged and b.is_floating_point()}


def _refuse_unfit(spec: ModelSpec, *, in_channels: int, image_size: int) -> None:
    if spec.width is not None and spec.name not in _WIDTHS:
        rule = f"no width but for {', '.join(_WIDTHS)}"
        raise SpecError(refusal(rule, "model.width", spec.width, f"model.name={spec.name}"))
    if spec.shortcut is not ShortcutStart.ACTIVATION and spec.name not in _PREACT:
        rule = f"no shortcut but for {', '.join(_PREACT)}"
        raise SpecError(refusal(rule, "model.shortcut", spec.shortcut, f"model.name={spec.name}"))
    smallest = _SMALLEST_IMAGE[spec.name]
    if image_size < smallest:
        rule = f"images of at least {smallest}x{smallest} pixels"
        raise SpecError(refusal(rule, "image_size", image_size, f"model.name={spec.name}"))
    if spec.name is ModelName.RESNET50 and in_channels != 3:
        raise SpecError(refusal("images of 3 channels", "in_channels", in_channels, f"model.name={spec.name}"))


def _network(spec: ModelSpec, *, in_channels: int, image_size: int, classes: int, width: int) -> nn.Module:
    match spec.name:
        case ModelName.SMALL_CNN:
            return small_cnn.small_cnn(in_channels=in_channels, image_size=image_size, classes=classes, width=width)
        case ModelName.RESNET8:
            return resnet.resnet(blocks=1, in_channels=in_channels, classes=classes, width=width)
        case ModelName.RESNET20:
            return resnet.resnet(blocks=3, in_channels=in_channels, classes=classes, width=width)
        case ModelName.PREACT_RESNET18:
            return preact.preact_resnet18(in_channels=in_channels, classes=classes, shortcut=spec.shortcut)
        case ModelName.WIDE_RESNET28_10:
            return preact.wide_resnet28_10(in_channels=in_channels, classes=classes, shortcut=spec.shortcut)
        case ModelName.RESNET50:
            # torchvision takes seconds to import and only this family needs it
            from torchvision.models import resnet50

            network: nn.Module = resnet50(weights=None, num_classes=classes)
            return network
