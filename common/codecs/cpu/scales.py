"""Scales and factors of `common.codecs.scales`, one block at a time, and where the blocks of a bucket end."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper, kernel

LINF, L2, MEASURED = 0, 1, 2
"""What an encoder does about a scale: takes the largest magnitude or the l2 norm, or compares with the one measured."""

SEGMENT = 4096
LANES = 64

BLOCKS = ("int64", "const int64[]", "int64")
"""Types of the arguments that say where blocks end, see `block_end`."""

_MAGNITUDE = np.int32(0x7FFFFFFF)
_INFINITE = np.int32(0x7F800000)
_ZERO, _ONE = np.float32(0), np.float32(1)
_TINY, _HUGE = np.float32(2.0**-64), np.float32(2.0**64)
_UP = np.float32(np.inf)


@kernel("int64", "const float32[]", "int64", *BLOCKS, "int64", "float32[]", "float64[]")
def measure(
    values: Float32,
    start: int,
    length: int,
    edges: NDArray[np.int64],
    first_block: int,
    norm: int,
    scales: Float32,
    room: NDArray[np.float64],
) -> int:
    """Scales of the blocks of a bucket.

    Args:
        values: float32 of shape (n,), whole blocks.
        start: flat index of values[0].
        length, edges, first_block: see `block_end`.
        norm: LINF or L2.
        scales: written; one per block.
        room: see `room_for_sums`.

    Returns:
        The first block with a value or scale that is not finite, counted from 0; -1 if there is none.
    """
    words, scale_words = values.view(np.int32), scales.view(np.int32)
    begin = 0
    for k in range(scales.size):
        end = block_end(k, start, values.size, length, edges, first_block)
        if not find_scale(values[begin:end], words[begin:end], norm, scales[k:], scale_words[k:], room):
            return k
        begin = end
    return -1


@helper
def block_end(k: int, start: int, n: int, length: int, edges: NDArray[np.int64], first_block: int) -> int:
    """Where the k-th block of the bucket [start, start + n) ends, counted from `start`.

    Blocks have `length` elements each; if that is 0, the block of number b ends at edges[b + 1], and the first one that
    the bucket overlaps has the number `first_block`.
    """
    if length > 0:
        return min((k + 1) * length, n)
    return int(min(edges[first_block + k + 1] - start, n))


@helper
def find_scale(
    values: Float32,
    words: NDArray[np.int32],
    norm: int,
    scale: Float32,
    scale_word: NDArray[np.int32],
    room: NDArray[np.float64],
) -> bool:
    """Sets the scale of a block, or compares it with what was measured.

    Args:
        values: of the block.
        words: the same memory as integers.
        norm: LINF, L2 or MEASURED.
        scale: its first element is the block's scale.
        scale_word: the same memory as integers.
        room: see `room_for_sums`.

    Returns:
        False if a value or the scale is not finite, or a value exceeds the measured scale.
    """
    if norm == MEASURED:
        return within(words, scale_word[0])
    if norm == L2:
        scale[0] = euclidean(values, room)
    else:
        scale_word[0] = largest_word(words)
    return bool(scale_word[0] < _INFINITE)


@helper
def within(words: NDArray[np.int32], scale_word: np.int32) -> bool:
    """True if a scale is finite and no value exceeds it; both are given as integers."""
    return bool(largest_word(words) <= scale_word < _INFINITE)


@helper
def largest_word(words: NDArray[np.int32]) -> np.int32:
    """The largest magnitude as an integer: they rise together, and those of infinity and NaN are the largest."""
    largest = np.int32(0)
    for i in range(words.size):
        largest = max(largest, np.int32(words[i] & _MAGNITUDE))
    return largest


@helper
def euclidean(values: Float32, room: NDArray[np.float64]) -> np.float32:
    """The l2 norm, in float64 and rounded up to float32."""
    norm = math.sqrt(sum_of_squares(values, room))
    scale = np.float32(norm)
    if np.float64(scale) < norm:
        return np.float32(np.nextafter(scale, _UP))
    return scale


def room_for_sums(longest: int) -> NDArray[np.float64]:
    """Memory for the sums of `sum_of_squares` over at most so many elements; they need not be set."""
    return np.empty(LANES + max(0, 2 * (-(-longest // SEGMENT)) - 2), np.float64)


@helper
def sum_of_squares(values: Float32, room: NDArray[np.float64]) -> float:
    """In the defined order."""
    lanes = room[:LANES]
    if values.size <= SEGMENT:
        return segment_sum(values, lanes)
    segments = (values.size + SEGMENT - 1) // SEGMENT
    width = 1
    while width < segments:
        width *= 2
    sums = room[LANES : LANES + width]
    for k in range(segments):
        sums[k] = segment_sum(values[k * SEGMENT : (k + 1) * SEGMENT], lanes)
    for k in range(segments, width):
        sums[k] = 0.0
    return fold(sums, width)


@helper
def segment_sum(values: Float32, lanes: NDArray[np.float64]) -> float:
    """Sum of the squares of at most SEGMENT elements in `lanes`; short segments need fewer of these."""
    width = LANES
    while width > 1 and width // 2 >= values.size:
        width //= 2
    for j in range(width):
        lanes[j] = 0.0
    whole = values.size // LANES * LANES
    for row in range(0, whole, LANES):
        add_squares(values[row : row + LANES], lanes)
    add_squares(values[whole:], lanes)
    return fold(lanes, width)


@helper
def add_squares(values: Float32, lanes: NDArray[np.float64]) -> None:
    """Adds the square of each value to its lane; squares are exact."""
    for j in range(values.size):
        lanes[j] += np.float64(values[j]) * np.float64(values[j])


@helper
def fold(sums: NDArray[np.float64], width: int) -> float:
    """Adds the first `width` sums, a power of two of them, in halves; overwrites them."""
    while width > 1:
        width //= 2
        for j in range(width):
            sums[j] += sums[width + j]
    return sums[0]  # type: ignore[no-any-return]


@helper
def level_factors(scale: np.float32, top: np.float32) -> tuple[np.float32, np.float32]:
    """The two factors of `common.codecs.scales` for a block with this scale and highest level."""
    if not scale > _ZERO:
        return _ONE, _ZERO
    first = _ONE
    if scale < _TINY:
        first = _HUGE
    elif scale > _HUGE:
        first = _TINY
    shifted = np.float32(scale * first)
    second = np.float32(top / shifted)
    if np.float32(shifted * second) < top:
        second = np.nextafter(second, _UP)
    return first, second
