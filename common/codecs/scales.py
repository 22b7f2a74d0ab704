"""Block scales: norms in a defined order of operations, and the factors that map a block onto quantizer levels.

Squares are summed in float64 (where the square of a float32 is exact, so that fused multiply-add changes nothing) in
this order, which a vector unit and a GPU can both follow:

    segments    the block is cut from its start into segments of 4096 elements, the last one zero-padded
    lanes       lane j of 64 adds the squares of the segment's elements j, 64 + j, 128 + j, ... one after the other
    fold        the 64 lanes are added in halves: 32 + 32, 16 + 16, ..., 1 + 1
    total       the segments' sums, zero-padded to a power of two, are added in halves likewise

Adding zero is exact, so short blocks need fewer lanes and no padding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.blocks import Blocks
from common.codecs.checks import require_finite
from common.config import ScaleNorm
from common.errors import CodecError, refusal

Float64 = NDArray[np.float64]

SEGMENT = 4096
LANES = 64

_SEGMENTS_AT_ONCE = 16
_TINY, _HUGE = np.float32(2.0**-64), np.float32(2.0**64)


def block_scales(values: Float32, start: int, blocks: Blocks, norm: ScaleNorm) -> Float32:
    """Scales of the blocks of a stretch of the vector.

    Args:
        values: float32 of shape (n,), the elements [start, start + n); its ends cut no block.
        start: flat index of values[0].
        blocks: where blocks begin and end.
        norm: `linf`: the largest magnitude. `l2`: the square root, in float64, of the sum of squares, rounded up to
            float32 (so that no magnitude exceeds its block's scale, and at most one comes near it).

    Returns:
        float32, one per block, never negative.

    Raises:
        CodecError: a value is NaN or infinite, or the l2 norm exceeds float32.
    """
    scales = np.empty(len(blocks.numbers(start, len(values))), np.float32)
    measure = _largest if norm is ScaleNorm.LINF else _euclidean
    for run in blocks.runs(start, len(values)):
        scales[run.block : run.block + run.rows] = measure(run.of(values))
    if not np.isfinite(scales).all():
        require_finite(values, start, "gradient")
        raise CodecError(refusal("an l2 norm within float32", "scale", "inf", f"blocks from element {start}"))
    return scales


def level_factors(scales: Float32, levels: int) -> tuple[Float32, Float32]:
    """Factors that carry a magnitude to its level, y = (|x| * first) * second, without overflow or denormal factors.

    `first` is a power of two: 2^64 for scales below 2^-64, 2^-64 for those above 2^64, else 1. `second` is
    levels / (scale * first) rounded to float32; if then (scale * first) * second, in float32, is still less than
    `levels`, the next larger float32: the magnitude that equals its scale has to reach the highest level. A zero scale
    has 0.

    Args:
        scales: float32, not negative, finite.
        levels: s, levels of a magnitude equal to the scale.

    Returns:
        Two float32 arrays of the shape of `scales`.
    """
    top = np.float32(levels)
    first = np.where(scales < _TINY, _HUGE, np.where(scales > _HUGE, _TINY, np.float32(1)))
    shifted = scales * first
    second = np.divide(top, shifted, out=np.zeros_like(scales), where=scales > 0)
    falls_short = shifted * second < top
    return first, np.where(falls_short & (scales > 0), np.nextafter(second, np.float32(np.inf)), second)


def _largest(blocks: Float32) -> Float32:
    """max|x| of each row; NaN where the row has one."""
    largest: Float32 = np.abs(np.maximum(blocks.max(axis=1), -blocks.min(axis=1)))
    return largest


def _euclidean(blocks: Float32) -> Float32:
    """l2 norm of each row, rounded up to float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(sums_of_squares(blocks))
        scales = norms.astype(np.float32)
        return np.where(scales < norms, np.nextafter(scales, np.float32(np.inf)), scales)


def sums_of_squares(blocks: Float32) -> Float64:
    """Sum of squares of each row in the order that is defined on top; float32 (k, n) to float64 (k,)."""
    rows, length = blocks.shape
    if length <= SEGMENT:
        at_once = max(1, _SEGMENTS_AT_ONCE * SEGMENT // length)
        parts = [_segment_sums(blocks[row : row + at_once]) for row in range(0, rows, at_once)]
        return np.concatenate(parts)
    return np.array([_long_sum(row) for row in blocks])


def _long_sum(values: Float32) -> np.float64:
    whole = len(values) // SEGMENT * SEGMENT
    sums = sums_of_squares(values[:whole].reshape(-1, SEGMENT))
    if whole < len(values):
        sums = np.concatenate([sums, sums_of_squares(values[None, whole:])])
    total: np.float64 = _fold(sums[None])[0]
    return total


def _segment_sums(segments: Float32) -> Float64:
    """Sum of squares of rows of at most SEGMENT elements."""
    rows, length = segments.shape
    lanes = min(LANES, 1 << (length - 1).bit_length())
    steps = -(-length // lanes)
    squares = np.zeros((rows, steps * lanes))
    squares[:, :length] = segments
    np.square(squares, out=squares)
    by_step = squares.reshape(rows, steps, lanes)
    sums = by_step[:, 0].copy()
    for step in range(1, steps):
        sums += by_step[:, step]
    return _fold(sums)


def _fold(sums: Float64) -> Float64:
    """Adds each row in halves; float64 (k, m) to (k,)."""
    rows, width = sums.shape
    full = 1 << (width - 1).bit_length()
    if width < full:
        sums = np.concatenate([sums, np.zeros((rows, full - width))], axis=1)
    while full > 1:
        full //= 2
        sums = sums[:, :full] + sums[:, full:]
    return sums[:, 0]
