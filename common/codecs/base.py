"""The contract of a codec: a float32 vector to scales and payload, and back onto an accumulator.

A codec works on buckets: contiguous runs [start, start + n) of the flat gradient vector of d elements. Block boundaries
and the element index of the randomness refer to the flat vector, so the bytes of an element do not depend on how the
vector is cut into buckets and shards.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SERVER = 0xFFFFFFFF
"""The source of the randomness of an average, beside the workers' 0 ... M-1."""


@dataclass(frozen=True, kw_only=True)
class RandomKey:
    """Names one encoding; with the element index it determines every random draw (counter-based randomness).

    Attributes:
        seed: seed of the job.
        round: the round, from 0.
        source: `worker_index`, or SERVER for the average.
    """

    seed: int
    round: int
    source: int

    def words(self) -> tuple[int, int]:
        """Two 32-bit words that key the per-element hash: BLAKE2b of (seed, round, source)."""
        digest = hashlib.blake2b(struct.pack("<QQI", self.seed, self.round, self.source), digest_size=8).digest()
        first, second = struct.unpack("<II", digest)
        return first, second


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Encoded:
    """One bucket as it travels.

    Attributes:
        scales: float32, one per block that overlaps the bucket, in order; empty for codecs without scales.
        payload: the packed elements; any contiguous memory at any address, possibly read-only, as `scales` are.
    """

    scales: Float32
    payload: bytes | bytearray | memoryview | Bytes


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockScales:
    """Scales of blocks, measured ahead of encoding over a range of the vector.

    Attributes:
        first_block: number of the block that `values[0]` belongs to.
        values: float32, one per block.
    """

    first_block: int
    values: Float32


class Codec(Protocol):
    """Compresses a float32 vector to bytes and back. Stateless and free of I/O; safe to share between threads."""

    wire_name: str
    """What contributions carry to say how they are encoded, e.g. `randomized/8/512/linf`."""
    alignment: int
    """Bucket boundaries must be multiples of this many elements (the end of the vector excepted)."""
    needs_whole_vector: bool
    """True if scales span buckets: `measure` has to see the whole range before the first bucket is encoded."""

    biased: bool
    """True if decoded values are not right on average, so that training needs error feedback."""
    needs_shared_scales: bool
    """True if all workers encode a block with one scale, which they agree on first (`measured`, codec `shared`)."""

    def scale_count(self, start: int, n: int) -> int:
        """Scales of the bucket [start, start + n).

        Raises:
            CodecError: the bucket leaves the range or is not aligned.
        """
        ...

    def payload_bytes(self, start: int, n: int) -> int:
        """Exact bytes of the payload of the bucket [start, start + n)."""
        ...

    def wire_bytes(self, start: int, n: int) -> int:
        """Exact bytes of scales and payload: 4 * scale_count + payload_bytes; raises as `scale_count`."""
        ...

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        """Scales of the blocks of a stretch of whole blocks from `start`; None where buckets carry their own.

        Raises:
            CodecError: a value is NaN or infinite, or a scale overflows.
        """
        ...

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """Encodes the bucket [start, start + len(values)).

        Args:
            values: float32 of shape (n,), contiguous; not changed. They end at a multiple of `alignment`, or where
                the encoder's range ends.
            start: flat index of values[0]; a multiple of `alignment`.
            key: determines all random draws.
            measured: from `measure`; required if `needs_whole_vector`.
            payload: memory for the packed elements: uint8 of shape (payload_bytes(start, n),), contiguous, writable, at
                any address, for example within a message. New memory where absent.

        Returns:
            The scales and `payload`. After an error `payload` holds anything.

        Raises:
            CodecError: a value is NaN or infinite (the message gives its flat index), or a scale overflows.
        """
        ...

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """Checks a received bucket before any of it is used.

        Raises:
            CodecError: wrong number of scales or bytes, a scale that is not finite or is negative (`paper`: its sign
                bit is data), or (codecs without scales) a value that is NaN or infinite.
        """
        ...

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool, key: RandomKey | None = None) -> None:
        """Decodes a bucket that `check` lets pass; bit for bit the same everywhere.

        Args:
            encoded: of the bucket [start, start + len(out)); not changed.
            start: flat index of out[0].
            out: float32 of shape (n,), contiguous: `out += values` if `add`, else `out[:] = values`.
            add: see `out`.
            key: that of the encoding; only codec `rotated` needs it.

        Raises:
            CodecError: another number of bytes or scales, which is found without `check` too, or a missing key.
        """
        ...
