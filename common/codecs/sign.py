"""The scaled sign: one bit per element, and per block the mean magnitude. Biased: only with error feedback.

    scale = sum |x| / n, in float64, rounded to float32; the sum in 64 lanes, which are then added in halves
    bit   = 1 for x < 0, packed as in `packing`
    value = scale or -scale

Lane j adds the elements j, 64 + j, 128 + j, ... of the block. A block of zeros decodes to +0.0.

Source: EF-signSGD (Karimireddy et al., 2019), where a layer is a block.
"""

from __future__ import annotations

import numpy as np

from common.codecs.base import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.blocks import FixedBlocks
from common.codecs.checks import require_finite, require_payload, require_scales, require_vector
from common.codecs.cpu import sign as kernels
from common.codecs.cpu.packing import room_for_fields
from common.codecs.cpu.scales import LANES
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.codecs.rotated import looked_up


class SignCodec:
    """The scaled sign over blocks; see the top of the file for the definition.

    Args:
        start, stop: the encoder's range.
        block: elements of a block, a multiple of 8.
        wire_name: see `Codec`.
    """

    needs_whole_vector = False
    biased = True
    needs_shared_scales = False

    def __init__(self, *, start: int, stop: int, block: int, wire_name: str) -> None:
        self.wire_name = wire_name
        self.alignment = block
        self._blocks = FixedBlocks(start=start, stop=stop, length=block)

    def scale_count(self, start: int, n: int) -> int:
        """See `Codec`."""
        return len(self._blocks.numbers(start, n))

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return packed_bytes(n, 1)

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * self.scale_count(start, n) + self.payload_bytes(start, n)

    def measure(self, values: Float32, start: int) -> None:
        """See `Codec`: buckets carry their own scales."""

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,  # noqa: ARG002
        measured: BlockScales | None = None,  # noqa: ARG002
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """See `Codec`; nothing is random."""
        require_vector(values)
        scales = np.empty(self.scale_count(start, len(values)), np.float32)
        stream = memory_for(payload, packed_bytes(len(values), 1))
        if kernels.encode(values, self.alignment, scales, stream, room_for_fields(), np.empty(LANES)) >= 0:
            require_finite(values, start, "gradient")
        return Encoded(scales=scales, payload=stream)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`."""
        require_scales(encoded.scales, self.scale_count(start, n), f"codec {self.wire_name}")
        require_payload(encoded, packed_bytes(n, 1), f"codec {self.wire_name}")

    def decode(
        self,
        encoded: Encoded,
        start: int,
        out: Float32,
        *,
        add: bool,
        key: RandomKey | None = None,  # noqa: ARG002
    ) -> None:
        """See `Codec`."""
        stream = stream_of(encoded, packed_bytes(len(out), 1), self.scale_count(start, len(out)))
        kernels.decode(stream, encoded.scales, self.alignment, looked_up(1), out, add, kernels.room_for_signs())
