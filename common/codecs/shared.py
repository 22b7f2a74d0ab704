"""Shared scales: workers agree on each block's scale first, then servers add integers without decoding them.

In a tiny round of their own the largest magnitudes of all blocks are exchanged: 4 bytes a block each way. With c the
largest over the workers and s = 2^(bits-1) - 1, M workers send and servers add

    level, field    as in `randomized`, with the scale c: an integer of magnitude s at most
    sum             of the M fields, of magnitude M * s at most: in float32 exact, whatever the order
    average         (sum * float32(1 / (M * s))) * c, at every worker

The sum travels as a two's complement number of the fewest bits, 2 to 8 or 16, that hold M * s: what leaves a server is
exactly what it has added, so both directions are compressed and only the workers' own rounding remains, unbiased. No
sum can overflow: a contribution with the one field beyond s, -2^(bits-1), is refused. A block of zeros has c = 0, and
its average is +0.0.

Source: integer sums as in SwitchML (Sapio et al., 2021) and THC (Li et al., 2024); levels as in QSGD. Deviation: scales
of small blocks and randomized rounding rather than one exponent per chunk.
"""

from __future__ import annotations

import numpy as np

from common.codecs.base import BlockScales, Bytes, Codec, Encoded, Float32, RandomKey
from common.codecs.blocks import FixedBlocks
from common.codecs.checks import require_finite, require_payload, require_scales, require_vector
from common.codecs.cpu import shared as kernels
from common.codecs.cpu.packing import room_for_fields
from common.codecs.cpu.randomized import encode_short
from common.codecs.cpu.scales import MEASURED, room_for_sums
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.codecs.scales import block_scales, bucket_scales, excess_refusal
from common.config import ScaleNorm
from common.errors import CodecError, refusal

_NO_SCALES: Float32 = np.empty(0, np.float32)
_NO_SCALES.flags.writeable = False
_LONG_BITS = 16


class _Integers:
    """What contributions and sums share: fields of `bits` bits, none of them beyond `largest`."""

    needs_whole_vector = False
    biased = False
    wire_name: str

    def __init__(self, bits: int, largest: int) -> None:
        self._bits = bits
        self._largest = largest

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return packed_bytes(n, self._bits)

    def measure(self, values: Float32, start: int) -> None:
        """See `Codec`."""

    def check(self, encoded: Encoded, start: int, n: int) -> None:  # noqa: ARG002
        """See `Codec`; a field beyond the largest is refused, too."""
        where = f"codec {self.wire_name}"
        require_scales(encoded.scales, 0, where)
        require_payload(encoded, packed_bytes(n, self._bits), where)
        stream = np.frombuffer(encoded.payload, np.uint8)
        if self._bits == _LONG_BITS:
            found = kernels.largest_long(stream.view("<i2"))
        else:
            found = kernels.largest_short(stream, n, self._bits, room_for_fields())
        if found > self._largest:
            raise CodecError(refusal(f"integers of magnitude {self._largest} at most", "magnitude", found, where))

    def decode(
        self,
        encoded: Encoded,
        start: int,  # noqa: ARG002
        out: Float32,
        *,
        add: bool,
        key: RandomKey | None = None,  # noqa: ARG002
    ) -> None:
        """See `Codec`; the values are integers."""
        stream = stream_of(encoded, packed_bytes(len(out), self._bits), 0)
        if self._bits == _LONG_BITS:
            kernels.decode_long(stream.view("<i2"), out, add)
        else:
            kernels.decode_short(stream, self._bits, out, add, room_for_fields())


