"""Kernels of the codec `sign`: a mean magnitude per block and a bit per element."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.centroids import look_up
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.packing import GROUP, PIECE, Bytes, Words, pack, piece_end
from common.codecs.cpu.prefetch import prefetch_ahead
from common.codecs.cpu.scales import LANES, fold, largest_word

Float64 = NDArray[np.float64]

_INFINITE = np.int32(0x7F800000)


@kernel("int64", "const float32[]", "int64", "float32[]", "uint8[]", "uint64[]", "float64[]")
def encode(values: Float32, block: int, scales: Float32, payload: Bytes, groups: Words, lanes: Float64) -> int:
    """Encodes a bucket.

    Args:
        values: float32 of shape (n,).
        block: elements of a block, a multiple of 8.
        scales: written; one per block.
        payload: written.
        groups: room for fields, see `packing.room_for_fields`.
        lanes: room for 64 sums.

    Returns:
        Where the first block begins that has a value which is not finite; else -1.
    """
    words, fields = values.view(np.int32), groups.view(np.int8)
    for k in range(scales.size):
        begin, end = k * block, min((k + 1) * block, values.size)
        prefetch_ahead(values, begin, end)
        if largest_word(words[begin:end]) >= _INFINITE:
            return begin
        scales[k] = np.float32(sum_of_magnitudes(values[begin:end], lanes) / (end - begin))
        while begin < end:
            stop = piece_end(begin, end)
            signs(values[begin:stop], fields)
            pack(groups, fields, stop - begin, 1, payload, begin // GROUP)
            begin = stop
    return -1


@helper
def sum_of_magnitudes(values: Float32, lanes: Float64) -> float:
    """In float64: lane j of 64 adds the elements j, 64 + j, ..., then the lanes are added in halves."""
    lanes[:] = 0.0
    for row in range(0, values.size, LANES):
        add_magnitudes(values[row : min(row + LANES, values.size)], lanes)
    return fold(lanes, LANES)


@helper
def add_magnitudes(values: Float32, lanes: Float64) -> None:
    """Adds each magnitude to its lane."""
    for j in range(values.size):
        lanes[j] += np.float64(abs(values[j]))


@helper
def signs(values: Float32, fields: NDArray[np.int8]) -> None:
    """1 for each negative value, else 0."""
    for i in range(values.size):
        fields[i] = np.int8(values[i] < np.float32(0))


@kernel("void", "const uint8[]", "const float32[]", "int64", "const float32[]", "float32[]", "boolean", "float32[]")
def decode(payload: Bytes, scales: Float32, block: int, table: Float32, out: Float32, add: bool, room: Float32) -> None:
    """Decodes a bucket onto `out`.

    Args:
        payload, scales: as encoded.
        block: elements of a block, a multiple of 8.
        table: 1 and -1 for all patterns of eight signs, see `centroids.look_up`.
        out: float32 of shape (n,).
        add: to `out`, or else written there.
        room: for PIECE elements.
    """
    for k in range(scales.size):
        begin, end, scale = k * block, min((k + 1) * block, out.size), scales[k]
        while begin < end:
            stop = piece_end(begin, end)
            look_up(payload[begin // GROUP : (stop + GROUP - 1) // GROUP], 1, table, room)
            put_scaled(room, scale, out[begin:stop], add)
            begin = stop


@helper
def put_scaled(values: Float32, factor: np.float32, out: Float32, add: bool) -> None:
    """Adds products to `out`, or writes them there."""
    if add:
        for i in range(out.size):
            out[i] += np.float32(values[i] * factor)
    else:
        for i in range(out.size):
            out[i] = np.float32(values[i] * factor)


def room_for_signs() -> Float32:
    """Memory for the signs of a piece; they need not be set."""
    return np.empty(PIECE, np.float32)
