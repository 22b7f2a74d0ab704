"""The part of the table of cases that goes through the GPU's kernels, too, and what the CPU's codec makes of them.

`tests/codecs/table.py` has them among its own: there the kernels of the CPU are held against the NumPy reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.codecs import Codec, Encoded, Float32, RandomKey, make_codec
from common.config import CodecSpec

COMPILED = {
    (8, 512, "linf", 2**17): ("encode_tiles", "decode_tiles"),
    (5, 1000, "l2", 2**17 + 3): ("measure_euclidean", "encode_tiles", "decode_tiles"),
    (4, 16384, "linf", 2**17): ("measure_largest",),
    (16, 64, "linf", 9): ("encode_tiles",),
}
"""Bits, block, norm and elements, aligned and not, and the kernels that are compiled for them."""

FUSED = {(8, 64, "linf", 2**17): ("decode_tiles",)}
"""Compiled with fusion, to see what must not be."""

KEY = RandomKey(seed=7, round=3, source=1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bucket [start, start + n): gaussian values, or every kind of block that `edges` knows."""

    bits: int
    block: int
    n: int
    norm: str = "linf"
    start: int = 0
    edges: bool = False

    def __str__(self) -> str:
        kind = "edges" if self.edges else "gaussian"
        return f"{self.bits}-{self.block}-{self.norm}-{self.n}-from-{self.start}-{kind}"

    @property
    def is_set(self) -> bool:
        """Whether its values are written, too, and not only added; for every width that is done in some case."""
        return self.edges

    @property
    def spec(self) -> CodecSpec:
        return CodecSpec(bits=self.bits, block=self.block, scale=self.norm)

    def codec(self) -> Codec:
        stop = self.start + self.n
        return make_codec(self.spec, start=0, stop=stop, layer_edges=(0, stop))

    def values(self) -> Float32:
        values = gaussian(self.n, seed=self.bits)
        return edged(values, self.block) if self.edges else values

    def encoded(self) -> Encoded:
        return self.codec().encode(self.values(), self.start, KEY)

    def decoded(self, encoded: Encoded, onto: Float32, *, add: bool) -> Float32:
        out = onto.copy()
        self.codec().decode(encoded, self.start, out, add=add)
        return out


def gaussian(n: int, seed: int) -> Float32:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def edged(values: Float32, block: int) -> Float32:
    """Gives each block a magnitude or a pattern at the edge of float32 or of the definition's three ranges."""
    power = lambda exponent: np.float32(2.0**exponent)  # noqa: E731
    after = lambda x: np.nextafter(x, np.float32(np.inf))  # noqa: E731
    before = lambda x: np.nextafter(x, np.float32(0))  # noqa: E731
    magnitudes = [power(e) for e in (-149, -148, -140, -127, -126, -125, -100, -65, -63, 0, 63, 65, 100, 120)]
    magnitudes += [change(power(e)) for e in (-64, 64) for change in (before, np.float32, after)]
    out = values.copy()
    for number, at in enumerate(range(0, len(values), block)):
        row = out[at : at + block]
        kind = number % (len(magnitudes) + 6)
        if kind < len(magnitudes):  # exactly this scale under linf
            row *= magnitudes[kind] / np.abs(row).max()
            row[len(row) // 2] = magnitudes[kind]
        else:
            patterns = (
                lambda row: np.zeros_like(row),
                lambda row: np.full_like(row, -0.0),
                lambda row: np.where(np.arange(len(row)) == len(row) - 1, np.float32(-1e-45), 0),
                lambda row: np.where(np.arange(len(row)) == 0, np.float32(3), row * power(-140)),
                lambda row: np.sign(row) * np.float32(0.1),
                lambda row: np.round(row * 4) / 4,
            )
            row[:] = patterns[kind - len(magnitudes)](row)
    return out


def _cases() -> tuple[Case, ...]:
    widths = (2, 3, 4, 5, 6, 7, 8, 16)
    cases = [Case(bits=bits, block=64, n=64 * 27 + 13, start=640, edges=True) for bits in widths]
    cases += [Case(bits=bits, block=1000, n=2507, start=5000) for bits in (2, 3, 4, 5, 16)]
    cases += [Case(bits=bits, block=8, n=8 * 520 + 5, start=2**31 - 8, edges=True) for bits in (2, 5, 8)]
    cases += [Case(bits=bits, block=512, n=512 * 9 + 77, start=1024) for bits in (7, 8)]
    cases += [Case(bits=bits, block=4096, n=4096 + 1231) for bits in (3, 8)]
    cases += [Case(bits=6, block=16384, n=16384 + 5003, start=16384)]
    cases += [Case(bits=8, block=block, n=block * 27, norm="l2", edges=True) for block in (8, 64, 72)]
    cases += [Case(bits=4, block=block, n=2 * block + 11, start=block, norm="l2") for block in (512, 1000, 4096)]
    cases += [Case(bits=8, block=16384, n=16384 + 5001, start=16384, norm="l2")]
    cases += [Case(bits=3, block=8, n=n) for n in (0, 1, 7, 8, 9, 17)] + [Case(bits=8, block=8, n=n) for n in (0, 9)]
    cases += [Case(bits=8, block=8, n=48, start=2**32 - 48), Case(bits=4, block=1000, n=296, start=2**32 - 296)]
    return tuple(cases)


CASES = {str(case): case for case in _cases()}
