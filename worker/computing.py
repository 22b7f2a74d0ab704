"""How logits are computed in training: number format, memory layout, compilation. The model itself stays as it is."""

from __future__ import annotations

import os
import shutil
from typing import TypeGuard

import torch
from torch import Tensor, nn

from common.config import ComputeSpec, Precision
from common.errors import SpecError, refusal

_LEAST_CHANNELS = 16
"""Of a strided 1x1 convolution on the CPU, channels last: with fewer oneDNN's backward pass writes beyond its memory,
below 8 with AVX2 and below 16 with AVX-512 (oneDNN issue 6035, open; seen with torch 2.15 for 2 to 7 channels)."""


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
        SpecError: it is to be compiled, and there is nothing to compile it with; or a layer of it would corrupt memory.
    """
    if spec.compile and not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        raise SpecError(refusal("a C++ compiler (g++, clang++ or CXX)", "compute.compile", True, "none found"))
    if spec.channels_last:
        for name, module in model.named_modules():
            if _writes_beyond_its_memory(module):
                layers = f"strided 1x1 convolutions of at least {_LEAST_CHANNELS} channels"
                rule = f"{layers} with compute.channels_last on the CPU"
                raise SpecError(refusal(rule, "channels", module.in_channels, name))
    return model if spec == ComputeSpec() else Computing(model, spec)


def _writes_beyond_its_memory(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(module, nn.Conv2d)
        and module.weight.device.type == "cpu"
        and module.kernel_size == (1, 1)
        and max(int(each) for each in module.stride) > 1
        and 1 < module.in_channels < _LEAST_CHANNELS
    )
