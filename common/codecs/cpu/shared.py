"""Kernels of the codec `shared` and of the sums that its servers send: integers to fields and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper, kernel
from common.codecs.cpu.packing import GROUP, PIECE, Bytes, Words, extend_signs, pack, piece_end, unpack

Int8 = NDArray[np.int8]
Int16 = NDArray[np.int16]


@kernel("void", "const uint8[]", "int64", "float32[]", "boolean", "uint64[]")
def decode_short(payload: Bytes, bits: int, out: Float32, add: bool, groups: Words) -> None:
    """Adds the integers of fields of 2 to 8 bits to `out`, or writes them there; `groups` is room for fields."""
    if bits == 8:
        put(payload.view(np.int8), out, add)
        return
    for begin in range(0, out.size, PIECE):
        stop = piece_end(begin, out.size)
        unpack(payload, begin // GROUP * bits, bits, groups, stop - begin)
        extend_signs(groups, stop - begin, bits)
        put(groups.view(np.int8), out[begin:stop], add)


@kernel("void", "const int16[]", "float32[]", "boolean")
def decode_long(payload: Int16, out: Float32, add: bool) -> None:
    """Likewise for fields of 16 bits."""
    put(payload, out, add)


@helper
def put(fields: Int8 | Int16, out: Float32, add: bool) -> None:
    """Adds integers to `out`, or writes them there."""
    if add:
        for i in range(out.size):
            out[i] += np.float32(fields[i])
    else:
        for i in range(out.size):
            out[i] = np.float32(fields[i])


@kernel("int32", "const uint8[]", "int64", "int64", "uint64[]")
def largest_short(payload: Bytes, n: int, bits: int, groups: Words) -> int:
    """The largest magnitude among n fields of 2 to 8 bits."""
    if bits == 8:
        return int(largest_of(payload.view(np.int8)))
    largest = np.int32(0)
    for begin in range(0, n, PIECE):
        stop = piece_end(begin, n)
        unpack(payload, begin // GROUP * bits, bits, groups, stop - begin)
        extend_signs(groups, stop - begin, bits)
        largest = max(largest, largest_of(groups.view(np.int8)[: stop - begin]))
    return int(largest)


@kernel("int32", "const int16[]")
def largest_long(payload: Int16) -> int:
    """Likewise for fields of 16 bits."""
    return int(largest_of(payload))


@helper
def largest_of(fields: Int8 | Int16) -> np.int32:
    """The largest magnitude."""
    largest = np.int32(0)
    for i in range(fields.size):
        largest = max(largest, np.int32(abs(np.int32(fields[i]))))
    return largest


@kernel("boolean", "const float32[]", "int64", "float32", "uint8[]", "uint64[]")
def encode_short(values: Float32, bits: int, largest: float, payload: Bytes, groups: Words) -> bool:
    """Packs integers to fields of 2 to 8 bits; False if one is no integer or exceeds `largest`."""
    right, fields = True, groups.view(np.int8)
    for begin in range(0, values.size, PIECE):
        stop = piece_end(begin, values.size)
        right &= narrow(values[begin:stop], np.float32(largest), fields)
        pack(groups, fields, stop - begin, bits, payload, begin // GROUP * bits)
    return right


@kernel("boolean", "const float32[]", "float32", "int16[]")
def encode_long(values: Float32, largest: float, payload: Int16) -> bool:
    """Likewise for fields of 16 bits."""
    return narrow(values, np.float32(largest), payload)


@helper
def narrow(values: Float32, largest: np.float32, fields: Int8 | Int16) -> bool:
    """Integers as fields; False if one is none or exceeds `largest`."""
    wrong = np.int32(0)
    for i in range(values.size):
        x = values[i]
        inside = np.float32(abs(x)) <= largest
        number = np.int32(x) if inside else np.int32(0)
        fields[i] = number
        wrong |= np.int32(not inside) | np.int32(np.float32(number) != x)
    return bool(wrong == 0)


@kernel("void", "const float32[]", "const float32[]", "int64", "float32", "float32[]")
def average(sums: Float32, scales: Float32, block: int, unit: float, out: Float32) -> None:
    """out = (sums * unit) * scale of the block; `out` may be `sums`. Zero scales give +0."""
    for k in range(scales.size):
        begin, end = k * block, min((k + 1) * block, out.size)
        source, target, scale = sums[begin:end], out[begin:end], scales[k]
        for i in range(target.size):
            target[i] = np.float32(np.float32(np.float32(source[i] * np.float32(unit)) * scale) + np.float32(0))
