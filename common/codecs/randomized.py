"""The randomized quantizer over blocks: equations (A5), (A6) with a scale per block and the sign inside the `bits`.

For a block with scale c and s = 2^(bits-1) - 1, each operation rounded to float32 and none fused:

    y      = min((|x| * first) * second, s)     `first`, `second`: see `scales`, y is |x| / c * s
    level  = floor(y) + [u < y - floor(y)]      u: the draw of `randomness` at the flat index of x
    field  = level or -level (x < 0), two's complement of `bits` bits, packed as in `packing`
    value  = (field * float32(1 / s)) * c

y - floor(y) is exact, and so is s * float32(1 / s) = 1 for all supported s: the element that gives an linf block its
scale, and the only element of a block, decode exactly. A block of zeros has scale 0 and decodes to +0.0. The field
-2^(bits-1) is never sent.

Source: paper, "Additional details on gradient quantization"; QSGD (Alistarh et al., 2017). Deviations: `bits` counts
the sign, so s = 2^(bits-1) - 1 rather than 2^bits; a scale per block, by default the largest magnitude.
"""

from __future__ import annotations

import numpy as np

from common.codecs.base import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.blocks import Blocks, EdgedBlocks
from common.codecs.checks import require_payload, require_scales, require_vector
from common.codecs.cpu import randomized as kernels
from common.codecs.cpu.levels import room_for_levels
from common.codecs.cpu.packing import room_for_fields
from common.codecs.cpu.scales import MEASURED, block_end, room_for_sums
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.codecs.scales import NORMS, bucket_scales, excess_refusal, measured_scales, scale_refusal
from common.config import ScaleNorm
from common.errors import CodecError

_LONG_BITS = 16


class RandomizedCodec:
    """Equations (A5), (A6) over blocks; see the top of the file for the definition.

    Args:
        blocks: which elements share a scale. With `EdgedBlocks` scales span buckets and are measured ahead.
        bits: of one element, sign included: 2 to 8, or 16.
        norm: what a block's scale is.
        wire_name: see `Codec`.
    """

    biased = False
    needs_shared_scales = False

    def __init__(self, *, blocks: Blocks, bits: int, norm: ScaleNorm, wire_name: str) -> None:
        self.wire_name = wire_name
        self.alignment = blocks.alignment
        self.needs_whole_vector = isinstance(blocks, EdgedBlocks)
        self._blocks = blocks
        self._bits = bits
        self._norm = norm

    def scale_count(self, start: int, n: int) -> int:
        """See `Codec`."""
        return len(self._blocks.numbers(start, n))

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return packed_bytes(n, self._bits)

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * self.scale_count(start, n) + self.payload_bytes(start, n)

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        """See `Codec`."""
        if not isinstance(self._blocks, EdgedBlocks):
            return None
        return measured_scales(values, start, self._blocks, self._norm)

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
        numbers = self._blocks.numbers(start, n)
        stream = memory_for(payload, packed_bytes(n, self._bits))
        if self.needs_whole_vector:
            scales, norm = bucket_scales(numbers, start, measured), MEASURED
        else:
            scales, norm = np.empty(len(numbers), np.float32), NORMS[self._norm]
        k0, k1 = key.words()
        length, edges, first = self._blocks.bounds(start)
        room = room_for_sums(self._blocks.longest(n))
        if self._bits == _LONG_BITS:
            words, levels = stream.view("<i2"), room_for_levels()
            wrong = kernels.encode_long(values, start, k0, k1, length, edges, first, norm, scales, words, levels, room)
        else:
            groups = room_for_fields()
            wrong = kernels.encode_short(
                values, start, k0, k1, self._bits, length, edges, first, norm, scales, stream, groups, room
            )
        if wrong >= 0:
            raise self._refusal(values, start, scales, wrong)
        return Encoded(scales=scales, payload=stream)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`."""
        require_scales(encoded.scales, self.scale_count(start, n), f"codec {self.wire_name}")
        require_payload(encoded, self.payload_bytes(start, n), f"codec {self.wire_name}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool, key: RandomKey | None = None) -> None:  # noqa: ARG002
        """See `Codec`."""
        n = len(out)
        blocks = self._blocks.bounds(start)
        stream = stream_of(encoded, packed_bytes(n, self._bits), self.scale_count(start, n))
        if self._bits == _LONG_BITS:
            kernels.decode_long(stream.view("<i2"), encoded.scales, start, *blocks, out, add)
        else:
            groups = room_for_fields()
            kernels.decode_short(stream, encoded.scales, start, self._bits, *blocks, out, add, groups)

    def _refusal(self, values: Float32, start: int, scales: Float32, wrong: int) -> CodecError:
        if not self.needs_whole_vector:
            return scale_refusal(values, start)
        blocks = self._blocks.bounds(start)
        begin, end = (block_end(k, start, len(values), *blocks) for k in (wrong - 1, wrong))
        return excess_refusal(values, start, scales[wrong], slice(begin if wrong else 0, end))
