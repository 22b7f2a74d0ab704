"""How logits are computed in training: number format, memory layout, compilation. The model itself stays as it is."""

from __future__ import annotations

import os
import shutil

import torch
from torch import Tensor, nn

from common.config import ComputeSpec, Precision
from common.errors import SpecError, refusal


class Computing(nn.Module):
    """A model whose forward pass is computed otherwise; parameters, buffers and modes are the model's own.

    With bfloat16, convolutions and products of matrices, forward and backward, round their inputs to it (autocast);
    sums, batch norm's statistics, losses, parameters and their gradients stay float32. The backward pass runs outside
    of autocast, in the formats that the forward pass chose.
    """

    def __init__(self, model: nn.Module, spec: ComputeSpec) -> None:
        super().__init__()
        self.model = model
        self._spec = spec
        self._forward = torch.compile(model) if spec.compile else model

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits, float32 [N, K], of images float32 [N, C, H, W]."""
        if self._spec.channels_last:
            images_NCHW = images_NCHW.contiguous(memory_format=torch.channels_last)
        narrow = self._spec.precision is Precision.BFLOAT16
        with torch.autocast(images_NCHW.device.type, dtype=torch.bfloat16, enabled=narrow):
            logits: Tensor = self._forward(images_NCHW)
        return logits.float()


def computing(spec: ComputeSpec, model: nn.Module) -> nn.Module:
    """The model as training calls it; the very model where `spec` changes nothing.

    Raises:
        SpecError: it is to be compiled, and there is nothing to compile it with.
    """
    if spec.compile and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        raise SpecError(refusal("a C++ compiler (g++, clang++ or CXX)", "compute.compile", True, "none found"))
    return model if spec == ComputeSpec() else Computing(model, spec)
