"""The codecs in NumPy: those of `common.codecs` with all that a kernel does replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.blocks import Blocks, EdgedBlocks
from common.codecs.floats import Bf16Codec, Fp16Codec, NoneCodec
from common.codecs.paper import PaperCodec
from common.codecs.randomized import RandomizedCodec
from common.codecs.scales import bucket_scales
from common.config import ScaleNorm
from tests.codecs.numpy_reference.blocks import Piece, runs
from tests.codecs.numpy_reference.packing import pack, packed_bytes, signed, unpack
from tests.codecs.numpy_reference.randomness import uniforms
from tests.codecs.numpy_reference.scales import block_scales, level_factors


class NumpyRandomized(RandomizedCodec):
    """The codec `randomized`."""

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        return measured(values, start, self._blocks, self._norm)

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        numbers = self._blocks.numbers(start, len(values))
        if self.needs_whole_vector:
            scales = bucket_scales(numbers, start, measured)
        else:
            scales = block_scales(values, start, self._blocks, self._norm)
        fields = draw_levels(values, start, key, self._blocks, scales, 2 ** (self._bits - 1) - 1)
        fields = np.where(values < 0, -fields, fields)
        return Encoded(scales=scales, payload=placed(pack(fields, self._bits), payload))

    def decode(
        self,
        encoded: Encoded,
        start: int,
        out: Float32,
        *,
        add: bool,
        key: RandomKey | None = None,  # noqa: ARG002
    ) -> None:
        fields = signed(unpack(encoded.payload, len(out), self._bits), self._bits)
        unit = np.float32(1) / np.float32(2 ** (self._bits - 1) - 1)
        for run in runs(self._blocks, start, len(out)):
            for piece in run.parts():
                values = piece.of(fields).astype(np.float32)
                values *= unit
                values *= piece.of_scales(encoded.scales)
                put(values, piece.of(out), add=add)


class NumpyPaper(PaperCodec):
    """The codec `paper`."""

    def measure(self, values: Float32, start: int) -> BlockScales | None:
        return measured(values, start, self._blocks, ScaleNorm.L2)

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        scales = bucket_scales(self._blocks.numbers(start, len(values)), start, measured)
        levels = draw_levels(values, start, key, self._blocks, scales, 2**self._bits)
        negative = (values < 0) & (levels > 0)
        at_top = np.flatnonzero(levels == 2**self._bits)
        assert len(at_top) <= 1
        if len(at_top) == 1:
            scales[0] = np.copysign(scales[0], values[at_top[0]])
            levels[at_top], negative[at_top] = 0, True
        return Encoded(scales=scales, payload=placed(pack(negative, 1) + pack(levels, self._bits), payload))

    def decode(
        self,
        encoded: Encoded,
        start: int,
        out: Float32,
        *,
        add: bool,
        key: RandomKey | None = None,  # noqa: ARG002
    ) -> None:
        n = len(out)
        stream = memoryview(encoded.payload).cast("B")
        split = packed_bytes(n, 1)
        negative = unpack(stream[:split], n, 1)
        levels = unpack(stream[split:], n, self._bits)
        unit = np.float32(1) / np.float32(2**self._bits)
        for run in runs(self._blocks, start, n):
            for piece in run.parts():
                scale = piece.of_scales(encoded.scales)
                minus, level = piece.of(negative), piece.of(levels)
                values = level.astype(np.float32)
                values *= unit
                values *= np.abs(scale)
                words = values.view(np.uint32)
                words ^= minus.astype(np.uint32) << np.uint32(31)
                np.copyto(values, scale, where=(minus == 1) & (level == 0))
                put(values, piece.of(out), add=add)


class _NumpyFloats:
    """What the codecs without scales share."""

    def encode(
        self,
        values: Float32,
        start: int,  # noqa: ARG002
        key: RandomKey,  # noqa: ARG002
        measured: BlockScales | None = None,  # noqa: ARG002
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        return Encoded(scales=np.empty(0, np.float32), payload=placed(self.narrow(values).tobytes(), payload))

    def decode(
        self,
        encoded: Encoded,
        start: int,  # noqa: ARG002
        out: Float32,
        *,
        add: bool,
        key: RandomKey | None = None,  # noqa: ARG002
    ) -> None:
        put(self.widen(bytes(encoded.payload)), out, add=add)

    def narrow(self, values: Float32) -> NDArray[np.generic]:
        raise NotImplementedError

    def widen(self, payload: bytes) -> Float32:
        raise NotImplementedError


class NumpyNone(_NumpyFloats, NoneCodec):
    """The codec `none`."""

    def narrow(self, values: Float32) -> NDArray[np.generic]:
        return values.astype("<f4")

    def widen(self, payload: bytes) -> Float32:
        return np.frombuffer(payload, "<f4")


class NumpyFp16(_NumpyFloats, Fp16Codec):
    """The codec `fp16`."""

    def narrow(self, values: Float32) -> NDArray[np.generic]:
        with np.errstate(under="ignore"):
            return values.astype("<f2")

    def widen(self, payload: bytes) -> Float32:
        return np.frombuffer(payload, "<f2").astype(np.float32)


class NumpyBf16(_NumpyFloats, Bf16Codec):
    """The codec `bf16`."""

    def narrow(self, values: Float32) -> NDArray[np.generic]:
        words = values.view(np.uint32)
        upper = (words >> np.uint32(16)) & np.uint32(1)
        return ((upper + words + np.uint32(0x7FFF)) >> np.uint32(16)).astype("<u2")

    def widen(self, payload: bytes) -> Float32:
        return (np.frombuffer(payload, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def measured(values: Float32, start: int, blocks: Blocks, norm: ScaleNorm) -> BlockScales | None:
    """Scales of `EdgedBlocks` over a stretch of whole blocks; None for blocks within buckets."""
    if not isinstance(blocks, EdgedBlocks):
        return None
    first, stretch = blocks.stretch(start, len(values))
    return BlockScales(first_block=first, values=block_scales(values, start, stretch, norm))


def draw_levels(
    values: Float32, start: int, key: RandomKey, blocks: Blocks, scales: Float32, levels: int
) -> NDArray[np.int32]:
    """xi * s of equation (A6): the level of each magnitude, rounded up with the probability of its fraction."""
    factors = level_factors(scales, levels)
    drawn = np.empty(len(values), np.int32)
    for run in runs(blocks, start, len(values)):
        for piece in run.parts():
            draws = uniforms(key, start + piece.offset, piece.rows * piece.length).reshape(piece.rows, piece.length)
            piece.of(drawn)[...] = _levels(piece.of(values), piece, factors, draws, levels)
    return drawn


def _levels(
    x: Float32, piece: Piece, factors: tuple[Float32, Float32], draws: Float32, levels: int
) -> NDArray[np.signedinteger[Any]]:
    first, second = (piece.of_scales(factor) for factor in factors)
    fractions = np.abs(x) * first
    fractions *= second
    np.minimum(fractions, np.float32(levels), out=fractions)
    floors = np.floor(fractions)
    fractions -= floors
    return floors.astype(np.int32) + (draws < fractions)


def put(values: Float32, out: Float32, *, add: bool) -> None:
    """`out += values` or `out[:] = values`, in place."""
    if add:
        out += values
    else:
        out[...] = values


def placed(data: bytes, payload: Bytes | None) -> Bytes:
    """The data in the memory that is given, or as they are."""
    if payload is None:
        return np.frombuffer(data, np.uint8)
    payload[:] = np.frombuffer(data, np.uint8)
    return payload
