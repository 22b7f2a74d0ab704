"""`rotated`, `shared`, `sign` and `topk` as codecs: those of `common.codecs` with all that a kernel does replaced."""

from __future__ import annotations

import numpy as np

from common.codecs import BlockScales, Bytes, Encoded, Float32, RandomKey, SharedCodec
from common.codecs.rotated import RotatedCodec
from common.codecs.sign import SignCodec
from common.codecs.topk import TopkCodec
from common.config import ScaleNorm
from tests.codecs.numpy_reference import rotated, shared, sign, topk
from tests.codecs.numpy_reference.codecs import placed, put
from tests.codecs.numpy_reference.packing import pack, signed, unpack
from tests.codecs.numpy_reference.scales import block_scales


class _FromFunctions:
    """A codec of two functions that know neither messages nor accumulators."""

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        encoded = self.encoded(values, start, key, measured)
        return Encoded(scales=encoded.scales, payload=placed(bytes(encoded.payload), payload))

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool, key: RandomKey | None = None) -> None:
        put(self.decoded(encoded, start, len(out), key), out, add=add)

    def encoded(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None) -> Encoded:
        raise NotImplementedError

    def decoded(self, encoded: Encoded, start: int, n: int, key: RandomKey | None) -> Float32:
        raise NotImplementedError


class NumpyRotated(_FromFunctions, RotatedCodec):
    """The codec `rotated`."""

    def encoded(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None) -> Encoded:  # noqa: ARG002
        return rotated.encode(values, start, key, self._bits, self.alignment)

    def decoded(self, encoded: Encoded, start: int, n: int, key: RandomKey | None) -> Float32:
        assert key
        return rotated.decode(encoded, start, n, key, self._bits, self.alignment)


class NumpyShared(_FromFunctions, SharedCodec):
    """The codec `shared`: contributions."""

    def local_scales(self, values: Float32, start: int) -> Float32:
        return block_scales(values, start, self._blocks, ScaleNorm.LINF)

    def encoded(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None) -> Encoded:
        fields = shared.fields(values, start, key, self._blocks, self._bits, measured)
        return Encoded(scales=np.empty(0, np.float32), payload=pack(fields, self._bits))

    def decoded(self, encoded: Encoded, start: int, n: int, key: RandomKey | None) -> Float32:  # noqa: ARG002
        return signed(unpack(encoded.payload, n, self._bits), self._bits).astype(np.float32)


class NumpySign(_FromFunctions, SignCodec):
    """The codec `sign`."""

    def encoded(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None) -> Encoded:  # noqa: ARG002
        return sign.encode(values, self.alignment)

    def decoded(self, encoded: Encoded, start: int, n: int, key: RandomKey | None) -> Float32:  # noqa: ARG002
        return sign.decode(encoded, n, self.alignment)


class NumpyTopk(_FromFunctions, TopkCodec):
    """The codec `topk`."""

    def encoded(self, values: Float32, start: int, key: RandomKey, measured: BlockScales | None) -> Encoded:  # noqa: ARG002
        return topk.encode(values, self.alignment, self._density)

    def decoded(self, encoded: Encoded, start: int, n: int, key: RandomKey | None) -> Float32:  # noqa: ARG002
        return topk.decode(encoded, n, self.alignment, self._density)
