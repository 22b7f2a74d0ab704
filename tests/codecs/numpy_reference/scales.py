"""Block scales and level factors; the definition is that of `common.codecs.scales`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs import Float32
from common.codecs.blocks import Blocks
from common.config import ScaleNorm
from tests.codecs.numpy_reference.blocks import runs

Float64 = NDArray[np.float64]

SEGMENT = 4096
LANES = 64

_SEGMENTS_AT_ONCE = 16
_TINY, _HUGE = np.float32(2.0**-64), np.float32(2.0**64)


def block_scales(values: Float32, start: int, blocks: Blocks, norm: ScaleNorm) -> Float32:
    """Scales of the blocks of the stretch [start, start + n), which cuts no block."""
    scales = np.empty(len(blocks.numbers(start, len(values))), np.float32)
    measure = _largest if norm is ScaleNorm.LINF else _euclidean
    for run in runs(blocks, start, len(values)):
        scales[run.block : run.block + run.rows] = measure(run.of(values))
    return scales


def level_factors(scales: Float32, levels: int) -> tuple[Float32, Float32]:
    """The factors `first` and `second` of each scale."""
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
    """Sum of squares of each row in the order defined; float32 (k, n) to float64 (k,)."""
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
