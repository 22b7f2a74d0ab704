"""Codecs without scales: `none` (float32), `fp16` and `bf16`, one little-endian number per element.

fp16 and bf16 round to nearest, ties to even, denormals included. A value that would round to infinity is refused: it is
no approximation of anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from common.codecs.base import BlockScales, Bytes, Encoded, Float32, RandomKey
from common.codecs.checks import INFINITE, MAGNITUDE, require_finite, require_payload, require_scales, require_vector
from common.codecs.cpu import floats as kernels
from common.codecs.packing import memory_for, stream_of
from common.errors import CodecError, refusal

_NO_SCALES: Float32 = np.empty(0, np.float32)
_NO_SCALES.flags.writeable = False


class _FloatCodec(ABC):
    """What the formats share; a format gives its name, its width, its range and its conversions."""

    wire_name: str
    alignment = 1
    needs_whole_vector = False
    biased = False
    needs_shared_scales = False
    _element_bytes: int
    _too_large: int
    """The first magnitude, as a word of float32, that would round to infinity."""

    def scale_count(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`: none."""
        return 0

    def payload_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return n * self._element_bytes

    def wire_bytes(self, start: int, n: int) -> int:
        """See `Codec`."""
        return self.payload_bytes(start, n)

    def measure(self, values: Float32, start: int) -> None:  # noqa: B027
        """See `Codec`: there are no scales."""

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,  # noqa: ARG002
        measured: BlockScales | None = None,  # noqa: ARG002
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """See `Codec`; nothing is random."""
        require_vector(values)
        stream = memory_for(payload, self.payload_bytes(start, len(values)))
        if self._narrow(values, stream) >= self._too_large:
            require_finite(values, start, f"gradient, codec {self.wire_name}")
            index = int(np.argmax((values.view(np.uint32) & MAGNITUDE) >= self._too_large))
            rule = f"a value within the range of {self.wire_name}"
            raise CodecError(refusal(rule, f"element {start + index}", values[index], "gradient"))
        return Encoded(scales=_NO_SCALES, payload=stream)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`."""
        require_scales(encoded.scales, 0, f"codec {self.wire_name}")
        require_payload(encoded, self.payload_bytes(start, n), f"codec {self.wire_name}")
        if not self._is_finite(np.frombuffer(encoded.payload, np.uint8)):
            values = np.empty(n, np.float32)
            self.decode(encoded, start, values, add=False)
            require_finite(values, start, f"payload, codec {self.wire_name}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool, key: RandomKey | None = None) -> None:  # noqa: ARG002
        """See `Codec`."""
        self._widen(stream_of(encoded, self.payload_bytes(start, len(out)), 0), out, add)

    @abstractmethod
    def _narrow(self, values: Float32, stream: Bytes) -> int:
        """Writes values as they travel, which is all the same for those out of range; the largest magnitude's word."""

    @abstractmethod
    def _widen(self, stream: Bytes, out: Float32, add: bool) -> None:
        """The inverse, exact."""

    @abstractmethod
    def _is_finite(self, stream: Bytes) -> bool:
        """False if a value is NaN or infinite."""


class NoneCodec(_FloatCodec):
    """float32 as it is: decodes to the identical bits, -0.0 included."""

    wire_name = "none"
    _element_bytes = 4
    _too_large = INFINITE

    def _narrow(self, values: Float32, stream: Bytes) -> int:
        return kernels.copy_words(values.view(np.uint32), stream.view("<u4"))

    def _widen(self, stream: Bytes, out: Float32, add: bool) -> None:
        kernels.put_floats(stream.view("<f4"), out, add)

    def _is_finite(self, stream: Bytes) -> bool:
        return kernels.largest_word(stream.view("<u4"), MAGNITUDE) < INFINITE


class Fp16Codec(_FloatCodec):
    """IEEE 754 binary16: 5 exponent and 10 fraction bits; magnitudes from 65520 on are refused."""

    wire_name = "fp16"
    _element_bytes = 2
    _too_large = 0x477FF000

    def _narrow(self, values: Float32, stream: Bytes) -> int:
        return kernels.to_fp16(values, values.view(np.uint32), stream.view("<u2"))

    def _widen(self, stream: Bytes, out: Float32, add: bool) -> None:
        kernels.put_fp16(stream.view("<u2"), out, add, kernels.room_for_words())

    def _is_finite(self, stream: Bytes) -> bool:
        return kernels.largest_half(stream.view("<u2")) < 0x7C00


class Bf16Codec(_FloatCodec):
    """bfloat16: the upper half of a float32, 8 exponent and 7 fraction bits."""

    wire_name = "bf16"
    _element_bytes = 2
    _too_large = 0x7F7F8000

    def _narrow(self, values: Float32, stream: Bytes) -> int:
        return kernels.to_bf16(values.view(np.uint32), stream.view("<u2"))

    def _widen(self, stream: Bytes, out: Float32, add: bool) -> None:
        kernels.put_bf16(stream.view("<u2"), out, add, kernels.room_for_words())

    def _is_finite(self, stream: Bytes) -> bool:
        return kernels.largest_half(stream.view("<u2")) < 0x7F80
