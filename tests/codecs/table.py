"""The table of codecs that one suite runs through, and short ways to encode and decode whole vectors with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from common.codecs import Codec, Encoded, Float32, RandomKey, make_codec
from common.config import CodecSpec

KEY = RandomKey(seed=7, round=3, source=1)

SPECS = [
    CodecSpec(name="none"),
    CodecSpec(name="fp16"),
    CodecSpec(name="bf16"),
    *(CodecSpec(bits=bits, block=64) for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
    CodecSpec(bits=8, block=512),
    CodecSpec(bits=8, block=8),
    CodecSpec(bits=3, block=40, scale="l2"),
    CodecSpec(bits=8, block=64, scale="l2"),
    CodecSpec(bits=4, block="layer"),
    CodecSpec(bits=5, block="layer", scale="l2"),
    CodecSpec(bits=8, block="all"),
    CodecSpec(bits=3, block="all", scale="l2"),
    *(CodecSpec(name="paper", bits=bits) for bits in (2, 3, 8, 16)),
]


def name_of(spec: CodecSpec) -> str:
    return build(spec, 8).wire_name


def layers(d: int) -> tuple[int, ...]:
    """Layer edges of a vector of d elements, most of them no multiples of 8."""
    return (0, *(edge for edge in (8, 13, 14, 500, 501, 777, 5000) if edge < d), d)


def build(spec: CodecSpec, d: int, start: int = 0) -> Codec:
    """The codec of a worker, or with `start` of a server whose shard is [start, d)."""
    return make_codec(spec, start=start, stop=d, layer_edges=layers(d))


def encode(codec: Codec, values: Float32, key: RandomKey = KEY, cuts: Sequence[int] = ()) -> list[Encoded]:
    """Encodes a whole vector in the buckets between the cuts."""
    measured = codec.measure(values, 0)
    return [codec.encode(values[a:b], a, key, measured) for a, b in pairwise((0, *cuts, len(values)))]


def decode(codec: Codec, buckets: Sequence[Encoded], d: int, cuts: Sequence[int] = ()) -> Float32:
    """Checks and decodes the buckets between the cuts to a vector of d elements."""
    out = np.full(d, np.nan, np.float32)
    for encoded, (a, b) in zip(buckets, pairwise((0, *cuts, d)), strict=True):
        codec.check(encoded, a, b - a)
        codec.decode(encoded, a, out[a:b], add=False)
    return out


def round_trip(codec: Codec, values: Float32, key: RandomKey = KEY) -> Float32:
    return decode(codec, encode(codec, values, key), len(values))


def gaussian(d: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(d).astype(np.float32)


def exact_vector(d: int) -> Float32:
    """Values of many magnitudes made of exact operations only: the same on every machine and NumPy version."""
    index = np.arange(d, dtype=np.uint32)
    numerators = (index * np.uint32(2654435761)).view(np.int32).astype(np.float32)
    return np.ldexp(numerators, (index % 7).astype(np.int32) - 34).astype(np.float32)
