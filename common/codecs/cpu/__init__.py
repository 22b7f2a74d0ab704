"""Kernels for the CPU. `warm` compiles all of them and keeps them on disk, for processes that start later.

The codecs' files say what is computed, these ones how. A kernel gets all the memory that it works with from its caller,
holds no GIL, and gives the same bytes as the reference in `tests/codecs/numpy_reference`.
"""

from __future__ import annotations

from typing import Any

from common.codecs.cpu import floats, paper, randomized, scales
from common.codecs.cpu.compile import Kernel

KERNELS: tuple[Kernel[..., Any], ...] = (
    *(randomized.encode_short, randomized.encode_long, randomized.decode_short, randomized.decode_long),
    *(paper.encode_paper_short, paper.encode_paper_long, paper.decode_paper_short, paper.decode_paper_long),
    *(floats.copy_words, floats.to_bf16, floats.to_fp16, floats.put_floats, floats.put_bf16, floats.put_fp16),
    *(floats.largest_word, floats.largest_half, scales.measure),
)


def warm() -> None:
    """Compiles all kernels, or loads those that a process before this one has compiled."""
    for kernel in KERNELS:
        kernel.ready()
