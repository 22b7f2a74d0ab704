"""Fields of b bits to bytes and back: a little-endian bit stream, and the memory that it travels in.

Field i occupies the bits [b*i, b*(i+1)) of the stream; bit j of the stream is bit j % 8 of byte j // 8; the bits after
the last field are zero. So 8 bits are a byte each, 16 a little-endian word, 4 two to a byte with the first in the low
nibble. Eight fields fill b whole bytes: streams that start at multiples of 8 fields can be cut and joined.
"""

from __future__ import annotations

import numpy as np

from common.codecs.base import Bytes, Encoded
from common.errors import CodecError, refusal


def packed_bytes(n: int, bits: int) -> int:
    """Length of n packed fields."""
    return (n * bits + 7) // 8


def memory_for(payload: Bytes | None, size: int) -> Bytes:
    """The memory that an encoder is given for its payload, or new one.

    Raises:
        CodecError: it is no contiguous, writable uint8 of shape (size,).
    """
    if payload is None:
        return np.empty(size, np.uint8)
    if payload.dtype != np.uint8 or payload.shape != (size,) or not payload.flags.carray:
        got = f"{payload.dtype}{list(payload.shape)}, contiguous={payload.flags.c_contiguous}"
        raise CodecError(refusal(f"writable uint8[{size}]", "payload", f"{got}, writable={payload.flags.writeable}"))
    return payload


def stream_of(encoded: Encoded, size: int, scales: int) -> Bytes:
    """The payload of a bucket as bytes, not copied. Kernels trust its size, so this does not rely on `Codec.check`.

    Raises:
        CodecError: other sizes than these.
    """
    stream = np.frombuffer(encoded.payload, np.uint8)
    if len(stream) != size or len(encoded.scales) != scales:
        got = f"{len(stream)} bytes, {len(encoded.scales)} scales"
        raise CodecError(refusal(f"{size} bytes, {scales} scales", "bucket", got))
    return stream
