"""Enlarging images inside a model: attacks see the images as they are, the network sees them at its own size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Enlarge(nn.Module):
    """Bilinear interpolation from one square to another, as `F.interpolate(align_corners=False)` computes it.

    Written as two matrix products, along columns and along rows: the gradient of `F.interpolate` on CUDA adds in no
    fixed order, and the sign of a sum that is not always the same decides about an attack step.
    """

    weights: Tensor

    def __init__(self, size: int, enlarged: int) -> None:
        """From `size` pixels to `enlarged`, of each side."""
        super().__init__()
        unit_rows = torch.eye(size).unsqueeze(1)
        weights = F.interpolate(unit_rows, size=enlarged, mode="linear", align_corners=False).squeeze(1)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        with torch.autocast(images_NCHW.device.type, enabled=False):  # pixels need more than 8 bits of a bfloat16
            pixels = images_NCHW.float()
            return self.weights.T @ (pixels @ self.weights)