class SharedCodec(_Integers):
    """Contributions: integers under scales that all workers share; see the top of the file for the definition.

    Args:
        start, stop: the encoder's range.
        block: elements of a block, a multiple of 8.
        bits: of one element, sign included: 2 to 8.
        wire_name: see `Codec`.
    """

    needs_shared_scales = True

    def __init__(self, *, start: int, stop: int, block: int, bits: int, wire_name: str) -> None:
        super().__init__(bits, (1 << (bits - 1)) - 1)
        self.wire_name = wire_name
        self.alignment = block
        self._blocks = FixedBlocks(start=start, stop=stop, length=block)

    @property
    def levels(self) -> int:
        """s: the largest magnitude of a contribution's integers."""
        return self._largest

    def scale_count(self, start: int, n: int) -> int:
        """See `Codec`: none travel with a bucket."""
        self._blocks.numbers(start, n)
        return 0

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`; without the round of the scales."""
        return 4 * self.scale_count(start, n) + self.payload_bytes(start, n)

    def blocks(self, start: int, n: int) -> range:
        """Numbers of the blocks of a bucket: those of its scales.

        Raises:
            CodecError: the bucket leaves the range or is not aligned.
        """
        return self._blocks.numbers(start, n)

    def local_scales(self, values: Float32, start: int) -> Float32:
        """The largest magnitude of each block of a bucket: float32, one per block.

        Raises:
            CodecError: a value is NaN or infinite.
        """
        require_vector(values)
        return block_scales(values, start, self._blocks, ScaleNorm.LINF)

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """See `Codec`; `measured` are the shared scales.

        Raises:
            CodecError: they are missing or not finite, or a value exceeds its block's.
        """
        require_vector(values)
        n = len(values)
        scales = bucket_scales(self._blocks.numbers(start, n), start, measured)
        stream = memory_for(payload, packed_bytes(n, self._bits))
        k0, k1 = key.words()
        length, edges, first = self._blocks.bounds(start)
        groups, room = room_for_fields(), room_for_sums(self._blocks.longest(n))
        wrong = encode_short(
            values, start, k0, k1, self._bits, length, edges, first, MEASURED, scales, stream, groups, room
        )
        if wrong >= 0:
            raise excess_refusal(values, start, scales[wrong], slice(wrong * length, (wrong + 1) * length))
        return Encoded(scales=_NO_SCALES, payload=stream)


class SumCodec(_Integers):
    """Averages on their way: the sums themselves; see the top of the file for the definition.

    Args:
        largest: M * s, the largest magnitude of a sum.
        wire_name: see `Codec`.
    """

    alignment = 8
    needs_shared_scales = False

    def __init__(self, *, largest: int) -> None:
        bits = sum_bits(largest)
        super().__init__(bits, largest)
        self.wire_name = f"sums/{bits}/{largest}"

    def scale_count(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`: none."""
        return 0

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`; without the round of the scales."""
        return self.payload_bytes(start, n)

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,  # noqa: ARG002
        measured: BlockScales | None = None,  # noqa: ARG002
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """See `Codec`; nothing is random.

        Raises:
            CodecError: a value is no integer, or beyond the largest sum.
        """
        require_vector(values)
        stream = memory_for(payload, packed_bytes(len(values), self._bits))
        if self._bits == _LONG_BITS:
            right = kernels.encode_long(values, self._largest, stream.view("<i2"))
        else:
            right = kernels.encode_short(values, self._bits, self._largest, stream, room_for_fields())
        if not right:
            require_finite(values, start, "sum")
            wrong = (np.abs(values) > self._largest) | (values != np.rint(values))
            index = int(np.argmax(wrong))
            rule = f"an integer of magnitude {self._largest} at most"
            raise CodecError(refusal(rule, f"element {start + index}", values[index], "sum"))
        return Encoded(scales=_NO_SCALES, payload=stream)


def average_of_sums(codec: Codec, sums: Float32, start: int, shared: BlockScales, workers: int) -> None:
    """Turns the sums of the workers' integers, in place, into the average of their vectors.

    Args:
        codec: of the contributions, a `SharedCodec`.
        sums: float32 of shape (n,), integers; overwritten.
        start: flat index of sums[0].
        shared: the shared scales.
        workers: M.

    Raises:
        CodecError: another codec, or scales that are missing or not finite.
    """
    if not isinstance(codec, SharedCodec):
        raise CodecError(refusal("codec shared", "codec", codec.wire_name))
    require_vector(sums)
    scales = bucket_scales(codec.blocks(start, len(sums)), start, shared)
    require_scales(scales, len(scales), "shared scales")
    kernels.average(sums, scales, codec.alignment, 1 / (workers * codec.levels), sums)


def sum_bits(largest: int) -> int:
    """The fewest bits, 2 to 8 or 16, of two's complement numbers up to +-largest.

    Raises:
        CodecError: there are none.
    """
    for bits in [2, 3, 4, 5, 6, 7, 8, _LONG_BITS]:
        if largest < 2 ** (bits - 1):
            return bits
    raise CodecError(refusal("sums of at most 32767", "largest sum", largest))
