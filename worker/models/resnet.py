"""Residual networks for small images (He et al. 2016a, section 4.2): ResNet-8 and ResNet-20."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class BasicBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))); where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


def resnet(*, blocks: int, in_channels: int, classes: int, width: int = WIDTH) -> nn.Sequential:
    """6 * blocks + 2 layers in three stages of width, 2 width and 4 width channels.

    Deviation from the source: shortcuts across stages are 1x1 convolutions (its option B, not A). ResNet-8 of width 16
    has 78,042 parameters on 10 classes, ResNet-20 272,474.
    """
    stages: list[nn.Module] = []
    channels = width
    for stage, out_channels in enumerate((width, 2 * width, 4 * width)):
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            stages.append(BasicBlock(channels, out_channels, stride))
            channels = out_channels
    return nn.Sequential(
        nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, classes),
    )
