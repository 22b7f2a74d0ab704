"""The rotated quantizer: blocks are rotated at random, then every coordinate becomes one of 2^bits centroids.

A block x of n = 2^k elements is rotated twice by random signs and a Hadamard transform H (`cpu.hadamard`), which makes
its coordinates near normal whatever x is. With signs D1, D2 (`cpu.signs`: from the key and the flat index), each
operation rounded to float32 and none fused:

    y      = H D2 H (D1 unit x)             `unit`: the power of two in [2^-126, 2^126] that brings max|x| next to 1
    sigma  = sqrt(sum y^2 / n)              quotient and root in float64, then rounded
    m      = number of bounds t with |y| >= sigma * t
    field  = m or -m - 1 (sign bit of y), two's complement of `bits` bits, packed as in `packing`
    scale  = sum y^2 / (sum |y| c_m * unit * n)     quotient in float64, then rounded
    value  = D1 H (1/n) D2 H (+-c_m), times the scale

Sums add their n terms in halves: the first n/2 to the last n/2, and so on. c are the centroids of Lloyd and Max for the
standard normal distribution, the last three bits of their float32 replaced by m; the bounds lie halfway between them.
The scale is what makes the estimate unbiased: its part along x is exactly x, and the rest has every direction as often
as its opposite. The scale is near the root mean square of x. A block of zeros has scale 0 and decodes to +0.0. The
squared error, relative to that of x, is that of the quantizer whatever x is: 0.571, 0.133, 0.036, 0.0096 for 1 to 4
bits; a mean over M workers, whose rotations are independent, has an M-th of it.

The last block of the vector may be shorter: it is cut into the powers of two that it is the sum of, the longest first,
each with a scale of its own; what is left, less than 64 elements, travels as float32 behind the fields. So nothing is
padded, and pieces that are too short to look normal do not arise.

Source: DRIVE (Vargaftik et al., 2021) for 1 bit; EDEN (Vargaftik et al., 2022). Deviations: two passes of signs and
transform where EDEN takes one. After one pass the coordinates of a block with few large elements are not normal, and
the estimate is biased: with 2 bits and Student's t of 2 degrees of freedom by 5% of |x|^2, with 1 bit and a block of
two elements, 1 and 0.9, by 81%. After two passes what is left of these 81% is 0.8%, 0.04% and below 0.02% in blocks of
64, 256 and 512; for other vectors it is not to be seen. The centroid of 1 bit is 1: only ratios of centroids count.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from common.codecs.base import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.blocks import FixedBlocks
from common.codecs.checks import require_finite, require_payload, require_scales, require_vector
from common.codecs.cpu import rotated as kernels
from common.codecs.cpu.hadamard import TILE
from common.codecs.cpu.packing import room_for_fields
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.errors import CodecError, refusal

CENTROIDS = {
    1: (1.0,),
    2: (0.452780034636, 1.5104176085),
    3: (0.245094178944, 0.756005281206, 1.3439092785, 2.15194570454),
    4: (
        *(0.128395029851, 0.38804829949, 0.656759118532, 0.942340456487),
        *(1.25623119735, 1.61804638602, 2.06901722653, 2.732589571),
    ),
}
"""The positive centroids by bits; they enter as float32."""
_LOOKED_UP = {1: 8, 2: 4, 3: 2, 4: 2}
"""How many fields are looked up at once."""


class RotatedCodec:
    """Random rotation and centroids; see the top of the file for the definition.

    Args:
        start, stop: the encoder's range.
        block: elements of a block, a power of two from 64 on.
        bits: of one element, 1 to 4.
        wire_name: see `Codec`.
    """

    needs_whole_vector = False
    biased = False
    needs_shared_scales = False

    def __init__(self, *, start: int, stop: int, block: int, bits: int, wire_name: str) -> None:
        self.wire_name = wire_name
        self.alignment = block
        self._blocks = FixedBlocks(start=start, stop=stop, length=block)
        self._bits = bits
        # The norm of a piece of centroids is at most 2.74 sqrt(n), and so, times the scale, is any decoded value.
        self._limit = 2.0 ** (125 - block.bit_length() // 2)

    def scale_count(self, start: int, n: int) -> int:
        """See `Codec`: one per piece."""
        self._blocks.numbers(start, n)
        whole, rest = divmod(n, self.alignment)
        return whole + (rest // TILE).bit_count()

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return packed_bytes(n - n % TILE, self._bits) + 4 * (n % TILE)

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return 4 * self.scale_count(start, n) + self.payload_bytes(start, n)

    def measure(self, values: Float32, start: int) -> None:
        """See `Codec`: buckets carry their own scales."""

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,  # noqa: ARG002
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """See `Codec`."""
        require_vector(values)
        n = len(values)
        scales = np.empty(self.scale_count(start, n), np.float32)
        stream = memory_for(payload, self.payload_bytes(start, n))
        fields, tail = self._parts(stream, n)
        k0, k1 = key.words()
        centroids, bounds = _choices(self._bits)
        bits, block, limit = self._bits, self.alignment, self._limit
        room, signs = kernels.rooms(block)
        chosen, groups = np.empty(block, np.float32), room_for_fields()
        wrong = kernels.encode(
            values, start, k0, k1, bits, block, centroids, bounds, limit, scales, fields, room, signs, chosen, groups
        )
        if wrong >= 0:
            require_finite(values, start, "gradient")
            rule = f"blocks with a root mean square of about {self._limit:.1e} at most"
            largest = np.abs(values[wrong : wrong + block]).max()
            raise CodecError(refusal(rule, "largest magnitude", largest, f"from element {start + wrong}"))
        tail[:] = values[n - len(tail) :]
        require_finite(tail, start + n - len(tail), "gradient")
        return Encoded(scales=scales, payload=stream)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`; a scale that lets a decoded value overflow is refused, too."""
        where = f"codec {self.wire_name}"
        require_scales(encoded.scales, self.scale_count(start, n), where)
        require_payload(encoded, self.payload_bytes(start, n), where)
        if encoded.scales.max(initial=0) > self._limit:
            raise CodecError(refusal(f"scales of at most {self._limit:.1e}", "scale", encoded.scales.max(), where))
        tail = self._parts(np.frombuffer(encoded.payload, np.uint8), n)[1]
        require_finite(tail, start + n - len(tail), f"payload, {where}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool, key: RandomKey | None = None) -> None:
        """See `Codec`; needs the key of the encoding."""
        if key is None:
            raise CodecError(refusal("the key of the encoding", "key", None, f"codec {self.wire_name}"))
        n = len(out)
        fields, tail = self._parts(stream_of(encoded, self.payload_bytes(start, n), self.scale_count(start, n)), n)
        k0, k1 = key.words()
        table, block = looked_up(self._bits), self.alignment
        kernels.decode(fields, encoded.scales, start, k0, k1, self._bits, block, table, out, add, *kernels.rooms(block))
        if add:
            out[n - len(tail) :] += tail
        else:
            out[n - len(tail) :] = tail

    def _parts(self, stream: Bytes, n: int) -> tuple[Bytes, Float32]:
        """The fields, and the elements behind the last piece."""
        fields = packed_bytes(n - n % TILE, self._bits)
        tail: Float32 = stream[fields:].view("<f4")
        return stream[:fields], tail


@cache
def _choices(bits: int) -> tuple[Float32, Float32]:
    """Centroids and bounds as `cpu.centroids.choose` needs them."""
    centroids, bounds = np.zeros(8, np.float32), np.full(7, np.inf, np.float32)
    own = CENTROIDS[bits]
    centroids[: len(own)] = own
    bounds[: len(own) - 1] = (np.array(own[1:]) + np.array(own[:-1])) / 2
    centroids.view(np.uint32)[:] = centroids.view(np.uint32) & ~np.uint32(7) | np.arange(8, dtype=np.uint32)
    return centroids, bounds


@cache
def looked_up(bits: int) -> Float32:
    """The centroids of all patterns of as many fields as are looked up at once, the first field lowest."""
    count = _LOOKED_UP[bits]
    patterns = np.arange(1 << (bits * count))[:, None] >> (bits * np.arange(count)) & ((1 << bits) - 1)
    centroids = _choices(bits)[0][: 1 << (bits - 1)]
    table: Float32 = np.append(centroids, -centroids[::-1])[patterns].astype(np.float32).reshape(-1)
    return table
