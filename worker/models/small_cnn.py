"""A small convolutional network without batch norm, for 8x8 digits and images up to a few times 32x32."""

from __future__ import annotations

from torch import nn

WIDTH = 32
_MAP = 4
_HIDDEN = 64


def small_cnn(*, in_channels: int, image_size: int, classes: int, width: int = WIDTH) -> nn.Sequential:
    """conv (width) - conv (2 width) - fully connected; about 85 thousand parameters on the digits.

    Max pooling brings any image to a 4x4 map: by 2 after the first convolution where the image is at least 16 wide, by
    the rest after the second.
    """
    early = 2 if image_size >= 4 * _MAP else 1
    late = image_size // early // _MAP
    side = image_size // early // late
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(early) if early > 1 else nn.Identity(),
        nn.Conv2d(width, 2 * width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(late) if late > 1 else nn.Identity(),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, _HIDDEN),
        nn.ReLU(),
        nn.Linear(_HIDDEN, classes),
    )
