"""Draws of a stretch of elements; the definition is that of `common.codecs.randomness`."""

from __future__ import annotations

import numpy as np

from common.codecs import Float32, RandomKey
from common.codecs.randomness import MAXIMAL_ELEMENTS

_ROUNDS = ((16, 0x21F0AAAD), (15, 0x735A2D97), (15, 0x31848BAB))
_LAST_SHIFT = 14
_UNIT = np.float32(2.0**-24)


def uniforms(key: RandomKey, start: int, n: int) -> Float32:
    """Draws of the elements [start, start + n).

    Args:
        key: names the encoding.
        start: flat index of the first element.
        n: how many; start + n <= 2^32.

    Returns:
        float32 of shape (n,), odd multiples of 2^-24 in (0, 1).
    """
    first_word, second_word = key.words()
    x = np.arange(n, dtype=np.uint32)
    x += np.uint32((start + first_word) % MAXIMAL_ELEMENTS)
    shifted = np.empty_like(x)
    for number, (shift, factor) in enumerate(_ROUNDS):
        x ^= np.right_shift(x, np.uint32(shift), out=shifted)
        x *= np.uint32(factor)
        if number == 0:
            x ^= np.uint32(second_word)
    x ^= np.right_shift(x, np.uint32(_LAST_SHIFT), out=shifted)
    x >>= np.uint32(8)
    x |= np.uint32(1)
    draws = x.view(np.int32).astype(np.float32)
    draws *= _UNIT
    return draws
