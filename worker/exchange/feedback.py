"""Error feedback: what a biased codec did not send of a gradient is added to the next one.

In each round, with the gradient g (float32) and the residual r (float64) of the rounds before:

    e    = g + r                  in float64
    sent = decode(encode(p))      p is e rounded to float32; sent is what everybody decodes
    r    = e - sent               in float64

so that residual + sent = gradient + old residual. Both operations are exact, and with them the identity, as long as an
element's numbers span no more than 53 bits: all its gradients and sent values are zero or of magnitude 2^a at least,
hence multiples of 2^(a - 23), and all its sums are below 2^(a + 30) in magnitude: thirty binary, nine decimal orders
of magnitude between the smallest and the largest, whatever the number of rounds. Beyond it, each operation rounds to
the nearest float64: what is lost of an element in a round is less than 2^-52 of its larger term.

Source: EF-signSGD (Karimireddy et al., 2019); "memory" of Stich et al. (2018). Deviation: the residual is float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs import BlockScales, Bytes, Codec, Encoded, Float32, RandomKey
from common.codecs.cpu import feedback as kernels
from common.errors import CheckpointError, refusal

Float64 = NDArray[np.float64]


class ErrorFeedback:
    """One worker's residual, and encoding with it. Not thread-safe.

    Args:
        d: elements of the gradient vector.
    """

    def __init__(self, d: int) -> None:
        self._residual: Float64 = np.zeros(d)
        self._room: Float32 = np.empty((2, 0), np.float32)

    @property
    def residual(self) -> Float64:
        """What has not been sent yet: float64 of shape (d,), read-only."""
        view = self._residual.view()
        view.flags.writeable = False
        return view

    def encode(
        self,
        codec: Codec,
        values: Float32,
        start: int,
        key: RandomKey,
        measured: BlockScales | None = None,
        *,
        payload: Bytes | None = None,
    ) -> Encoded:
        """Encodes a bucket of the gradient plus what is left of earlier ones, and keeps what is left now.

        Once per bucket and round: a second time would add the residual of the first. For the arguments see
        `Codec.encode`; the codec must not need the whole vector.

        Raises:
            CodecError: as `Codec.encode`; the residual is unchanged.
        """
        n = len(values)
        residual = self._residual[start : start + n]
        compensated, sent = self._memory(n)
        kernels.compensate(values, residual, compensated)
        encoded = codec.encode(compensated, start, key, measured, payload=payload)
        codec.decode(encoded, start, sent, add=False, key=key)
        kernels.settle(values, sent, residual)
        return encoded

    def load(self, residual: Float64) -> None:
        """Goes on with a residual from a checkpoint.

        Raises:
            CheckpointError: it is not that of such a gradient.
        """
        if residual.dtype != np.float64 or residual.shape != self._residual.shape:
            got = f"{residual.dtype}{list(residual.shape)}"
            raise CheckpointError(refusal(f"float64{list(self._residual.shape)}", "residual", got))
        if not np.isfinite(residual).all():
            raise CheckpointError(refusal("finite numbers", "residual", residual[~np.isfinite(residual)][0]))
        self._residual[:] = residual

    def _memory(self, n: int) -> tuple[Float32, Float32]:
        """Two float32 vectors of shape (n,), kept between buckets."""
        if self._room.shape[1] < n:
            self._room = np.empty((2, n), np.float32)
        return self._room[0, :n], self._room[1, :n]
