"""Kernels of the codec `rotated`: one pass over a bucket, piece by piece; a piece stays in a core's first caches."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.centroids import choose, fields_of, look_up
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.hadamard import TILE, hadamard
from common.codecs.cpu.packing import GROUP, PIECE, Bytes, Words, pack
from common.codecs.cpu.prefetch import prefetch_ahead
from common.codecs.cpu.scales import largest_word
from common.codecs.cpu.signs import RUN, SECOND_SET, Words32, draw_runs, put_signed

_KEY = ("uint32", "uint32")
_INFINITE = np.int32(0x7F800000)
_MANTISSA = np.int32(23)


@helper
def piece_length(rest: int, block: int) -> int:
    """Elements of the next piece where `rest` are left: a block, or a smaller power of two; 0 for less than 64."""
    if rest >= block:
        return block
    length, power = 0, TILE
    while power <= rest:
        length, power = power, 2 * power
    return length


def rooms(block: int) -> tuple[Float32, Words32]:
    """Memory for a piece and the signs of its elements; it need not be set."""
    return np.empty(block, np.float32), np.empty(block // RUN, np.uint32)


@kernel(
    *("int64", "const float32[]", "int64", *_KEY, "int64", "int64", "const float32[]", "const float32[]", "float32"),
    *("float32[]", "uint8[]", "float32[]", "uint32[]", "float32[]", "uint64[]"),
)
def encode(
    values: Float32,
    start: int,
    first_word: int,
    second_word: int,
    bits: int,
    block: int,
    centroids: Float32,
    bounds: Float32,
    limit: float,
    scales: Float32,
    payload: Bytes,
    room: Float32,
    signs: Words32,
    chosen: Float32,
    groups: Words,
) -> int:
    """Encodes the pieces of a bucket.

    Args:
        values: float32 of shape (n,).
        start: flat index of values[0], a multiple of 64.
        first_word, second_word: of the key.
        bits: of a field, 1 to 4.
        block: elements of a whole piece.
        centroids, bounds: see `centroids.choose`.
        limit: of the scales.
        scales: written; one per piece.
        payload: written.
        room, signs: see `rooms`.
        chosen: room for a piece, too.
        groups: room for fields, see `packing.room_for_fields`.

    Returns:
        Where the first piece begins that has a value which is not finite, or a scale beyond the limit; else -1.
    """
    words, scale_words = values.view(np.int32), scales.view(np.int32)
    begin = 0
    for k in range(scales.size):
        length = piece_length(values.size - begin, block)
        stop, y, c = begin + length, room[:length], chosen[:length]
        prefetch_ahead(values, begin, stop)
        largest = largest_word(words[begin:stop])
        if largest >= _INFINITE:
            return begin
        scale_words[k] = unit_word(largest)  # until the scale is known
        unit = np.float64(scales[k])
        rotate(values[begin:stop], (start + begin) // RUN, first_word, second_word, scales[k], signs, y)
        squares = sum_of_products(y, y, c)
        choose(y, np.float32(math.sqrt(np.float64(squares) / length)), bits, centroids, bounds, c)
        pack_fields(y.view(np.int32), c.view(np.int32), bits, groups, payload, begin // GROUP * bits)
        products = sum_of_products(y, c, c)
        if largest > 0:
            scales[k] = np.float32(np.float64(squares) / (np.float64(products) * unit * length))
        else:
            scales[k] = np.float32(0)
        if not scales[k] <= limit:
            return begin
        begin = stop
    return -1


@helper
def unit_word(largest: np.int32) -> np.int32:
    """The power of two, as a word, that brings the largest magnitude, as a word, near 1 without overflow."""
    return np.int32(min(max(np.int32(254) - (largest >> _MANTISSA), np.int32(1)), np.int32(253)) << _MANTISSA)


@helper
def rotate(
    values: Float32, run: int, first_word: int, second_word: int, unit: np.float32, signs: Words32, rotated: Float32
) -> None:
    """rotated = H D2 H D1 (unit * values); `run` is the piece's first one, `signs` room for theirs."""
    runs = signs[: values.size // RUN]
    draw_runs(np.uint32(run + first_word), np.uint32(second_word), runs)
    put_signed(values, runs, unit, rotated, False)
    hadamard(rotated)
    draw_runs(np.uint32(run + SECOND_SET + first_word), np.uint32(second_word), runs)
    put_signed(rotated, runs, np.float32(1), rotated, False)
    hadamard(rotated)


@helper
def sum_of_products(x: Float32, y: Float32, room: Float32) -> np.float32:
    """Sum of |x[i] * y[i]| in float32: the products are added in halves. `room` may be `y`."""
    for i in range(room.size):
        room[i] = np.float32(abs(np.float32(x[i] * y[i])))
    width = room.size
    while width > 1:
        width //= 2
        low, high = room[:width], room[width : 2 * width]
        for i in range(low.size):
            low[i] += high[i]
    total: np.float32 = room[0]
    return total


@helper
def pack_fields(
    words: NDArray[np.int32], chosen: NDArray[np.int32], bits: int, groups: Words, payload: Bytes, at: int
) -> None:
    """The fields of a piece to payload[at:]."""
    for begin in range(0, words.size, PIECE):
        stop = min(begin + PIECE, words.size)
        fields_of(words[begin:stop], chosen[begin:stop], groups.view(np.int8))
        pack(groups, groups.view(np.int8), stop - begin, bits, payload, at + begin // GROUP * bits)


@kernel(
    *("void", "const uint8[]", "const float32[]", "int64", *_KEY, "int64", "int64", "const float32[]"),
    *("float32[]", "boolean", "float32[]", "uint32[]"),
)
def decode(
    payload: Bytes,
    scales: Float32,
    start: int,
    first_word: int,
    second_word: int,
    bits: int,
    block: int,
    table: Float32,
    out: Float32,
    add: bool,
    room: Float32,
    signs: Words32,
) -> None:
    """Decodes the pieces of a bucket onto `out`; `table` is that of `centroids.look_up`, for the rest see `encode`."""
    begin = 0
    for k in range(scales.size):
        length = piece_length(out.size - begin, block)
        rotated, runs, target = room[:length], signs[: length // RUN], out[begin : begin + length]
        run = (start + begin) // RUN
        if scales[k] > np.float32(0):
            look_up(payload[begin // GROUP * bits : (begin + length) // GROUP * bits], bits, table, rotated)
            hadamard(rotated)
            draw_runs(np.uint32(run + SECOND_SET + first_word), np.uint32(second_word), runs)
            put_signed(rotated, runs, np.float32(1.0 / length), rotated, False)
            hadamard(rotated)
            draw_runs(np.uint32(run + first_word), np.uint32(second_word), runs)
            put_signed(rotated, runs, scales[k], target, add)
        else:
            put_zeros(target, add)
        begin += length


@helper
def put_zeros(out: Float32, add: bool) -> None:
    """Adds +0 to `out`, or writes it there."""
    for i in range(out.size):
        out[i] = out[i] + np.float32(0) if add else np.float32(0)
