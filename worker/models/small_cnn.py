"""A small convolutional network without batch norm, for 8x8 digits and images up to a few times 32x32."""

from __future__ import annotations

from torch import nn

WIDTH = 32
_MAP = 4
"""Side of the last feature map, at least; less than twice that."""


def small_cnn(*, in_channels: int, image_size: int, classes: int, width: int = WIDTH) -> nn.Sequential:
    """Two convolutions of `width` channels, two of 2 width (the first with stride 2), one linear layer.

    75,242 parameters on the digits. Images of 16 pixels and more are halved after the first convolution, and what is
    left is pooled before the linear layer. In the manner of the small network of TRADES (Zhang et al. 2019b), with
    one linear layer instead of three.
    """
    early = 2 if image_size >= 4 * _MAP else 1
    side = (image_size // early + 1) // 2
    late = side // _MAP
    side //= late
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel_size=3, padding=1),
        nn.ReLU(),
        _pool(early),
        nn.Conv2d(width, width, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, kernel_size=3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1),
        nn.ReLU(),
        _pool(late),
        nn.Flatten(),
        nn.Linear(2 * width * side * side, classes),
    )


def _pool(factor: int) -> nn.Module:
    """Max pooling by `factor`; pooling by 1 would cost as much time as a convolution here."""
    return nn.MaxPool2d(factor) if factor > 1 else nn.Identity()
