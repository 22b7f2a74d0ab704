"""Fields of b bits to bytes and back; the definition is that of `common.codecs.packing`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs import Bytes
from common.codecs.packing import packed_bytes

Fields = NDArray[np.uint8] | NDArray[np.uint16]
Integers = NDArray[np.integer[Any] | np.bool_]

_GROUP = 8


def pack(numbers: Integers, bits: int) -> bytes:
    """Packs the low `bits` bits of each number, for negative ones those of their two's complement.

    Args:
        numbers: integers or bools of shape (n,).
        bits: 1 to 8, or 16.
    """
    if bits == 16:
        return numbers.astype("<u2").tobytes()
    if bits == 8:
        return numbers.astype(np.uint8).tobytes()
    n = len(numbers)
    padded = np.zeros(-(-n // _GROUP) * _GROUP, np.uint8)
    padded[:n] = numbers
    padded &= np.uint8((1 << bits) - 1)
    words = padded.view("<u8")
    # Each pass joins neighbours: 8 fields of b bits, then 4 of 2b, 2 of 4b, 1 of 8b, all within a 64-bit word.
    for lane in (8, 16, 32):
        low = _every(2 * lane, (1 << lane) - 1)
        words = (words & low) | ((words & ~low) >> np.uint64(lane - bits * lane // 8))
    stream = words.astype("<u8", copy=False).view(np.uint8).reshape(-1, _GROUP)[:, :bits]
    return stream.reshape(-1)[: packed_bytes(n, bits)].tobytes()


def unpack(payload: bytes | bytearray | memoryview | Bytes, n: int, bits: int) -> Fields:
    """The inverse of `pack`.

    Args:
        payload: `packed_bytes(n, bits)` bytes; not copied where a field is a whole byte.
        n: number of fields.
        bits: 1 to 8, or 16.

    Returns:
        Fields of shape (n,), uint8 or (16 bits) uint16; possibly a read-only view of `payload`.
    """
    if bits == 16:
        return np.frombuffer(payload, "<u2", n).astype(np.uint16, copy=False)
    stream = np.frombuffer(payload, np.uint8, packed_bytes(n, bits))
    if bits == 8:
        return stream
    groups = -(-n // _GROUP)
    padded = np.zeros((groups, _GROUP), np.uint8)
    whole = len(stream) // bits
    padded[:whole, :bits] = stream[: whole * bits].reshape(-1, bits)
    rest = stream[whole * bits :]
    padded[whole:, : len(rest)] = rest
    words = padded.reshape(-1).view("<u8")
    for lane in (32, 16, 8):
        width = bits * lane // 8
        low = _every(2 * lane, (1 << width) - 1)
        words = (words & low) | ((words << np.uint64(lane - width)) & (low << np.uint64(lane)))
    return words.astype("<u8", copy=False).view(np.uint8)[:n]


def signed(fields: Fields, bits: int) -> NDArray[np.int8] | NDArray[np.int16]:
    """Reads fields as two's complement numbers of `bits` bits; int8 or (16 bits) int16 of shape (n,)."""
    if bits == 16:
        return fields.view(np.int16)
    if bits == 8:
        return fields.view(np.int8)
    sign_bit = np.uint8(1 << (bits - 1))
    return ((fields ^ sign_bit) - sign_bit).view(np.int8)


@cache
def _every(period: int, mask: int) -> np.uint64:
    """`mask` repeated every `period` bits of a 64-bit word."""
    return np.uint64(sum(mask << position for position in range(0, 64, period)))
