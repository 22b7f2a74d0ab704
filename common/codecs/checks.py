"""What all codecs refuse in the same words: values, scales and payloads that break the contract of `base.py`."""

from __future__ import annotations

import numpy as np

from common.codecs.base import Encoded, Float32
from common.errors import CodecError, refusal


def require_vector(values: Float32) -> None:
    """Refuses what is no float32 vector of shape (n,).

    Raises:
        CodecError: another dtype or shape.
    """
    if values.dtype != np.float32 or values.ndim != 1:
        raise CodecError(refusal("float32 of shape (n,)", "values", f"{values.dtype}{list(values.shape)}"))


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
        raise CodecError(refusal("a finite value", f"element {start + index}", values[index], context))


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
    good = np.isfinite(scales)
    if not signed:
        good &= ~np.signbit(scales)
    if not good.all():
        index = int(np.argmin(good))
        rule = "a finite scale" if signed else "a finite scale without sign"
        raise CodecError(refusal(rule, f"scales[{index}]", scales[index], context))


def require_payload(encoded: Encoded, payload_bytes: int, context: str) -> None:
    """Refuses a payload of the wrong length.

    Raises:
        CodecError: gives both lengths.
    """
    got = memoryview(encoded.payload).nbytes
    if got != payload_bytes:
        raise CodecError(refusal(f"{payload_bytes} bytes", "payload", f"{got} bytes", context))
