"""The randomized quantizer over blocks: equations (A5), (A6) with a scale per block and the sign inside the `bits`.

For a block with scale c and s = 2^(bits-1) - 1, each operation rounded to float32 and none fused:

    y      = min((|x| * first) * second, s)     `first`, `second`: `scales.level_factors`, y is |x| / c * s
    level  = floor(y) + [u < y - floor(y)]      u: `randomness.uniforms` at the flat index of x
    field  = level or -level (x < 0), two's complement of `bits` bits, packed by `packing.pack`
    value  = (field * float32(1 / s)) * c

y - floor(y) is exact, and so is s * float32(1 / s) = 1 for all supported s: the element that gives an linf block its
scale, and the only element of a block, decode exactly. A block of zeros has scale 0 and decodes to +0.0. The field
-2^(bits-1) is never sent.

Source: paper, "Additional details on gradient quantization"; QSGD (Alistarh et al., 2017). Deviations: `bits` counts
the sign, so s = 2^(bits-1) - 1 rather than 2^bits; a scale per block, by default the largest magnitude.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import BlockScales, Encoded, Float32, RandomKey
from common.codecs.blocks import Blocks, EdgedBlocks, Piece
from common.codecs.checks import require_finite, require_payload, require_scales, require_vector
from common.codecs.packing import pack, packed_bytes, signed, unpack
from common.codecs.randomness import uniforms
from common.codecs.scales import block_scales, level_factors
from common.config import ScaleNorm
from common.errors import CodecError, refusal


class RandomizedCodec:
    """Equations (A5), (A6) over blocks; see the top of the file for the definition.

    Args:
        blocks: which elements share a scale. With `EdgedBlocks` scales span buckets and are measured ahead.
        bits: of one element, sign included: 2 to 8, or 16.
        norm: what a block's scale is.
        wire_name: see `Codec`.
    """

    def __init__(self, *, blocks: Blocks, bits: int, norm: ScaleNorm, wire_name: str) -> None:
        self.wire_name = wire_name
        self.alignment = blocks.alignment
        self.needs_whole_vector = isinstance(blocks, EdgedBlocks)
        self._blocks = blocks
        self._bits = bits
        self._norm = norm
        self._levels = 2 ** (bits - 1) - 1

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * len(self._blocks.numbers(start, n)) + packed_bytes(n, self._bits)

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        """See `Codec`."""
        return measured_scales(values, start, self._blocks, self._norm)

    def encode(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None = None) -> Encoded:
        """See `Codec`."""
        require_vector(values)
        if self.needs_whole_vector:
            scales = bucket_scales(values, start, self._blocks, measured)
        else:
            scales = block_scales(values, start, self._blocks, self._norm)
        factors = level_factors(scales, self._levels)
        fields: NDArray[Any] = np.empty(len(values), np.int16 if self._bits == 16 else np.int8)
        for run in self._blocks.runs(start, len(values)):
            for piece in run.parts():
                x = piece.of(values)
                draws = uniforms(key, start + piece.offset, x.size).reshape(x.shape)
                levels = draw_levels(x, piece, factors, draws, self._levels, fields.dtype)
                minus = -(x < 0).astype(fields.dtype)
                piece.of(fields)[...] = (levels ^ minus) - minus  # negates where all bits of minus are set
        return Encoded(scales=scales, payload=pack(fields, self._bits))

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`."""
        require_scales(encoded.scales, len(self._blocks.numbers(start, n)), f"codec {self.wire_name}")
        require_payload(encoded, packed_bytes(n, self._bits), f"codec {self.wire_name}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool) -> None:
        """See `Codec`."""
        fields = signed(unpack(encoded.payload, len(out), self._bits), self._bits)
        unit = np.float32(1) / np.float32(self._levels)
        for run in self._blocks.runs(start, len(out)):
            for piece in run.parts():
                values = piece.of(fields).astype(np.float32)
                values *= unit
                values *= piece.of_scales(encoded.scales)
                put(values, piece.of(out), add=add)


def draw_levels(
    x: Float32, piece: Piece, factors: tuple[Float32, Float32], draws: Float32, levels: int, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """xi * s of equation (A6): the level of each magnitude, rounded up with the probability of its fraction.

    Args:
        x: float32 of shape (rows, length), finite.
        piece: where x lies.
        factors: from `level_factors`, one entry per block of the bucket.
        draws: float32 of the shape of x, in (0, 1).
        levels: s.
        dtype: signed, holds s.

    Returns:
        Whole numbers from 0 to s, of the shape of x.
    """
    first, second = (piece.of_scales(factor) for factor in factors)
    fractions = np.abs(x)
    if (first != 1).any():
        fractions *= first
    fractions *= second
    np.minimum(fractions, np.float32(levels), out=fractions)
    floors = np.floor(fractions)
    fractions -= floors
    drawn: NDArray[Any] = floors.astype(dtype)
    drawn += draws < fractions
    return drawn


def measured_scales(values: Float32, start: int, blocks: Blocks, norm: ScaleNorm) -> BlockScales | None:
    """`Codec.measure`: the scales of `EdgedBlocks` over a stretch of whole blocks; None for blocks within buckets.

    Raises:
        CodecError: the stretch cuts a block, a value is NaN or infinite, or a scale overflows.
    """
    if not isinstance(blocks, EdgedBlocks):
        return None
    require_vector(values)
    first, stretch = blocks.stretch(start, len(values))
    return BlockScales(first_block=first, values=block_scales(values, start, stretch, norm))


def bucket_scales(values: Float32, start: int, blocks: Blocks, measured: BlockScales | None) -> Float32:
    """The measured scales of the blocks that a bucket overlaps, copied.

    Raises:
        CodecError: they are missing or not of these values, or a value is NaN or infinite.
    """
    numbers = blocks.numbers(start, len(values))
    if measured is None:
        raise CodecError(refusal("scales measured ahead", "measured", None, f"bucket at element {start}"))
    first = numbers.start - measured.first_block
    scales = measured.values[max(first, 0) : max(first + len(numbers), 0)].copy()
    if len(scales) != len(numbers):
        known = f"{measured.first_block} to {measured.first_block + len(measured.values) - 1}"
        raise CodecError(refusal(f"scales of the blocks {numbers.start} to {numbers.stop - 1}", "blocks", known))
    for run in blocks.runs(start, len(values)):
        largest = np.abs(run.of(values)).max()
        if not largest <= scales[run.block]:
            require_finite(values, start, "gradient")
            rule = f"values within the measured scale {scales[run.block]}"
            raise CodecError(refusal(rule, "largest magnitude", largest, f"bucket at element {start}"))
    return scales


def put(values: Float32, out: Float32, *, add: bool) -> None:
    """`out += values` or `out[:] = values`, in place."""
    if add:
        out += values
    else:
        out[...] = values
