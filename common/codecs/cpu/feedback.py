"""Kernels of error feedback: sums in float64, element by element."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import kernel


@kernel("void", "const float32[]", "const float64[]", "float32[]")
def compensate(values: Float32, residual: NDArray[np.float64], out: Float32) -> None:
    """out = values + residual, rounded to float32."""
    for i in range(out.size):
        out[i] = np.float32(np.float64(values[i]) + residual[i])


@kernel("void", "const float32[]", "const float32[]", "float64[]")
def settle(values: Float32, sent: Float32, residual: NDArray[np.float64]) -> None:
    """residual = (values + residual) - sent."""
    for i in range(residual.size):
        residual[i] = (np.float64(values[i]) + residual[i]) - np.float64(sent[i])
