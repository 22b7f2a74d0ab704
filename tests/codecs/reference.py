"""The quantizers once more, naively: one element at a time, Python integers and NumPy float32 scalars.

Written from section 5 of the design and the definitions on top of the codecs' files; shares no code with them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

F = np.float32


def draw(words: tuple[int, int], index: int) -> F:
    x = (index + words[0]) % 2**32
    x ^= x >> 16
    x = x * 0x21F0AAAD % 2**32
    x ^= words[1]
    x ^= x >> 15
    x = x * 0x735A2D97 % 2**32
    x ^= x >> 15
    x = x * 0x31848BAB % 2**32
    x ^= x >> 14
    return F(2 * (x >> 9) + 1) * F(2**-24)


def norm(block: Sequence[F], kind: str) -> F:
    if kind == "linf":
        return max(abs(x) for x in block)
    segments = [_segment(block[i : i + 4096]) for i in range(0, len(block), 4096)]
    exact = math.sqrt(_halves(segments))
    scale = F(exact)
    return scale if float(scale) >= exact else np.nextafter(scale, F(math.inf))


def _segment(values: Sequence[F]) -> float:
    lanes = [0.0] * 64
    for i, x in enumerate(values):
        lanes[i % 64] += float(x) * float(x)
    return _halves(lanes)


def _halves(numbers: list[float]) -> float:
    while len(numbers) & (len(numbers) - 1):
        numbers = [*numbers, 0.0]
    while len(numbers) > 1:
        half = len(numbers) // 2
        numbers = [numbers[i] + numbers[half + i] for i in range(half)]
    return numbers[0]


def level(x: F, scale: F, s: int, u: F) -> int:
    """Level of the magnitude of x."""
    if scale == 0:
        return 0
    power = F(2**64) if scale < F(2**-64) else F(2**-64) if scale > F(2**64) else F(1)
    factor = F(s) / (scale * power)
    if (scale * power) * factor < F(s):
        factor = np.nextafter(factor, F(math.inf))
    y = min((abs(x) * power) * factor, F(s))
    whole = math.floor(y)
    return whole + bool(u < y - F(whole))


def bit_string(fields: Sequence[int], bits: int) -> bytes:
    stream = 0
    for i, field in enumerate(fields):
        stream |= (field % 2**bits) << (i * bits)
    return stream.to_bytes((len(fields) * bits + 7) // 8, "little")


def fields_of(payload: bytes, n: int, bits: int) -> list[int]:
    stream = int.from_bytes(payload, "little")
    return [(stream >> (i * bits)) % 2**bits for i in range(n)]


def encode_randomized(
    values: Sequence[F], start: int, words: tuple[int, int], bits: int, block_of: Sequence[int], scales: dict[int, F]
) -> tuple[list[F], bytes]:
    """A bucket's scales and payload; `block_of` names the block of each element, `scales` holds one per block."""
    s = 2 ** (bits - 1) - 1
    fields = []
    for i, x in enumerate(values):
        magnitude = level(x, scales[block_of[i]], s, draw(words, start + i))
        fields.append(-magnitude if x < 0 else magnitude)
    return [scales[block] for block in dict.fromkeys(block_of)], bit_string(fields, bits)


def decode_randomized(scales: Sequence[F], payload: bytes, bits: int, block_of: Sequence[int]) -> list[F]:
    s = 2 ** (bits - 1) - 1
    first = block_of[0] if block_of else 0
    decoded = []
    for block, field in zip(block_of, fields_of(payload, len(block_of), bits), strict=True):
        signed = field - 2**bits if field >= 2 ** (bits - 1) else field
        decoded.append((F(signed) * (F(1) / F(s))) * scales[block - first])
    return decoded


def encode_paper(values: Sequence[F], start: int, words: tuple[int, int], bits: int, norm: F) -> tuple[F, bytes]:
    """A bucket's signed scale and payload."""
    s = 2**bits
    scale, signs, levels = norm, [], []
    for i, x in enumerate(values):
        magnitude = level(x, norm, s, draw(words, start + i))
        if magnitude == s:
            scale = -norm if x < 0 else norm
            signs.append(1)
            levels.append(0)
        else:
            signs.append(int(x < 0 and magnitude > 0))
            levels.append(magnitude)
    return scale, bit_string(signs, 1) + bit_string(levels, bits)


def decode_paper(scale: F, payload: bytes, n: int, bits: int) -> list[F]:
    split = (n + 7) // 8
    decoded = []
    for sign, magnitude in zip(fields_of(payload[:split], n, 1), fields_of(payload[split:], n, bits), strict=True):
        value = (F(magnitude) * (F(1) / F(2**bits))) * abs(scale)
        decoded.append(scale if sign and not magnitude else -value if sign else value)
    return decoded
