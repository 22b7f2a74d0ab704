"""What all codecs refuse in the same words: values, scales and payloads that break the contract of `base.py`."""

from __future__ import annotations

import numpy as np

from common.codecs.base import Encoded, Float32
from common.codecs.cpu.floats import largest_word
from common.errors import CodecError, refusal

MAGNITUDE = 0x7FFFFFFF
ALL_BITS = 0xFFFFFFFF
INFINITE = 0x7F800000
"""float32 as words."""
FINITE_VALUE = "a finite value"
"""The rule that a gradient breaks when a training diverges."""


def require_vector(values: Float32) -> None:
    """Refuses what is no contiguous float32 vector of shape (n,).

    Raises:
        CodecError: another dtype or shape, or elements apart.
    """
    if values.dtype != np.float32 or values.ndim != 1:
        raise CodecError(refusal("float32 of shape (n,)", "values", f"{values.dtype}{list(values.shape)}"))
    if not values.flags.c_contiguous:
        raise CodecError(refusal("contiguous values", "strides", values.strides))


def require_finite(values: np.ndarray, start: int, context: str) -> None:
    """Refuses NaN and infinity.

    Args:
        values: floats of shape (n,).
        start: flat index of values[0].
        context: what the message names beside the value.

    Raises:
        CodecError: names the first offending value and its flat index.
    """
    finite = np.isfinite(values)
    if not finite.all():
        index = int(np.argmin(finite))
        raise CodecError(refusal(FINITE_VALUE, f"element {start + index}", values[index], context))


def require_scales(scales: Float32, count: int, context: str, *, signed: bool = False) -> None:
    """Refuses scales that no encoder sends: wrong number, NaN, infinity or a sign bit.

    Args:
        scales: float32, one per block that overlaps the bucket.
        count: how many there have to be.
        context: what the message names beside the value.
        signed: True where the sign bit carries information (codec `paper`).

    Raises:
        CodecError: names the first offending scale.
    """
    if scales.dtype != np.float32 or scales.shape != (count,):
        raise CodecError(refusal(f"{count} float32 scales", "scales", f"{scales.dtype}{list(scales.shape)}", context))
    mask = MAGNITUDE if signed else ALL_BITS
    if largest_word(scales.view(np.uint32), mask) >= INFINITE:  # a sign bit makes a word larger than infinity's
        index = int(np.argmax((scales.view(np.uint32) & mask) >= INFINITE))
        rule = "a finite scale" if signed else "a finite scale without sign"
        raise CodecError(refusal(rule, f"scales[{index}]", scales[index], context))


def require_payload(encoded: Encoded, payload_bytes: int, context: str) -> None:
    """Refuses a payload of the wrong length.

    Raises:
        CodecError: gives both lengths.
    """
    got = np.frombuffer(encoded.payload, np.uint8).nbytes
    if got != payload_bytes:
        raise CodecError(refusal(f"{payload_bytes} bytes", "payload", f"{got} bytes", context))
