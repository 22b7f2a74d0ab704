"""The tensors of a synthetic gradient: those of ResNet-50, or any number of elements."""

from __future__ import annotations

from collections.abc import Iterator

from common.layout import TensorSpec

RESNET50_ELEMENTS = 25_557_032
STATE = TensorSpec(name="@metrics", shape=(7,), buffer=True)
"""What a worker tells the others each round (`worker/metrics.py`)."""
_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
_EXPANSION = 4
_LARGEST = 1 << 20


def tensors_of(elements: int | None) -> tuple[TensorSpec, ...]:
    """The tensors of a gradient of so many elements with the state tensor; ResNet-50's if None."""
    shapes = resnet50_shapes() if elements is None else _pieces(elements)
    return (*(TensorSpec(name=name, shape=shape, buffer=False) for name, shape in shapes), STATE)


def elements_of(elements: int | None) -> int:
    """The number of elements that `tensors_of` gives the gradient."""
    return RESNET50_ELEMENTS if elements is None else elements


def resnet50_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters of torchvision's ResNet-50, in its order."""
    yield from _convolution("conv1", "bn1", 64, 3, 7)
    width_in = 64
    for stage, (width, blocks) in enumerate(_STAGES, start=1):
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            yield from _convolution(f"{name}.conv1", f"{name}.bn1", width, width_in, 1)
            yield from _convolution(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            yield from _convolution(f"{name}.conv3", f"{name}.bn3", width * _EXPANSION, width, 1)
            if block == 0:
                yield from _convolution(f"{name}.downsample.0", f"{name}.downsample.1", width * _EXPANSION, width_in, 1)
            width_in = width * _EXPANSION
    yield "fc.weight", (1000, width_in)
    yield "fc.bias", (1000,)


def _convolution(
    convolution: str, norm: str, width: int, width_in: int, side: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{convolution}.weight", (width, width_in, side, side)
    yield f"{norm}.weight", (width,)
    yield f"{norm}.bias", (width,)


def _pieces(elements: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for number, start in enumerate(range(0, elements, _LARGEST)):
        yield f"synthetic.{number}", (min(_LARGEST, elements - start),)
