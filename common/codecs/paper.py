"""The paper's own quantizer, exactly (A5), (A6): one l2 norm, s = 2^b levels, 32 + d + b*d bits.

The magnitude of an element is one of the s + 1 levels 0 ... s, one more than b bits can name. Level s is reached only
from above (1 - 1/s) of the norm, and two such elements would exceed the norm for s >= 4: at most one element of the
whole vector is at level s (`scales` rounds the norm up, so that this holds for denormal numbers too). On the other hand
one code is never used, "minus zero". So the element at level s is sent as minus zero, and its own sign as the sign bit
of its bucket's scale, which is never set otherwise. The estimate stays unbiased, and the bits are the paper's.

A bucket: its scale in float32, (n + 7) // 8 bytes of sign bits (1: negative), then the levels of b bits, both packed as
in `packing`. Operations as in `randomized`, with value = (level * float32(1 / s)) * c, negated for a sign bit.

Source: paper, "Additional details on gradient quantization". Deviation: a vector in several buckets repeats the 32 bits
of the norm in each, and fills up the last byte.
"""

from __future__ import annotations

from common.codecs.base import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.blocks import EdgedBlocks
from common.codecs.checks import require_payload, require_scales, require_vector
from common.codecs.cpu import paper as kernels
from common.codecs.cpu.levels import room_for_levels
from common.codecs.cpu.packing import room_for_fields
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.codecs.scales import bucket_scales, excess_refusal, measured_scales
from common.config import ScaleNorm
from common.errors import CodecError, refusal

_LONG_BITS = 16


class PaperCodec:
    """Equations (A5), (A6) to the bit; see the top of the file for the definition.

    Args:
        start, stop: the range that shares the norm.
        bits: b, of a level without its sign: 2 to 8, or 16.
        wire_name: see `Codec`.
    """

    needs_whole_vector = True
    biased = False
    needs_shared_scales = False

    def __init__(self, *, start: int, stop: int, bits: int, wire_name: str) -> None:
        self.wire_name = wire_name
        self._blocks = EdgedBlocks.of_layers(start, stop, ())
        self.alignment = self._blocks.alignment
        self._bits = bits

    def scale_count(self, start: int, n: int) -> int:
        """See `Codec`: 1, or 0 for an empty bucket."""
        return len(self._blocks.numbers(start, n))

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return packed_bytes(n, 1) + packed_bytes(n, self._bits)

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * self.scale_count(start, n) + self.payload_bytes(start, n)

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        """See `Codec`."""
        return measured_scales(values, start, self._blocks, ScaleNorm.L2)

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """See `Codec`."""
        require_vector(values)
        n = len(values)
        scales = bucket_scales(self._blocks.numbers(start, n), start, measured)
        stream = memory_for(payload, self.payload_bytes(start, n))
        if n == 0:
            return Encoded(scales=scales, payload=stream)
        norm = scales[0]
        signs, magnitudes = stream[: packed_bytes(n, 1)], stream[packed_bytes(n, 1) :]
        levels, sign_groups = room_for_levels(), room_for_fields()
        if self._bits == _LONG_BITS:
            words = magnitudes.view("<u2")
            at_top = kernels.encode_paper_long(values, start, *key.words(), scales, signs, words, levels, sign_groups)
        else:
            groups = room_for_fields()
            at_top = kernels.encode_paper_short(
                values, start, *key.words(), self._bits, scales, signs, magnitudes, levels, sign_groups, groups
            )
        if at_top < 0:
            raise excess_refusal(values, start, norm, slice(0, n))
        if at_top > 1:
            raise CodecError(refusal("the norm of these values", "elements at the highest level", at_top))
        return Encoded(scales=scales, payload=stream)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`; the scale's sign bit is allowed."""
        require_scales(encoded.scales, self.scale_count(start, n), f"codec {self.wire_name}", signed=True)
        require_payload(encoded, self.payload_bytes(start, n), f"codec {self.wire_name}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool, key: RandomKey | None = None) -> None:  # noqa: ARG002
        """See `Codec`."""
        n = len(out)
        stream = stream_of(encoded, self.payload_bytes(start, n), self.scale_count(start, n))
        if n == 0:
            return
        signs, magnitudes = stream[: packed_bytes(n, 1)], stream[packed_bytes(n, 1) :]
        scale, sign_groups = encoded.scales[0], room_for_fields()
        if self._bits == _LONG_BITS:
            kernels.decode_paper_long(signs, magnitudes.view("<u2"), scale, out, add, sign_groups)
        else:
            groups = room_for_fields()
            kernels.decode_paper_short(signs, magnitudes, scale, self._bits, out, add, sign_groups, groups)
