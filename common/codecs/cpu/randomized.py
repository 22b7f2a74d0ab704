"""Kernels of the codec `randomized`: one pass over a bucket, block by block, at most a piece of a block at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.levels import draw_levels, draw_short_fields
from common.codecs.cpu.packing import GROUP, Bytes, Words, extend_signs, pack, piece_end, unpack
from common.codecs.cpu.prefetch import prefetch_ahead, prefetch_bytes
from common.codecs.cpu.scales import BLOCKS, block_end, find_scale, level_factors

_KEY = ("uint32", "uint32")
_LONG_TOP = np.float32(32767)


@kernel(
    *("int64", "const float32[]", "int64", *_KEY, "int64", *BLOCKS, "int64"),
    *("float32[]", "uint8[]", "uint64[]", "float64[]"),
)
def encode_short(
    values: Float32,
    start: int,
    first_word: int,
    second_word: int,
    bits: int,
    length: int,
    edges: NDArray[np.int64],
    first_block: int,
    norm: int,
    scales: Float32,
    payload: Bytes,
    groups: Words,
    room: NDArray[np.float64],
) -> int:
    """Encodes a bucket in 2 to 8 bits.

    Args:
        values: float32 of shape (n,).
        start: flat index of values[0].
        first_word, second_word: of the key.
        bits: of a field.
        length, edges, first_block: see `block_end`.
        norm: LINF, L2 or MEASURED.
        scales: one per block; read if MEASURED, else written.
        payload: written.
        groups: room for a piece of fields, see `packing.room_for_fields`.
        room: see `scales.room_for_sums`.

    Returns:
        The first block that `find_scale` refuses, counted from 0; -1 if there is none.
    """
    n, words, scale_words, fields = values.size, values.view(np.int32), scales.view(np.int32), groups.view(np.int8)
    top = np.float32((1 << (bits - 1)) - 1)
    begin = piece = 0
    for k in range(scales.size):
        end = block_end(k, start, n, length, edges, first_block)
        if not find_scale(values[begin:end], words[begin:end], norm, scales[k:], scale_words[k:], room):
            return k
        first, second = level_factors(scales[k], top)
        while begin < end:
            stop = min(end, piece_end(piece, n))
            prefetch_ahead(values, begin, stop)
            prefetch_bytes(payload, begin * bits // 8, stop * bits // 8)
            index = np.uint32(start + begin + first_word)
            target = fields[begin - piece : stop - piece]
            draw_short_fields(values[begin:stop], index, np.uint32(second_word), first, second, top, target)
            begin = stop
            if stop == piece_end(piece, n):
                pack(groups, fields, stop - piece, bits, payload, piece // GROUP * bits)
                piece = stop
    return -1


@kernel(
    *("int64", "const float32[]", "int64", *_KEY, *BLOCKS, "int64"),
    *("float32[]", "int16[]", "int32[]", "float64[]"),
)
def encode_long(
    values: Float32,
    start: int,
    first_word: int,
    second_word: int,
    length: int,
    edges: NDArray[np.int64],
    first_block: int,
    norm: int,
    scales: Float32,
    payload: NDArray[np.int16],
    levels: NDArray[np.int32],
    room: NDArray[np.float64],
) -> int:
    """Encodes a bucket in 16 bits; `levels` is room for those of a piece, for the rest see `encode_short`."""
    n, words, scale_words, stream = values.size, values.view(np.int32), scales.view(np.int32), payload.view(np.uint8)
    begin = 0
    for k in range(scales.size):
        end = block_end(k, start, n, length, edges, first_block)
        if not find_scale(values[begin:end], words[begin:end], norm, scales[k:], scale_words[k:], room):
            return k
        first, second = level_factors(scales[k], _LONG_TOP)
        while begin < end:
            stop = piece_end(begin, end)
            prefetch_ahead(values, begin, stop)
            prefetch_bytes(stream, 2 * begin, 2 * stop)
            index = np.uint32(start + begin + first_word)
            draw_levels(values[begin:stop], index, np.uint32(second_word), first, second, _LONG_TOP, levels)
            with_signs(values[begin:stop], levels, payload[begin:stop])
            begin = stop
    return -1


@helper
def with_signs(values: Float32, levels: NDArray[np.int32], fields: NDArray[np.int16]) -> None:
    """The level of each value with the value's sign."""
    for i in range(values.size):
        fields[i] = np.int16(-levels[i] if values[i] < np.float32(0) else levels[i])


@kernel("void", "const uint8[]", "const float32[]", "int64", "int64", *BLOCKS, "float32[]", "boolean", "uint64[]")
def decode_short(
    payload: Bytes,
    scales: Float32,
    start: int,
    bits: int,
    length: int,
    edges: NDArray[np.int64],
    first_block: int,
    out: Float32,
    add: bool,
    groups: Words,
) -> None:
    """Decodes a bucket of fields of 2 to 8 bits onto `out`; for the arguments see `encode_short`."""
    n, bytes_, fields = out.size, payload.view(np.int8), groups.view(np.int8)
    unit = np.float32(np.float32(1) / np.float32((1 << (bits - 1)) - 1))
    begin = piece = piece_stop = 0
    for k in range(scales.size):
        end = block_end(k, start, n, length, edges, first_block)
        while begin < end:
            if begin == piece_stop:
                piece, piece_stop = begin, piece_end(begin, n)
                if bits != 8:
                    unpack(payload, piece // GROUP * bits, bits, groups, piece_stop - piece)
                    extend_signs(groups, piece_stop - piece, bits)
            stop = min(end, piece_stop)
            if bits == 8:
                put(bytes_[begin:stop], unit, scales[k], out[begin:stop], add)
            else:
                put(fields[begin - piece : stop - piece], unit, scales[k], out[begin:stop], add)
            begin = stop


@kernel("void", "const int16[]", "const float32[]", "int64", *BLOCKS, "float32[]", "boolean")
def decode_long(
    payload: NDArray[np.int16],
    scales: Float32,
    start: int,
    length: int,
    edges: NDArray[np.int64],
    first_block: int,
    out: Float32,
    add: bool,
) -> None:
    """Decodes a bucket of fields of 16 bits onto `out`; for the arguments see `encode_short`."""
    unit = np.float32(np.float32(1) / _LONG_TOP)
    begin = 0
    for k in range(scales.size):
        end = block_end(k, start, out.size, length, edges, first_block)
        put(payload[begin:end], unit, scales[k], out[begin:end], add)
        begin = end


@helper
def put(
    fields: NDArray[np.int8] | NDArray[np.int16], unit: np.float32, scale: np.float32, out: Float32, add: bool
) -> None:
    """Adds the values of a block's fields to `out`, or writes them there."""
    if add:
        for i in range(out.size):
            out[i] += np.float32(np.float32(np.float32(fields[i]) * unit) * scale)
    else:
        for i in range(out.size):
            out[i] = np.float32(np.float32(np.float32(fields[i]) * unit) * scale)
