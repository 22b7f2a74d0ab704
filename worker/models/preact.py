"""Pre-activation residual networks (He et al. 2016b): ResNet-18 as in the paper, and Wide ResNet-28-10.

Both are the CIFAR forms: a 3x3 stem without pooling. Wide ResNet: Zagoruyko and Komodakis 2016, without dropout.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ShortcutStart


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))), with a 1x1 shortcut where shapes differ."""

    def __init__(self, in_channels: int, channels: int, stride: int, shortcut: ShortcutStart) -> None:
        super().__init__()
        self._starts_at_input = shortcut is ShortcutStart.INPUT
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self._starts_at_input else out)
        residual: Tensor = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return residual + shortcut


def _preact(
    *, stem: int, stages: Sequence[int], blocks: int, in_channels: int, classes: int, shortcut: ShortcutStart
) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_channels, stem, kernel_size=3, padding=1, bias=False)]
    channels = stem
    for stage, out_channels in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(PreActBlock(channels, out_channels, stride, shortcut))
            channels = out_channels
    head = (nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    return nn.Sequential(*layers, *head)


def preact_resnet18(*, in_channels: int, classes: int, shortcut: ShortcutStart) -> nn.Sequential:
    """The paper's "ResNet-18": 11,172,170 parameters on 10 classes."""
    widths = (64, 128, 256, 512)
    return _preact(stem=64, stages=widths, blocks=2, in_channels=in_channels, classes=classes, shortcut=shortcut)


def wide_resnet28_10(*, in_channels: int, classes: int, shortcut: ShortcutStart) -> nn.Sequential:
    """36,479,194 parameters on 10 classes."""
    widths = (160, 320, 640)
    return _preact(stem=16, stages=widths, blocks=4, in_channels=in_channels, classes=classes, shortcut=shortcut)
