"""The codec `sign` in NumPy, lane by lane; the definition is that of `common.codecs.sign`."""

from __future__ import annotations

import numpy as np

from common.codecs import Encoded, Float32
from tests.codecs.numpy_reference.packing import pack


def encode(values: Float32, block: int) -> Encoded:
    """`Codec.encode`."""
    scales = []
    for begin in range(0, len(values), block):
        part = np.abs(values[begin : begin + block]).astype(np.float64)
        lanes = np.zeros(64)
        for row in range(0, len(part), 64):
            lanes[: len(part[row : row + 64])] += part[row : row + 64]
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        scales.append(np.float32(lanes[0] / len(part)))
    return Encoded(scales=np.array(scales, np.float32), payload=pack(values < 0, 1))


def decode(encoded: Encoded, n: int, block: int) -> Float32:
    """`Codec.decode` onto new memory."""
    negative = np.unpackbits(np.frombuffer(bytes(encoded.payload), np.uint8), count=n, bitorder="little")
    scales = np.repeat(encoded.scales, block)[:n]
    return np.where(negative == 1, -scales, scales).astype(np.float32)
