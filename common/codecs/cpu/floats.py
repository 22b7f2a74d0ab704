"""Kernels of the codecs without scales: conversion and the search for values that must not travel, in one pass."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.packing import PIECE, piece_end

Words32 = NDArray[np.uint32]
Words16 = NDArray[np.uint16]

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_MAGNITUDE_16 = np.uint16(0x7FFF)
_HALF_INFINITE = np.uint32(0x7C00)
_SMALLEST_NORMAL = np.uint32(0x38800000)
"""2^-14 in float32: below it fp16 is denormal."""


@kernel("uint32", "const uint32[]", "uint32")
def largest_word(words: Words32, mask: int) -> int:
    """The largest number that is left of the words under the mask; with 0x7FFFFFFF it is the largest magnitude.

    Magnitudes of float32 rise with their integers; those of infinity and NaN are the largest.
    """
    largest = np.uint32(0)
    for i in range(words.size):
        largest = max(largest, np.uint32(words[i] & np.uint32(mask)))
    return int(largest)


@kernel("uint16", "const uint16[]")
def largest_half(words: Words16) -> int:
    """The largest magnitude of fp16 or bf16 numbers, as an integer."""
    largest = np.uint16(0)
    for i in range(words.size):
        largest = max(largest, np.uint16(words[i] & _MAGNITUDE_16))
    return int(largest)


@kernel("uint32", "const uint32[]", "uint32[]")
def copy_words(words: Words32, out: Words32) -> int:
    """Copies; returns the largest magnitude as an integer."""
    largest = np.uint32(0)
    for i in range(words.size):
        largest = max(largest, np.uint32(words[i] & _MAGNITUDE))
        out[i] = words[i]
    return int(largest)


@kernel("uint32", "const uint32[]", "uint16[]")
def to_bf16(words: Words32, out: Words16) -> int:
    """Rounds float32 to bf16, ties to even; returns the largest magnitude as an integer."""
    largest = np.uint32(0)
    for i in range(words.size):
        word = words[i]
        largest = max(largest, np.uint32(word & _MAGNITUDE))
        # Half a unit less one, plus the lowest bit that stays. Finite words cannot overflow 32 bits.
        odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(np.uint32(np.uint32(word + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
    return int(largest)


@kernel("uint32", "const float32[]", "const uint32[]", "uint16[]")
def to_fp16(values: Float32, words: Words32, out: Words16) -> int:
    """Rounds float32 to fp16, ties to even; `words` is the memory of `values`. Returns as `to_bf16`."""
    largest = np.uint32(0)
    for i in range(words.size):
        magnitude = np.uint32(words[i] & _MAGNITUDE)
        largest = max(largest, magnitude)
        # As for bf16, with 13 bits to go and the exponent's bias changed from 127 to 15.
        odd = np.uint32(np.uint32(magnitude >> np.uint32(13)) & np.uint32(1))
        normal = np.uint32(np.uint32(magnitude + odd) + np.uint32(0xC8000FFF)) >> np.uint32(13)
        # Denormal numbers are multiples of 2^-24.
        denormal = np.uint32(np.int32(np.rint(min(np.float32(abs(values[i]) * np.float32(2**24)), np.float32(2048)))))
        half = denormal if magnitude < _SMALLEST_NORMAL else normal
        out[i] = np.uint16(np.uint32(half | np.uint32(np.uint32(words[i] >> np.uint32(16)) & np.uint32(0x8000))))
    return int(largest)


@kernel("void", "const float32[]", "float32[]", "boolean")
def put_floats(values: Float32, out: Float32, add: bool) -> None:
    """Adds float32 to `out`, or copies them there."""
    if add:
        for i in range(out.size):
            out[i] += values[i]
    else:
        for i in range(out.size):
            out[i] = values[i]


@kernel("void", "const uint16[]", "float32[]", "boolean", "uint32[]")
def put_bf16(halves: Words16, out: Float32, add: bool, room: Words32) -> None:
    """Adds bf16 to `out`, or writes them there; `room` is for a piece of words."""
    for begin in range(0, out.size, PIECE):
        part = halves[begin : piece_end(begin, out.size)]
        for i in range(part.size):
            room[i] = np.uint32(part[i]) << np.uint32(16)
        put_scaled(room.view(np.float32), np.float32(1), out[begin : begin + part.size], add)


@kernel("void", "const uint16[]", "float32[]", "boolean", "uint32[]")
def put_fp16(halves: Words16, out: Float32, add: bool, room: Words32) -> None:
    """As `put_bf16`: the fields of an fp16, moved to where float32 has them, are the number times 2^-112."""
    for begin in range(0, out.size, PIECE):
        part = halves[begin : piece_end(begin, out.size)]
        for i in range(part.size):
            half = np.uint32(part[i])
            word = np.uint32(np.uint32(half & np.uint32(0x7FFF)) << np.uint32(13))
            infinite = np.uint32(0x7F800000) if np.uint32(half & np.uint32(0x7FFF)) >= _HALF_INFINITE else np.uint32(0)
            room[i] = word | infinite | np.uint32(np.uint32(half & np.uint32(0x8000)) << np.uint32(16))
        put_scaled(room.view(np.float32), np.float32(2.0**112), out[begin : begin + part.size], add)


def room_for_words() -> Words32:
    """Memory for a piece of words; they need not be set."""
    return np.empty(PIECE, np.uint32)


@helper
def put_scaled(values: Float32, factor: np.float32, out: Float32, add: bool) -> None:
    """Adds exact products to `out`, or writes them there."""
    if add:
        for i in range(out.size):
            out[i] += np.float32(values[i] * factor)
    else:
        for i in range(out.size):
            out[i] = np.float32(values[i] * factor)
