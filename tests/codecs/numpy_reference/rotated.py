"""The codec `rotated` in NumPy, piece by piece; the definition is that of `common.codecs.rotated`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from common.codecs import Encoded, Float32, RandomKey
from tests.codecs.numpy_reference.packing import pack, signed, unpack
from tests.codecs.numpy_reference.randomness import uniforms

CENTROIDS = {
    1: [1.0],
    2: [0.452780034636, 1.5104176085],
    3: [0.245094178944, 0.756005281206, 1.3439092785, 2.15194570454],
    4: [
        *(0.128395029851, 0.38804829949, 0.656759118532, 0.942340456487),
        *(1.25623119735, 1.61804638602, 2.06901722653, 2.732589571),
    ],
}


def pieces(n: int, block: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece; what is behind the last one travels as float32."""
    begin = n // block * block
    yield from ((a, a + block) for a in range(0, begin, block))
    for length in (1 << k for k in range(block.bit_length() - 2, 5, -1)):
        if n - begin >= length:
            yield begin, begin + length
            begin += length


def hadamard(x: Float32) -> Float32:
    """Stages 1, 2, 4, ... in float32."""
    h = 1
    while h < len(x):
        pairs = x.reshape(-1, 2, h)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
        h *= 2
    return x


def signs(key: RandomKey, start: int, n: int, first: int) -> Float32:
    """1 or -1 for the elements [start, start + n); the draws of the set begin at index `first`."""
    draws = (uniforms(key, first + start // 16, n // 16) * np.float32(2**24)).astype(np.int64)
    negative = draws[:, None] >> np.arange(8, 24) & 1
    return (1 - 2 * negative).astype(np.float32).reshape(-1)


def halves(terms: Float32) -> np.float32:
    """The sum, in halves."""
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    return terms[0]


def centroids(bits: int) -> Float32:
    words = np.array(CENTROIDS[bits], np.float32).view(np.uint32)
    return (words & ~np.uint32(7) | np.arange(len(words), dtype=np.uint32)).view(np.float32)


def encode(values: Float32, start: int, key: RandomKey, bits: int, block: int, *, passes: int = 2) -> Encoded:
    """`Codec.encode`; with `passes=1` what EDEN does."""
    scales, fields, end = [], [], 0
    c = centroids(bits)
    bounds = ((np.array(CENTROIDS[bits])[1:] + np.array(CENTROIDS[bits])[:-1]) / 2).astype(np.float32)
    for begin, end in pieces(len(values), block):
        x, n = values[begin:end], end - begin
        exponent = int(np.abs(x).max().view(np.uint32) >> 23)
        unit = np.uint32(min(max(254 - exponent, 1), 253) << 23).view(np.float32)
        y = hadamard(x * unit * signs(key, start + begin, n, 0))
        if passes == 2:
            y = hadamard(y * signs(key, start + begin, n, 2**31))
        squares = halves(y * y)
        sigma = np.float32(np.sqrt(np.float64(squares) / n))
        m = (np.abs(y)[:, None] >= sigma * bounds).sum(axis=1)
        if x.any():
            products = halves(np.abs(y) * c[m])
            scales.append(np.float32(np.float64(squares) / (np.float64(products) * np.float64(unit) * n)))
        else:
            scales.append(np.float32(0))
        fields.append(np.where(np.signbit(y), ~m, m))
    packed = pack(np.concatenate([*fields, np.empty(0, np.int64)]), bits)
    return Encoded(scales=np.array(scales, np.float32), payload=packed + values[end:].astype("<f4").tobytes())


def decode(encoded: Encoded, start: int, n: int, key: RandomKey, bits: int, block: int, *, passes: int = 2) -> Float32:
    """`Codec.decode` onto new memory."""
    c, rotated = centroids(bits), n - n % 64
    fields = unpack(bytes(encoded.payload)[: rotated * bits // 8], rotated, bits)
    fields = -fields.astype(np.int8) if bits == 1 else signed(fields, bits)
    out = np.empty(n, np.float32)
    for scale, (begin, end) in zip(encoded.scales, pieces(n, block), strict=True):
        field, length = fields[begin:end].astype(np.int64), end - begin
        y = np.where(field < 0, -c[np.where(field < 0, ~field, field)], c[np.where(field < 0, ~field, field)])
        if passes == 2:
            y = hadamard(y) * (signs(key, start + begin, length, 2**31) * np.float32(1 / length))
        x = hadamard(y) * (signs(key, start + begin, length, 0) * scale)
        out[begin:end] = x if scale > 0 else 0
    out[rotated:] = np.frombuffer(bytes(encoded.payload)[rotated * bits // 8 :], "<f4")
    return out
