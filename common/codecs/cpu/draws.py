"""The draws of `common.codecs.randomness`, one element at a time."""

from __future__ import annotations

import numpy as np

from common.codecs.cpu.compile import helper


@helper
def draw(x: np.uint32, second_word: np.uint32) -> np.int32:
    """The draw of one element as a multiple of 2^-24.

    Args:
        x: its flat index plus the key's first word, modulo 2^32.
        second_word: of the key.

    Returns:
        An odd number below 2^24.
    """
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x21F0AAAD))
    x = np.uint32(x ^ second_word)
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x735A2D97))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(0x31848BAB))
    x = np.uint32(x ^ (x >> np.uint32(14)))
    return np.int32(np.uint32(x >> np.uint32(8)) | np.uint32(1))
