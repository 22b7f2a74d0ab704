"""The tables that one suite runs through: codecs, and cases that all of their implementations encode to the same bytes.

`CASES` knows no implementation. To test one, build a codec per case with its own `make_codec`, encode, and compare with
the reference: see `test_backends.py`. Those of `tests/gpu/table.py` are among them: they go through Triton's, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from common.codecs import SERVER, BlockScales, Codec, Encoded, Float32, RandomKey, SharedCodec, make_codec
from common.codecs.shared import average_of_sums
from common.config import CodecSpec
from tests.gpu.table import CASES as GPU_CASES

KEY = RandomKey(seed=7, round=3, source=1)

FLOATS = [CodecSpec(name=name) for name in ("none", "fp16", "bf16")]
QUANTIZERS = [
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
"""Those with a scalar reference of their own, too: `tests/codecs/reference.py`."""
SHARED = [CodecSpec(name="shared", bits=bits, block=64) for bits in (2, 3, 4, 5, 6, 7, 8)]
"""Decoded to integers; of one worker alone, `round_trip` makes the average of them."""
ROTATED = [CodecSpec(name="rotated", bits=bits, block=block) for bits, block in ((1, 512), (2, 64), (3, 256), (4, 512))]
SIGN = [CodecSpec(name="sign", block=block) for block in (8, 64, 512)]
TOPK = [CodecSpec(name="topk", block=block, density=density) for block, density in ((64, 1 / 32), (40, 0.1), (8, 1))]
SPECS = [*FLOATS, *QUANTIZERS, *SHARED, *ROTATED, *SIGN, *TOPK]
"""All codecs. A test that does not fit one of these families says so, and why."""


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
    measured = measured_by(codec, values)
    return [codec.encode(values[a:b], a, key, measured) for a, b in pairwise((0, *cuts, len(values)))]


def measured_by(codec: Codec, values: Float32, start: int = 0) -> BlockScales | None:
    """What `encode` needs for a whole range; of shared scales those of one worker alone."""
    if not isinstance(codec, SharedCodec):
        return codec.measure(values, start)
    first = codec.blocks(start, len(values)).start
    return BlockScales(first_block=first, values=codec.local_scales(values, start))


def decode(codec: Codec, buckets: Sequence[Encoded], d: int, cuts: Sequence[int] = (), key: RandomKey = KEY) -> Float32:
    """Checks and decodes the buckets between the cuts to a vector of d elements."""
    out = np.full(d, np.nan, np.float32)
    for encoded, (a, b) in zip(buckets, pairwise((0, *cuts, d)), strict=True):
        codec.check(encoded, a, b - a)
        codec.decode(encoded, a, out[a:b], add=False, key=key)
    return out


def bytes_of(encoded: Encoded) -> tuple[bytes, bytes]:
    """Scales and payload, to compare."""
    return encoded.scales.tobytes(), bytes(encoded.payload)


def round_trip(codec: Codec, values: Float32, key: RandomKey = KEY) -> Float32:
    out = decode(codec, encode(codec, values, key), len(values), key=key)
    if isinstance(codec, SharedCodec) and (shared := measured_by(codec, values)):
        average_of_sums(codec, out, 0, shared, 1)
    return out


def gaussian(d: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(d).astype(np.float32)


def exact_vector(d: int) -> Float32:
    """Values of many magnitudes made of exact operations only: the same on every machine and NumPy version."""
    index = np.arange(d, dtype=np.uint32)
    numerators = (index * np.uint32(2654435761)).view(np.int32).astype(np.float32)
    return np.ldexp(numerators, (index % 7).astype(np.int32) - 34).astype(np.float32)


def finite_patterns(d: int) -> Float32:
    """Random words that are finite as float32: denormal numbers and magnitudes up to 2^100."""
    words = np.random.default_rng(d).integers(0, 2**32, d, np.uint32)
    return np.clip(np.where((words >> 23) & 0xFF == 0xFF, 0, words).astype(np.uint32).view(np.float32), -1e30, 1e30)


def on_levels(d: int) -> Float32:
    """Values on the levels of most widths, just below them, just above them, and halfway."""
    steps = np.random.default_rng(d).integers(-127, 128, d).astype(np.float32) / np.float32(127)
    nudged = np.stack([steps, np.nextafter(steps, np.float32(0)), np.nextafter(steps, np.float32(2)), steps / 2])
    return np.append(nudged[np.arange(d) % 4, np.arange(d)], np.float32(1))[-d:] if d else steps


def blocks_of_all_magnitudes(d: int) -> Float32:
    """Every 64 elements another magnitude, those where the factors change among them."""
    units = np.array([1e-45, 1e-42, 1e30, 1, 2.0**-64, 2.0**-65, 0, 2.0**64, 2.0**65, 1e-30], np.float32)
    return np.clip(gaussian(d), -4, 4) * units[np.arange(d) // 64 % len(units)]


VALUES: dict[str, Callable[[int], Float32]] = {
    "gaussian": gaussian,
    "many magnitudes": exact_vector,
    "zeros": lambda d: np.zeros(d, np.float32),
    "minus zeros": lambda d: np.full(d, -0.0, np.float32),
    "one-hot": lambda d: np.eye(1, d, d // 3, dtype=np.float32)[0] * np.float32(-3),
    "all equal": lambda d: np.full(d, -0.25, np.float32),
    "smallest": lambda d: np.where(np.arange(d) % 3, np.float32(1e-45), np.float32(-3e-45)),
    "denormal": lambda d: gaussian(d) * np.float32(1e-41),
    "huge": lambda d: gaussian(d) * np.float32(1e30),
    "on levels": on_levels,
    "blocks of all magnitudes": blocks_of_all_magnitudes,
    "finite patterns": finite_patterns,
}
SIZES = (0, 1, 2, 7, 8, 9, 15, 63, 64, 65, 511, 513, 2047, 2048, 2049, 4099)
"""About the sizes of vector registers, groups, blocks and pieces."""

BLOCK_SPECS = [
    *(CodecSpec(bits=bits, block=block) for bits in (3, 8) for block in (8, 24, 512, 2048, 2056, 8192, 1 << 16)),
    *(CodecSpec(bits=8, block=block, scale="l2") for block in (8, 24, 4096, 4104, 40_000)),
    CodecSpec(bits=16, block=5000, scale="l2"),
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A vector that every implementation of a codec encodes to the same bytes.

    Attributes:
        name: for people.
        spec: the codec.
        values: float32 of shape (n,): all elements of the range of one encoder.
        start: flat index of values[0].
        key: of the encoding.
        cuts: flat indices at which it is cut into buckets.
    """

    name: str
    spec: CodecSpec
    values: Float32
    start: int = 0
    key: RandomKey = KEY
    cuts: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def layer_edges(self) -> tuple[int, ...]:
        """For `block: layer`; most are no multiples of 8."""
        return tuple(self.start + edge for edge in layers(self.n))

    def codec(self, make: Callable[..., Codec]) -> Codec:
        """The encoder, built by a `make_codec`."""
        return make(self.spec, start=self.start, stop=self.start + self.n, layer_edges=self.layer_edges)

    def buckets(self) -> Iterator[tuple[int, Float32]]:
        """Start and values of each bucket."""
        for a, b in pairwise((self.start, *self.cuts, self.start + self.n)):
            yield a, self.values[a - self.start : b - self.start]

    def encode(self, codec: Codec) -> list[Encoded]:
        """All buckets."""
        measured = measured_by(codec, self.values, self.start)
        return [codec.encode(values, a, self.key, measured) for a, values in self.buckets()]


