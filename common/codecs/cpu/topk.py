"""Kernels of the codec `topk`: the k largest magnitudes of a block, by binary search for the smallest of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.packing import Bytes
from common.codecs.cpu.scales import largest_word

Halves = NDArray[np.uint16]
Words = NDArray[np.int32]

_INFINITE = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_CHUNK = 1 << 15


@kernel(
    *("int64", "const float32[]", "int64", "int64", "int64", "int64", "float32[]", "uint8[]", "uint16[]", "uint16[]"),
)
def encode(
    values: Float32,
    block: int,
    whole: int,
    last: int,
    bits: int,
    kept: Float32,
    places: Bytes,
    upper: Halves,
    lower: Halves,
) -> int:
    """Encodes a bucket.

    Args:
        values: float32 of shape (n,).
        block: elements of a block, at most 2^16.
        whole, last: how many are sent of a whole block, and of a shorter last one.
        bits: of a place.
        kept: written; the values that are sent.
        places: written; where they lie in their blocks.
        upper, lower: room for a block each.

    Returns:
        Where the first block begins that has a value which is not finite; else -1.
    """
    words, n = values.view(np.int32), values.size
    sent = at = 0
    for begin in range(0, n, block):
        end = min(begin + block, n)
        count = whole if end - begin == block else last
        if largest_word(words[begin:end]) >= _INFINITE:
            return begin
        least, ties = least_of(words[begin:end], count, upper, lower)
        size = (count * bits + 7) // 8
        take(words[begin:end], values[begin:end], least, ties, bits, kept[sent : sent + count], places[at : at + size])
        sent, at = sent + count, at + size
    return -1


@helper
def least_of(words: Words, count: int, upper: Halves, lower: Halves) -> tuple[np.int32, int]:
    """The magnitude of rank `count`, as a word, and how many that equal it are among the `count` largest."""
    for i in range(words.size):
        upper[i] = np.uint16((words[i] & _MAGNITUDE) >> np.int32(16))
    high = rank(upper[: words.size], count)
    above = 0 if high == 0x7FFF else at_least(upper[: words.size], np.uint16(high + 1))
    candidates = 0
    for i in range(words.size):
        if upper[i] == high:
            lower[candidates] = np.uint16(words[i] & np.int32(0xFFFF))
            candidates += 1
    low = rank(lower[:candidates], count - above)
    above += 0 if low == 0xFFFF else at_least(lower[:candidates], np.uint16(low + 1))
    return np.int32(high << 16 | low), count - above


@helper
def rank(halves: Halves, count: int) -> int:
    """The largest number that at least `count` of these reach."""
    found = 0
    for bit in range(15, -1, -1):
        if at_least(halves, np.uint16(found | 1 << bit)) >= count:
            found |= 1 << bit
    return found


@helper
def at_least(halves: Halves, bound: np.uint16) -> int:
    """How many reach the bound."""
    total = 0
    for begin in range(0, halves.size, _CHUNK):
        part = halves[begin : min(begin + _CHUNK, halves.size)]
        count = np.uint16(0)
        for i in range(part.size):
            count = np.uint16(count + np.uint16(part[i] >= bound))
        total += int(count)
    return total


@helper
def take(words: Words, values: Float32, least: np.int32, ties: int, bits: int, kept: Float32, places: Bytes) -> None:
    """Writes the values above `least` and the first `ties` that equal it, and their places."""
    sent = at = 0
    stream, filled = np.uint64(0), 0
    for i in range(words.size):
        magnitude = np.int32(words[i] & _MAGNITUDE)
        if magnitude >= least:
            if magnitude == least:
                if ties == 0:
                    continue
                ties -= 1
            kept[sent] = values[i]
            sent += 1
            stream |= np.uint64(i) << np.uint64(filled)
            filled += bits
            while filled >= 8:
                places[at] = np.uint8(stream)
                stream >>= np.uint64(8)
                filled -= 8
                at += 1
    if filled > 0:
        places[at] = np.uint8(stream)


@kernel("int64", "const uint8[]", "int64", "int64", "int64", "int64", "int64")
def first_disorder(places: Bytes, n: int, block: int, whole: int, last: int, bits: int) -> int:
    """Where the first block begins whose places do not rise, or leave it; -1 if there is none."""
    at = 0
    for begin in range(0, n, block):
        length = min(block, n - begin)
        count = whole if length == block else last
        stream, filled, before = np.uint64(0), 0, -1
        for _ in range(count):
            while filled < bits:
                stream |= np.uint64(places[at]) << np.uint64(filled)
                filled += 8
                at += 1
            place = int(stream & np.uint64((1 << bits) - 1))
            stream >>= np.uint64(bits)
            filled -= bits
            if not before < place < length:
                return begin
            before = place
    return -1


@kernel("void", "const float32[]", "const uint8[]", "int64", "int64", "int64", "int64", "float32[]", "boolean")
def decode(kept: Float32, places: Bytes, block: int, whole: int, last: int, bits: int, out: Float32, add: bool) -> None:
    """Decodes a bucket onto `out`; for the arguments see `encode`. Places behind a block's end are passed over."""
    sent = at = 0
    if not add:
        for i in range(out.size):
            out[i] = np.float32(0)
    for begin in range(0, out.size, block):
        part = out[begin : min(begin + block, out.size)]
        count = whole if part.size == block else last
        stream, filled = np.uint64(0), 0
        for _ in range(count):
            while filled < bits:
                stream |= np.uint64(places[at]) << np.uint64(filled)
                filled += 8
                at += 1
            place = int(stream & np.uint64((1 << bits) - 1))
            stream >>= np.uint64(bits)
            filled -= bits
            if place < part.size:
                part[place] = part[place] + kept[sent] if add else kept[sent]
            sent += 1


def room_for_halves(block: int) -> Halves:
    """Memory for half a block's words; they need not be set."""
    return np.empty(block, np.uint16)
