"""Fields to bytes and back, as `common.codecs.packing` defines it, a piece at a time.

A group of eight fields is a 64-bit word, at first with one field to a byte. Three passes over the words join
neighbours: 8 fields of b bits, then 4 of 2b, 2 of 4b, 1 of 8b; the way back takes them apart. They run on as many words
as a vector unit holds; groups then move between words and the stream one by one, b bytes each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.cpu.compile import helper

PIECE = 2048
"""Fields that are packed at a time, a multiple of 8: they and what they are made of stay in a core's first cache."""
GROUP = 8

Words = NDArray[np.uint64]
Bytes = NDArray[np.uint8]

_BYTES = np.uint64(0x00FF00FF00FF00FF)
_PAIRS = np.uint64(0x0000FFFF0000FFFF)
_HALVES = np.uint64(0x00000000FFFFFFFF)
_EVERY_BYTE = np.uint64(0x0101010101010101)
_TOP_BITS = np.uint64(0x8080808080808080)


@helper
def piece_end(begin: int, end: int) -> int:
    """Where the piece that starts at `begin` ends, at the latest at `end`."""
    return min(begin + PIECE, end)


def room_for_fields() -> Words:
    """Memory for the fields of a piece, in groups; they need not be set."""
    return np.empty(PIECE // GROUP, np.uint64)


@helper
def pack(words: Words, fields: NDArray[np.int8], count: int, bits: int, stream: Bytes, at: int) -> None:
    """Packs the low `bits` bits of the first `count` fields to stream[at:].

    Args:
        words: of a piece; overwritten.
        fields: the same memory, one field to a byte.
        count: how many of them.
        bits: 1 to 8.
        stream: of the whole bucket, and not a byte longer.
        at: where the piece starts in it.
    """
    if bits == 8:
        part = stream[at : at + count]
        for i in range(part.size):
            part[i] = np.uint8(fields[i])
        return
    groups = (count + GROUP - 1) // GROUP
    if count % GROUP != 0:
        words[groups - 1] &= (np.uint64(1) << np.uint64(count % GROUP * 8)) - np.uint64(1)
    field = np.uint64(_EVERY_BYTE * np.uint64((1 << bits) - 1))
    first, second, third = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    for g in range(groups):
        word = words[g] & field
        word = (word & _BYTES) | ((word & ~_BYTES) >> first)
        word = (word & _PAIRS) | ((word & ~_PAIRS) >> second)
        words[g] = (word & _HALVES) | ((word & ~_HALVES) >> third)
    # Eight bytes are written where `bits` are meant, and the next group overwrites the rest; but not at the end.
    safe = max(0, min(groups, (stream.size - 8 - at) // bits + 1))
    for g in range(safe):
        write_word(stream, np.uintp(at + g * bits), words[g])
    for g in range(safe, groups):
        for j in range(at + g * bits, min(at + (g + 1) * bits, stream.size)):
            stream[j] = np.uint8(words[g] >> np.uint64(8 * (j - at - g * bits)))


@helper
def unpack(stream: Bytes, at: int, bits: int, words: Words, count: int) -> None:
    """Takes `count` fields from stream[at:] and leaves them in `words`, one to a byte, without sign."""
    groups = (count + GROUP - 1) // GROUP
    safe = max(0, min(groups, (stream.size - 8 - at) // bits + 1))
    for g in range(safe):
        words[g] = read_word(stream, np.uintp(at + g * bits))
    for g in range(safe, groups):
        word = np.uint64(0)
        for j in range(at + g * bits, min(at + (g + 1) * bits, stream.size)):
            word |= np.uint64(stream[j]) << np.uint64(8 * (j - at - g * bits))
        words[g] = word
    first, second, third = np.uint64(8 - bits), np.uint64(16 - 2 * bits), np.uint64(32 - 4 * bits)
    low = (np.uint64(1) << np.uint64(4 * bits)) - np.uint64(1)
    pairs = np.uint64(((1 << (2 * bits)) - 1) * 0x0000000100000001)
    singles = np.uint64(((1 << bits) - 1) * 0x0001000100010001)
    for g in range(groups):
        word = words[g]
        word = (word & low) | ((word << third) & (low << np.uint64(32)))
        word = (word & pairs) | ((word << second) & (pairs << np.uint64(16)))
        words[g] = (word & singles) | ((word << first) & (singles << np.uint64(8)))


@helper
def extend_signs(words: Words, count: int, bits: int) -> None:
    """Makes the first `count` fields in `words`, of `bits` bits, two's complement numbers of 8 bits."""
    sign = np.uint64(_EVERY_BYTE * np.uint64(1 << (bits - 1)))
    for g in range((count + GROUP - 1) // GROUP):
        words[g] = (((words[g] ^ sign) | _TOP_BITS) - sign) ^ _TOP_BITS


@helper
def read_word(stream: Bytes, at: np.uintp) -> np.uint64:
    """Eight bytes from `at` on, the first one lowest; one instruction."""
    word = np.uint64(stream[at])
    word |= np.uint64(stream[at + np.uintp(1)]) << np.uint64(8)
    word |= np.uint64(stream[at + np.uintp(2)]) << np.uint64(16)
    word |= np.uint64(stream[at + np.uintp(3)]) << np.uint64(24)
    word |= np.uint64(stream[at + np.uintp(4)]) << np.uint64(32)
    word |= np.uint64(stream[at + np.uintp(5)]) << np.uint64(40)
    word |= np.uint64(stream[at + np.uintp(6)]) << np.uint64(48)
    word |= np.uint64(stream[at + np.uintp(7)]) << np.uint64(56)
    return word


@helper
def write_word(stream: Bytes, at: np.uintp, word: np.uint64) -> None:
    """The inverse of `read_word`."""
    stream[at] = np.uint8(word)
    stream[at + np.uintp(1)] = np.uint8(word >> np.uint64(8))
    stream[at + np.uintp(2)] = np.uint8(word >> np.uint64(16))
    stream[at + np.uintp(3)] = np.uint8(word >> np.uint64(24))
    stream[at + np.uintp(4)] = np.uint8(word >> np.uint64(32))
    stream[at + np.uintp(5)] = np.uint8(word >> np.uint64(40))
    stream[at + np.uintp(6)] = np.uint8(word >> np.uint64(48))
    stream[at + np.uintp(7)] = np.uint8(word >> np.uint64(56))
