"""Codecs without scales: `none` (float32), `fp16` and `bf16`, one little-endian number per element.

fp16 and bf16 round to nearest, ties to even, denormals included. A value that would round to infinity is refused: it is
no approximation of anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import BlockScales, Encoded, Float32, RandomKey
from common.codecs.checks import require_finite, require_payload, require_scales, require_vector
from common.errors import CodecError, refusal

_NO_SCALES: Float32 = np.empty(0, np.float32)
_NO_SCALES.flags.writeable = False


class _FloatCodec(ABC):
    """What the formats share; a format gives its name, its width and its two conversions."""

    wire_name: str
    alignment = 1
    needs_whole_vector = False
    _element_bytes: int

    def wire_bytes(self, start: int, n: int) -> int:  # noqa: ARG002
        """See `Codec`."""
        return n * self._element_bytes

    def measure(self, values: Float32, start: int) -> None:  # noqa: B027
        """See `Codec`: there are no scales."""

    def encode(
        self,
        values: Float32,
        start: int,
        key: RandomKey,  # noqa: ARG002
        measured: BlockScales | None = None,  # noqa: ARG002
    ) -> Encoded:
        """See `Codec`; nothing is random."""
        require_vector(values)
        require_finite(values, start, f"gradient, codec {self.wire_name}")
        payload = self._narrow(values, start).tobytes()
        return Encoded(scales=_NO_SCALES, payload=payload)

    def check(self, encoded: Encoded, start: int, n: int) -> None:
        """See `Codec`."""
        require_scales(encoded.scales, 0, f"codec {self.wire_name}")
        require_payload(encoded, self.wire_bytes(start, n), f"codec {self.wire_name}")
        require_finite(self._widen(encoded.payload), start, f"payload, codec {self.wire_name}")

    def decode(self, encoded: Encoded, start: int, out: Float32, *, add: bool) -> None:  # noqa: ARG002
        """See `Codec`."""
        values = self._widen(encoded.payload)
        if add:
            out += values
        else:
            out[:] = values

    @abstractmethod
    def _narrow(self, values: Float32, start: int) -> NDArray[np.generic]:
        """Finite values, from flat index `start` on, as they travel."""

    @abstractmethod
    def _widen(self, payload: bytes | bytearray | memoryview) -> Float32:
        """The inverse, exact."""

    def _require_in_range(self, fits: NDArray[np.bool_], values: Float32, start: int) -> None:
        if not fits.all():
            index = int(np.argmin(fits))
            rule = f"a value within the range of {self.wire_name}"
            raise CodecError(refusal(rule, f"element {start + index}", values[index], "gradient"))


class NoneCodec(_FloatCodec):
    """float32 as it is: decodes to the identical bits, -0.0 included."""

    wire_name = "none"
    _element_bytes = 4

    def _narrow(self, values: Float32, start: int) -> NDArray[np.generic]:  # noqa: ARG002
        return values.astype("<f4", copy=False)

    def _widen(self, payload: bytes | bytearray | memoryview) -> Float32:
        return np.frombuffer(payload, "<f4")


class Fp16Codec(_FloatCodec):
    """IEEE 754 binary16: 5 exponent and 10 fraction bits; magnitudes from 65520 on are refused."""

    wire_name = "fp16"
    _element_bytes = 2

    def _narrow(self, values: Float32, start: int) -> NDArray[np.generic]:
        with np.errstate(over="ignore", under="ignore"):
            halves = values.astype("<f2")
        self._require_in_range(np.isfinite(halves), values, start)
        return halves

    def _widen(self, payload: bytes | bytearray | memoryview) -> Float32:
        return np.frombuffer(payload, "<f2").astype(np.float32)


class Bf16Codec(_FloatCodec):
    """bfloat16: the upper half of a float32, 8 exponent and 7 fraction bits."""

    wire_name = "bf16"
    _element_bytes = 2

    def _narrow(self, values: Float32, start: int) -> NDArray[np.generic]:
        words = values.view(np.uint32)
        # Nearest even: half a unit less one, plus the lowest bit that stays. Finite words cannot overflow 32 bits.
        upper = (words >> np.uint32(16)) & np.uint32(1)
        upper += words
        upper += np.uint32(0x7FFF)
        upper >>= np.uint32(16)
        halves = upper.astype("<u2")
        self._require_in_range((halves & np.uint16(0x7FFF)) < 0x7F80, values, start)
        return halves

    def _widen(self, payload: bytes | bytearray | memoryview) -> Float32:
        words = np.frombuffer(payload, "<u2").astype(np.uint32)
        words <<= np.uint32(16)
        return words.view(np.float32)
