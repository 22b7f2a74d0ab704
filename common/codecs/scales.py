"""Block scales: norms in a defined order of operations, and the factors that map a block onto quantizer levels.

Squares are summed in float64 (where the square of a float32 is exact, so that fused multiply-add changes nothing) in
this order, which a vector unit and a GPU can both follow:

    segments    the block is cut from its start into segments of 4096 elements, the last one zero-padded
    lanes       lane j of 64 adds the squares of the segment's elements j, 64 + j, 128 + j, ... one after the other
    fold        the 64 lanes are added in halves: 32 + 32, 16 + 16, ..., 1 + 1
    total       the segments' sums, zero-padded to a power of two, are added in halves likewise

Adding zero is exact, so short blocks need fewer lanes and no padding. An `l2` scale is the square root of the sum, in
float64, rounded up to float32, so that no magnitude exceeds its block's scale, and at most one comes near it. An `linf`
scale is the largest magnitude.

Two factors carry a magnitude to its level, y = (|x| * first) * second, without overflow or denormal factors. `first` is
a power of two: 2^64 for scales below 2^-64, 2^-64 for those above 2^64, else 1. `second` is levels / (scale * first)
rounded to float32; if then (scale * first) * second, in float32, is still less than `levels`, the next larger float32:
the magnitude that equals its scale has to reach the highest level. A zero scale has the factor 0.
"""

from __future__ import annotations

import numpy as np

from common.codecs.base import BlockScales, Float32
from common.codecs.blocks import Blocks, EdgedBlocks
from common.codecs.checks import require_finite, require_vector
from common.codecs.cpu import scales as kernels
from common.config import ScaleNorm
from common.errors import CodecError, refusal

NORMS = {ScaleNorm.LINF: kernels.LINF, ScaleNorm.L2: kernels.L2}


def block_scales(values: Float32, start: int, blocks: Blocks, norm: ScaleNorm) -> Float32:
    """Scales of the blocks of a stretch of the vector.

    Args:
        values: float32 of shape (n,), the elements [start, start + n); its ends cut no block.
        start: flat index of values[0].
        blocks: where blocks begin and end.
        norm: `linf` or `l2`.

    Returns:
        float32, one per block, never negative.

    Raises:
        CodecError: a value is NaN or infinite, or the l2 norm exceeds float32.
    """
    n = len(values)
    scales = np.empty(len(blocks.numbers(start, n)), np.float32)
    room = kernels.room_for_sums(blocks.longest(n))
    if kernels.measure(values, start, *blocks.bounds(start), NORMS[norm], scales, room) >= 0:
        raise scale_refusal(values, start)
    return scales


def scale_refusal(values: Float32, start: int) -> CodecError:
    """Why a bucket has a scale that is not finite: one of its values is not, or an l2 norm exceeds float32."""
    try:
        require_finite(values, start, "gradient")
    except CodecError as error:
        return error
    return CodecError(refusal("an l2 norm within float32", "scale", "inf", f"blocks from element {start}"))


def measured_scales(values: Float32, start: int, blocks: EdgedBlocks, norm: ScaleNorm) -> BlockScales:
    """`Codec.measure`: the scales of a stretch of whole blocks.

    Raises:
        CodecError: the stretch cuts a block, a value is NaN or infinite, or the l2 norm exceeds float32.
    """
    require_vector(values)
    first, stretch = blocks.stretch(start, len(values))
    return BlockScales(first_block=first, values=block_scales(values, start, stretch, norm))


def bucket_scales(numbers: range, start: int, measured: BlockScales | None) -> Float32:
    """The measured scales of the blocks that a bucket overlaps, copied.

    Args:
        numbers: of these blocks.
        start: flat index of the bucket, for the message.
        measured: from `Codec.measure`.

    Raises:
        CodecError: they are missing.
    """
    if measured is None:
        raise CodecError(refusal("scales measured ahead", "measured", None, f"bucket at element {start}"))
    first = numbers.start - measured.first_block
    scales = measured.values[max(first, 0) : max(first + len(numbers), 0)].copy()
    if len(scales) != len(numbers):
        known = f"{measured.first_block} to {measured.first_block + len(measured.values) - 1}"
        raise CodecError(refusal(f"scales of the blocks {numbers.start} to {numbers.stop - 1}", "blocks", known))
    return scales


def excess_refusal(values: Float32, start: int, scale: np.float32, block: slice) -> CodecError:
    """Why a bucket does not belong to its measured scales: a value is not finite, or exceeds its block's scale.

    Args:
        values: of the bucket.
        start: flat index of values[0].
        scale: of the block that was refused.
        block: where it lies in the bucket.
    """
    try:
        require_finite(values, start, "gradient")
    except CodecError as error:
        return error
    rule = f"values within the measured scale {scale}"
    largest = np.abs(values[block]).max()
    return CodecError(refusal(rule, "largest magnitude", largest, f"bucket at element {start}"))
