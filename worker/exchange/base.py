"""The contract of an exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from common.codecs import Float32


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one round cost on the wire.

    Attributes:
        pushed_bytes: of this worker's messages to the servers, as serialized.
        pulled_bytes: of the servers' messages to this worker, as serialized.
        seconds: from the first encoding until the last average was decoded.
    """

    pushed_bytes: int
    pulled_bytes: int
    seconds: float


class Exchange(Protocol):
    """Turns this worker's vectors into the average over all workers, in place."""

    stop_requested: str | None
    """Why a server asks all workers to stop, if one does."""

    def average(self, round_: int, gradient: Float32, state: Float32, parameter_digest: bytes) -> Traffic:
        """Runs one round.

        Args:
            round_: the round, each call one more than the last.
            gradient: float32 of shape (d,); replaced by the average that all workers decode.
            state: float32 of shape (e,); replaced by the uncompressed average.
            parameter_digest: of the parameters before this round.

        Raises:
            CodecError: a value is not finite; the message names bucket, layer and worker.
            PeerLostError: a server or another worker is gone.
            MismatchError: a server refuses this worker, or ends the job because replicas differ.
        """
        ...
