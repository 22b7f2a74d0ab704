"""The paper's own quantizer, exactly (A5), (A6): one l2 norm, s = 2^b levels, 32 + d + b*d bits.

The magnitude of an element is one of the s + 1 levels 0 ... s, one more than b bits can name. Level s is reached only
from above (1 - 1/s) of the norm, and two such elements would exceed the norm for s >= 4: at most one element of the
whole vector is at level s (`scales` rounds the norm up, so that this holds for denormal numbers too). On the other hand
one code is never used, "minus zero". So the element at level s is sent as minus zero, and its own sign as the sign bit
of its bucket's scale, which is never set otherwise. The estimate stays unbiased, and the bits are the paper's.

A bucket: its scale in float32, (n + 7) // 8 bytes of sign bits (1: negative), then the levels of b bits, both packed by
`packing.pack`. Operations as in `randomized`, with value = (level * float32(1 / s)) * c, negated for a sign bit.

Source: paper, "Additional details on gradient quantization". Deviation: a vector in several buckets repeats the 32 bits
of the norm in each, and fills up the last byte.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import BlockScales, Encoded, Float32, RandomKey
from common.codecs.blocks import EdgedBlocks
from common.codecs.checks import require_payload, require_scales, require_vector
from common.codecs.packing import pack, packed_bytes, unpack
from common.codecs.randomized import bucket_scales, draw_levels, measured_scales, put
from common.codecs.randomness import uniforms
from common.codecs.scales import level_factors
from common.config import ScaleNorm
from common.errors import CodecError, refusal


class PaperCodec:
    """Equations (A5), (A6) to the bit; see the top of the file for the definition.

    Args:
        start, stop: the range that shares the norm.
        bits: b, of a level without its sign: 2 to 8, or 16.
        wire_name: see `Codec`.
    """

    needs_whole_vector = True

    def __init__(self, *, start: int, stop: int, bits: int, wire_name: str) -> None:
        self.wire_name = wire_name
        self._blocks = EdgedBlocks.of_layers(start, stop, ())
        self.alignment = self._blocks.alignment
        self._bits = bits
        self._levels = 2**bits

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * len(self._blocks.numbers(start, n)) + self._payload_bytes(n)

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        """See `Codec`."""
        return measured_scales(values, start, self._blocks, ScaleNorm.L2)

    def encode(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None = None) -> Encoded:
        """See `Codec`."""
        require_vector(values)
        scales = bucket_scales(values, start, self._blocks, measured)
        factors = level_factors(scales, self._levels)
        levels: NDArray[Any] = np.empty(len(values), np.int32 if self._bits == 16 else np.int16)
        for run in self._blocks.runs(start, len(values)):
            for piece in run.parts():
                x = piece.of(values)
                draws = uniforms(key, start + piece.offset, x.size).reshape(x.shape)
                piece.of(levels)[...] = draw_levels(x, piece, factors, draws, self._levels, levels.dtype)
        negative = (values < 0) & (levels > 0)
        at_top = np.flatnonzero(levels == self._levels)
        if len(at_top) > 1:
            raise CodecError(refusal("the norm of these values", "elements at the highest level", len(at_top)))
        if len(at_top) == 1:
            scales[0] = np.copysign(scales[0], values[at_top[0]])
            levels[at_top], negative[at_top] = 0, True
        return Encoded(scales=scales, payload=pack(negative, 1) + pack(levels, self._bits))

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`; the scale's sign bit is allowed."""
        require_scales(encoded.scales, len(self._blocks.numbers(start, n)), f"codec {self.wire_name}", signed=True)
        require_payload(encoded, self._payload_bytes(n), f"codec {self.wire_name}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool) -> None:
        """See `Codec`."""
        n = len(out)
        stream = memoryview(encoded.payload).cast("B")
        split = packed_bytes(n, 1)
        negative = unpack(stream[:split], n, 1)
        levels = unpack(stream[split:], n, self._bits)
        unit = np.float32(1) / np.float32(self._levels)
        for run in self._blocks.runs(start, n):
            for piece in run.parts():
                scale = piece.of_scales(encoded.scales)
                minus, level = piece.of(negative), piece.of(levels)
                values = level.astype(np.float32)
                values *= unit
                values *= np.abs(scale)
                words = values.view(np.uint32)
                words ^= minus.astype(np.uint32) << np.uint32(31)
                at_top = (minus == 1) & (level == 0)
                if at_top.any():
                    np.copyto(values, scale, where=at_top)
                put(values, piece.of(out), add=add)

    def _payload_bytes(self, n: int) -> int:
        return packed_bytes(n, 1) + packed_bytes(n, self._bits)
