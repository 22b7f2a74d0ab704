"""Kernels for the CPU. `warm` compiles all of them and keeps them on disk, for processes that start later.

The codecs' files say what is computed, these ones how. A kernel gets all the memory that it works with from its caller,
holds no GIL, and gives the same bytes as the reference in `tests/codecs/numpy_reference`.
"""

from __future__ import annotations

from typing import Any

from common.codecs.cpu import feedback, floats, paper, randomized, rotated, scales, shared, sign, topk
from common.codecs.cpu.compile import Kernel

_MODULES = (feedback, floats, paper, randomized, rotated, scales, shared, sign, topk)

KERNELS: tuple[Kernel[..., Any], ...] = tuple(
    value for module in _MODULES for value in vars(module).values() if isinstance(value, Kernel)
)
"""All of them; a test looks for kernels in modules that are missing here."""


def warm() -> None:
    """Compiles all kernels, or loads those that a process before this one has compiled."""
    for kernel in KERNELS:
        kernel.ready()
