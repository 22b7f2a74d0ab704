"""Choosing the nearest of at most eight centroids and their negatives, and looking them up again.

The field of a centroid c[m] is m, that of its negative -m - 1: two's complement numbers of 1 to 4 bits. The last three
bits of a centroid are its number m, so that one choice gives both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper
from common.codecs.cpu.packing import Bytes

Words = NDArray[np.int32]

_NUMBER = np.int32(7)
_SIGN_BIT = np.int32(31)
_1, _2, _3, _4, _5, _6, _7 = (np.uintp(j) for j in range(1, 8))


@helper
def choose(values: Float32, sigma: np.float32, bits: int, centroids: Float32, bounds: Float32, chosen: Float32) -> None:
    """The centroid of each magnitude.

    Args:
        values: float32 of shape (n,).
        sigma: unit of the bounds.
        bits: of a field, 1 to 4.
        centroids: 8, rising; only the first 2^(bits - 1) are used.
        bounds: 7; c[m] is chosen for sigma * bounds[m - 1] <= |x| < sigma * bounds[m]. Infinite where not used.
        chosen: written; float32 of shape (n,).
    """
    if bits < 4:
        choose_of_four(values, sigma, centroids, bounds, chosen)
    else:
        choose_of_eight(values, sigma, centroids, bounds, chosen)


@helper
def choose_of_four(values: Float32, sigma: np.float32, c: Float32, bounds: Float32, chosen: Float32) -> None:
    """`choose` where there are at most four."""
    t1, t2, t3 = np.float32(sigma * bounds[0]), np.float32(sigma * bounds[1]), np.float32(sigma * bounds[2])
    c0, c1, c2, c3 = c[0], c[1], c[2], c[3]
    for i in range(values.size):
        a = np.float32(abs(values[i]))
        q = c1 if a >= t1 else c0
        q = c2 if a >= t2 else q
        chosen[i] = c3 if a >= t3 else q


@helper
def choose_of_eight(values: Float32, sigma: np.float32, c: Float32, bounds: Float32, chosen: Float32) -> None:
    """`choose` where there are eight."""
    t1, t2, t3 = np.float32(sigma * bounds[0]), np.float32(sigma * bounds[1]), np.float32(sigma * bounds[2])
    t4, t5, t6 = np.float32(sigma * bounds[3]), np.float32(sigma * bounds[4]), np.float32(sigma * bounds[5])
    t7 = np.float32(sigma * bounds[6])
    c0, c1, c2, c3, c4, c5, c6, c7 = c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]
    for i in range(values.size):
        a = np.float32(abs(values[i]))
        q = c1 if a >= t1 else c0
        q = c2 if a >= t2 else q
        q = c3 if a >= t3 else q
        q = c4 if a >= t4 else q
        q = c5 if a >= t5 else q
        q = c6 if a >= t6 else q
        chosen[i] = c7 if a >= t7 else q


@helper
def fields_of(words: Words, chosen: Words, fields: NDArray[np.int8]) -> None:
    """Fields of values with these centroids; both as words."""
    for i in range(words.size):
        fields[i] = np.int8((chosen[i] & _NUMBER) ^ (words[i] >> _SIGN_BIT))


@helper
def look_up(stream: Bytes, bits: int, table: Float32, out: Float32) -> None:
    """Centroids of packed fields.

    Args:
        stream: the fields of a whole number of bytes, and of three bytes if `bits` is 3.
        bits: of a field.
        table: the centroids of every possible byte, or of every six bits if `bits` is 3.
        out: written; float32, one per field.
    """
    size = np.uintp(stream.size)
    if bits == 1:
        for i in range(size):
            copy_four(table, np.uintp(stream[i]) << _3, out, i << _3)
            copy_four(table, np.uintp(stream[i]) << _3 | _4, out, i << _3 | _4)
    elif bits == 2:
        for i in range(size):
            copy_four(table, np.uintp(stream[i]) << _2, out, i << _2)
    elif bits == 4:
        for i in range(size):
            copy_two(table, np.uintp(stream[i]) << _1, out, i << _1)
    else:
        for i in range(size // _3):
            at, to = i * _3, i << _3
            word = np.uintp(stream[at]) | np.uintp(stream[at + _1]) << (_4 + _4)
            word |= np.uintp(stream[at + _2]) << (_4 << _2)
            for k in range(4):
                copy_two(table, (word >> np.uintp(6 * k) & np.uintp(63)) << _1, out, to | np.uintp(2 * k))


@helper
def copy_two(table: Float32, row: np.uintp, out: Float32, to: np.uintp) -> None:
    """out[to : to + 2] = table[row : row + 2]."""
    a, b = table[row], table[row | _1]
    out[to], out[to | _1] = a, b


@helper
def copy_four(table: Float32, row: np.uintp, out: Float32, to: np.uintp) -> None:
    """out[to : to + 4] = table[row : row + 4]."""
    a, b, c, d = table[row], table[row | _1], table[row | _2], table[row | _3]
    out[to], out[to | _1], out[to | _2], out[to | _3] = a, b, c, d
