"""Counter-based draws: a uniform number per (key, flat element index), whatever the order, thread or device.

Definition, all operations on 32-bit words modulo 2^32, with the key words k0 and k1 (`RandomKey.words`):

    x = index + k0
    x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= k1
    x ^= x >> 15;  x *= 0x735A2D97
    x ^= x >> 15;  x *= 0x31848BAB
    x ^= x >> 14
    u = float32((x >> 8) | 1) * 2^-24

`(x >> 8) | 1` is an odd number below 2^24, hence exact in float32, and so is u: the 2^23 midpoints of equal intervals
of (0, 1), never 0 or 1, with mean exactly 1/2. P(u < f) differs from f by at most 2^-24.

Why this mix. For one key it is a bijection of the index: no state repeats within 2^32 elements. k0 alone would give all
keys one sequence, shifted; k1 enters between the rounds by exclusive or, ahead of a shift that carries its high bits
down, so that a shifted sequence meets another function. Two rounds (three operations less) are too few: over 2^22
elements the chi-square of pairs (u[i], u[i + lag]) then stands hundreds of standard deviations off at lags 256, 512,
1024 and 4096, and so it does for two keys whose sequences agree but for a shift. With three rounds it stands within 4
at all lags tried (1 ... 2^31) and for all such pairs of keys, up to 2^26 elements (`tests/codecs/test_randomness.py`).

Source: xorshift-multiply hashes as found by C. Wellons' hash-prospector (the constants of the first two rounds are its
`lowbias32`, the last one is of its `triple32`). Deviation: two key words, at the entrance and after the first product.
"""

from __future__ import annotations

import numpy as np

from common.codecs.base import Float32, RandomKey
from common.errors import CodecError, refusal

MAXIMAL_ELEMENTS = 1 << 32
"""Length of a flat vector: the element index is one 32-bit word."""

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

    Raises:
        CodecError: the flat vector is too long for a 32-bit index.
    """
    if start + n > MAXIMAL_ELEMENTS:
        raise CodecError(refusal("at most 2^32 elements", "elements", start + n))
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
