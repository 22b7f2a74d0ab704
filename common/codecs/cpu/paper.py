"""Kernels of the codec `paper`: a bucket lies within one block, whose scale was measured ahead."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.levels import draw_levels
from common.codecs.cpu.packing import GROUP, PIECE, Bytes, Words, pack, piece_end, unpack
from common.codecs.cpu.prefetch import prefetch_ahead, prefetch_bytes
from common.codecs.cpu.scales import level_factors, within

_KEY = ("uint32", "uint32")
_LONG_TOP = np.int32(65536)
_LONG_BITS = 16


@kernel(
    *("int64", "const float32[]", "int64", *_KEY, "int64", "float32[]"),
    *("uint8[]", "uint8[]", "int32[]", "uint64[]", "uint64[]"),
)
def encode_paper_short(
    values: Float32,
    start: int,
    first_word: int,
    second_word: int,
    bits: int,
    scale: Float32,
    signs: Bytes,
    magnitudes: Bytes,
    levels: NDArray[np.int32],
    sign_groups: Words,
    groups: Words,
) -> int:
    """Encodes a bucket in 2 to 8 bits and a sign bit.

    Args:
        values: float32 of shape (n,).
        start: flat index of values[0].
        first_word, second_word: of the key.
        bits: of a level.
        scale: float32 of shape (1,); takes the sign of the element at the highest level.
        signs, magnitudes: written; the two streams of the payload.
        levels: room for those of a piece, see `levels.room_for_levels`.
        sign_groups, groups: room for a piece of fields, see `packing.room_for_fields`.

    Returns:
        How many elements are at the highest level; more than one is an error. -1 if a value or the scale is not finite,
        or a value exceeds the scale.
    """
    n, top, fields, at_top = values.size, np.int32(1 << bits), groups.view(np.int8), 0
    words, largest = values.view(np.int32), scale.view(np.int32)[0]
    first, second = level_factors(scale[0], np.float32(top))
    for begin in range(0, n, PIECE):
        stop = piece_end(begin, n)
        if not within(words[begin:stop], largest):
            return -1
        prefetch_ahead(values, begin, stop)
        prefetch_bytes(magnitudes, begin * bits // 8, stop * bits // 8)
        index = np.uint32(start + begin + first_word)
        draw_levels(values[begin:stop], index, np.uint32(second_word), first, second, np.float32(top), levels)
        at_top += take_signs(values[begin:stop], levels, top, scale, sign_groups.view(np.int8))
        pack(sign_groups, sign_groups.view(np.int8), stop - begin, 1, signs, begin // GROUP)
        for i in range(stop - begin):
            fields[i] = np.int8(levels[i])  # the highest level is 0 in the bits that travel
        pack(groups, fields, stop - begin, bits, magnitudes, begin // GROUP * bits)
    return at_top


@kernel(
    *("int64", "const float32[]", "int64", *_KEY, "float32[]"),
    *("uint8[]", "uint16[]", "int32[]", "uint64[]"),
)
def encode_paper_long(
    values: Float32,
    start: int,
    first_word: int,
    second_word: int,
    scale: Float32,
    signs: Bytes,
    magnitudes: NDArray[np.uint16],
    levels: NDArray[np.int32],
    sign_groups: Words,
) -> int:
    """Encodes a bucket in 16 bits and a sign bit; see `encode_paper_short`."""
    n, at_top = values.size, 0
    words, largest = values.view(np.int32), scale.view(np.int32)[0]
    first, second = level_factors(scale[0], np.float32(_LONG_TOP))
    for begin in range(0, n, PIECE):
        stop = piece_end(begin, n)
        if not within(words[begin:stop], largest):
            return -1
        prefetch_ahead(values, begin, stop)
        index = np.uint32(start + begin + first_word)
        draw_levels(values[begin:stop], index, np.uint32(second_word), first, second, np.float32(_LONG_TOP), levels)
        at_top += take_signs(values[begin:stop], levels, _LONG_TOP, scale, sign_groups.view(np.int8))
        pack(sign_groups, sign_groups.view(np.int8), stop - begin, 1, signs, begin // GROUP)
        part = magnitudes[begin:stop]
        for i in range(part.size):
            part[i] = np.uint16(levels[i])
    return at_top


@helper
def take_signs(
    values: Float32, levels: NDArray[np.int32], top: np.int32, scale: Float32, signs: NDArray[np.int8]
) -> int:
    """Sign bits of a piece; an element at the highest level has one, and its sign becomes the scale's.

    Returns:
        How many elements are at the highest level.
    """
    at_top = np.int32(0)
    for i in range(values.size):
        is_top = levels[i] == top
        signs[i] = np.int8(is_top | ((values[i] < np.float32(0)) & (levels[i] > 0)))
        at_top += np.int32(is_top)
    if at_top > 0:
        for i in range(values.size):
            if levels[i] == top:
                scale[0] = np.copysign(scale[0], values[i])
    return int(at_top)


@kernel(
    *("void", "const uint8[]", "const uint8[]", "float32", "int64", "float32[]", "boolean"), *("uint64[]", "uint64[]")
)
def decode_paper_short(
    signs: Bytes,
    magnitudes: Bytes,
    scale: float,
    bits: int,
    out: Float32,
    add: bool,
    sign_groups: Words,
    groups: Words,
) -> None:
    """Decodes a bucket of levels of 2 to 8 bits onto `out`; for the arguments see `encode_paper_short`."""
    unit = np.float32(np.float32(1) / np.float32(1 << bits))
    for begin in range(0, out.size, PIECE):
        stop = piece_end(begin, out.size)
        unpack(signs, begin // GROUP, 1, sign_groups, stop - begin)
        unpack(magnitudes, begin // GROUP * bits, bits, groups, stop - begin)
        put_signed(groups.view(np.uint8), sign_groups.view(np.uint8), unit, np.float32(scale), out[begin:stop], add)


@kernel("void", "const uint8[]", "const uint16[]", "float32", "float32[]", "boolean", "uint64[]")
def decode_paper_long(
    signs: Bytes, magnitudes: NDArray[np.uint16], scale: float, out: Float32, add: bool, sign_groups: Words
) -> None:
    """Decodes a bucket of levels of 16 bits onto `out`; for the arguments see `encode_paper_short`."""
    unit = np.float32(np.float32(1) / np.float32(_LONG_TOP))
    for begin in range(0, out.size, PIECE):
        stop = piece_end(begin, out.size)
        unpack(signs, begin // GROUP, 1, sign_groups, stop - begin)
        put_signed(magnitudes[begin:stop], sign_groups.view(np.uint8), unit, np.float32(scale), out[begin:stop], add)


@helper
def put_signed(
    levels: Bytes | NDArray[np.uint16], signs: Bytes, unit: np.float32, scale: np.float32, out: Float32, add: bool
) -> None:
    """Adds the values of a piece to `out`, or writes them there."""
    magnitude = np.float32(abs(scale))
    for i in range(out.size):
        value = np.float32(np.float32(np.float32(levels[i]) * unit) * magnitude)
        if signs[i] != 0:
            value = scale if levels[i] == 0 else -value
        out[i] = out[i] + value if add else value