def _in_range(spec: CodecSpec, values: Float32) -> Float32:
    return np.clip(values, -65504, 65504) if spec.name == "fp16" else values


def _cases() -> Iterator[Case]:
    for spec in SPECS:
        name = name_of(spec)
        for kind, make in VALUES.items():
            yield Case(name=f"{name} {kind}", spec=spec, values=_in_range(spec, make(1003)))
        for n in SIZES:
            yield Case(name=f"{name} {n} elements", spec=spec, values=gaussian(n))
        unit = 2560  # a multiple of all alignments in SPECS
        values = gaussian(3 * unit + 77, seed=1)
        key = RandomKey(seed=2**64 - 1, round=2**40, source=SERVER)
        yield Case(name=f"{name} other key", spec=spec, values=values, key=key)
        yield Case(name=f"{name} in buckets", spec=spec, values=values, cuts=(unit, 3 * unit))
        yield Case(name=f"{name} shard", spec=spec, values=values, start=7 * unit, cuts=(8 * unit,))
        last = 2**32 // unit * unit - unit
        yield Case(name=f"{name} at the end of the indices", spec=spec, values=values[: 2**32 - last], start=last)
    for spec in BLOCK_SPECS:
        for kind in ("gaussian", "many magnitudes", "blocks of all magnitudes"):
            yield Case(name=f"{name_of(spec)} {kind}", spec=spec, values=VALUES[kind](70_001))
    for case in GPU_CASES.values():
        yield Case(name=f"{case}, in Triton too", spec=case.spec, values=case.values(), start=case.start)


CASES = list(_cases())
GROUPS: dict[str, list[Case]] = {}
"""The cases by codec."""
for _case in CASES:
    GROUPS.setdefault(name_of(_case.spec), []).append(_case)
