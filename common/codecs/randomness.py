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

MAXIMAL_ELEMENTS = 1 << 32
"""Length of a flat vector: the element index is one 32-bit word."""
