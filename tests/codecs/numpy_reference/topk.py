"""The codec `topk` in NumPy and Python's integers; the definition is that of `common.codecs.topk`."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from common.codecs import Encoded, Float32


def largest(values: Float32, count: int) -> list[int]:
    """Places of the largest magnitudes, of equal ones the first; rising."""
    return sorted(np.argsort(-np.abs(values), kind="stable")[:count].tolist())


def encode(values: Float32, block: int, density: float | Fraction) -> Encoded:
    """`Codec.encode`."""
    bits, kept, places = max(1, math.ceil(math.log2(block))), [], b""
    fraction = Fraction(density).limit_denominator(1 << 16)
    for begin in range(0, len(values), block):
        part = values[begin : begin + block]
        chosen = largest(part, math.ceil(fraction * len(part)))
        kept.append(part[chosen])
        number = sum(place << (bits * i) for i, place in enumerate(chosen))
        places += number.to_bytes((bits * len(chosen) + 7) // 8, "little")
    return Encoded(scales=np.empty(0, np.float32), payload=np.concatenate([*kept, values[:0]]).tobytes() + places)


def sparse(values: Float32, block: int, density: float | Fraction) -> Float32:
    """What is left of a vector: all but the largest of each block is zero."""
    out, fraction = np.zeros_like(values), Fraction(density).limit_denominator(1 << 16)
    for begin in range(0, len(values), block):
        part = values[begin : begin + block]
        chosen = largest(part, math.ceil(fraction * len(part)))
        out[begin : begin + block][chosen] = part[chosen]
    return out


def decode(encoded: Encoded, n: int, block: int, density: float | Fraction) -> Float32:
    """`Codec.decode` onto new memory."""
    bits, out = max(1, math.ceil(math.log2(block))), np.zeros(n, np.float32)
    fraction, payload = Fraction(density).limit_denominator(1 << 16), bytes(encoded.payload)
    counts = [math.ceil(fraction * min(block, n - begin)) for begin in range(0, n, block)]
    kept, at = np.frombuffer(payload, "<f4", sum(counts)).tolist(), 4 * sum(counts)
    for begin, count in zip(range(0, n, block), counts, strict=True):
        size = (bits * count + 7) // 8
        number = int.from_bytes(payload[at : at + size], "little")
        for i in range(count):
            out[begin + (number >> (bits * i)) % 2**bits] = kept.pop(0)
        at += size
    return out
