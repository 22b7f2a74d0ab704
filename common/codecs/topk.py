"""Top-k: of each block the largest magnitudes, with their places. Biased: only with error feedback.

Of a block of n elements the k = ceil(density * n) largest magnitudes are sent, of equal ones those that come first;
everything else is zero. `density` is read as the nearest fraction with a denominator of at most 2^16. A bucket holds

    float32   the values that are sent, block after block, each block in order of place
    places    in its block, fields of ceil(log2(block)) bits, at least one, packed as in `packing`; a block's places
              begin with a byte

A bucket's size follows from its length alone; places that do not rise are refused. `add` touches no other element.

Source: Stich et al., 2018, with error feedback as "memory". Deviation: k per block rather than per vector, so that
neither bytes nor choice depend on the cuts into buckets and shards, and nothing has to wait for the whole vector.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from common.codecs.base import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.blocks import FixedBlocks
from common.codecs.checks import require_finite, require_payload, require_scales, require_vector
from common.codecs.cpu import topk as kernels
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.errors import CodecError, refusal

_NO_SCALES: Float32 = np.empty(0, np.float32)
_NO_SCALES.flags.writeable = False


def density_of(number: float) -> Fraction:
    """The fraction that a density means."""
    return max(Fraction(number).limit_denominator(1 << 16), Fraction(1, 1 << 16))


class TopkCodec:
    """The largest elements of each block; see the top of the file for the definition.

    Args:
        start, stop: the encoder's range.
        block: elements of a block, a multiple of 8 up to 2^16.
        density: fraction that is sent.
        wire_name: see `Codec`.
    """

    needs_whole_vector = False
    biased = True
    needs_shared_scales = False

    def __init__(self, *, start: int, stop: int, block: int, density: Fraction, wire_name: str) -> None:
        self.wire_name = wire_name
        self.alignment = block
        self._blocks = FixedBlocks(start=start, stop=stop, length=block)
        self._density = density
        self._bits = max(1, (block - 1).bit_length())

    def scale_count(self, start: int, n: int) -> int:
        """See `Codec`: none."""
        self._blocks.numbers(start, n)
        return 0

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return 4 * self._kept(n) + self._place_bytes(n)

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * self.scale_count(start, n) + self.payload_bytes(start, n)

    def measure(self, values: Float32, start: int) -> None:
        """See `Codec`: there are no scales."""

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
        n, block = len(values), self.alignment
        self._blocks.numbers(start, n)
        stream = memory_for(payload, self.payload_bytes(start, n))
        upper, lower = kernels.room_for_halves(block), kernels.room_for_halves(block)
        if kernels.encode(values, block, *self._counts(n), self._bits, *self._parts(stream, n), upper, lower) >= 0:
            require_finite(values, start, "gradient")
        return Encoded(scales=_NO_SCALES, payload=stream)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`; places that do not rise within their block are refused, too."""
        where = f"codec {self.wire_name}"
        require_scales(encoded.scales, self.scale_count(start, n), where)
        require_payload(encoded, self.payload_bytes(start, n), where)
        kept, places = self._parts(np.frombuffer(encoded.payload, np.uint8), n)
        require_finite(kept, 0, f"number in the payload, {where}")
        wrong = kernels.first_disorder(places, n, self.alignment, *self._counts(n), self._bits)
        if wrong >= 0:
            raise CodecError(refusal("rising places within each block", "block", f"from {start + wrong}", where))

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
        n = len(out)
        stream = stream_of(encoded, self.payload_bytes(start, n), self.scale_count(start, n))
        kernels.decode(*self._parts(stream, n), self.alignment, *self._counts(n), self._bits, out, add)

    def _counts(self, n: int) -> tuple[int, int]:
        """How many elements are sent of a whole block, and of the shorter last one."""
        return math.ceil(self._density * self.alignment), math.ceil(self._density * (n % self.alignment))

    def _kept(self, n: int) -> int:
        whole, last = self._counts(n)
        return n // self.alignment * whole + last

    def _place_bytes(self, n: int) -> int:
        whole, last = self._counts(n)
        return n // self.alignment * packed_bytes(whole, self._bits) + packed_bytes(last, self._bits)

    def _parts(self, stream: Bytes, n: int) -> tuple[Float32, Bytes]:
        """The values and the places of a payload."""
        edge = 4 * self._kept(n)
        return stream[:edge].view("<f4"), stream[edge:]
