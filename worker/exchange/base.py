"""The contract of an exchange."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from common.codecs import Float32
from worker.exchange.coordination import End
from worker.exchange.feedback import ErrorFeedback
from worker.exchange.gradients import GradientMemory


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What one round cost on the wire.

    Attributes:
        pushed_bytes: of this worker's messages to the servers, as serialized.
        pulled_bytes: of the servers' messages to this worker, as serialized.
        seconds: from the first bucket that was said to be ready until the last average was decoded.
        waited_s: the part of it that the caller spent waiting in `finish`: what was not hidden behind its other work.
    """

    pushed_bytes: int
    pulled_bytes: int
    seconds: float
    waited_s: float


class Exchange(Protocol):
    """Turns this worker's vectors into the average over all workers, in place.

    A round is `begin`, then `ready` for every gradient bucket, in any order and from any thread, then `finish`. Nothing
    but the exchange may touch a bucket between its `ready` and the end of `finish`.
    """

    stop_requested: str | None
    """Why a server asks all workers to stop, if one does."""
    feedback: ErrorFeedback | None
    """What earlier rounds left unsent, if the codec is biased; to be saved and loaded between rounds only."""

    def begin(self, round_: int, gradient: GradientMemory, parameter_digest: bytes) -> None:
        """Begins a round.

        Args:
            round_: the round, each call one more than the last.
            gradient: of d elements; its buckets are replaced by the average that all workers decode.
            parameter_digest: of the parameters before this round.

        Raises:
            DatpsError: as `finish`; the exchange has failed.
        """
        ...

    def ready(self, buckets: Iterable[int]) -> None:
        """Says that these buckets of the gradient hold their final values. Returns at once; raises nothing.

        On a device: that they do once what the caller's current stream has been given is done.
        """
        ...

    def finish(self, state: Float32) -> Traffic:
        """Exchanges the state vector too and waits for all averages.

        Args:
            state: float32 of shape (e,); replaced by the uncompressed average.

        Raises:
            CodecError: a value is not finite; the message names bucket, layer and worker.
            PeerLostError: a server or another worker is gone.
            MismatchError: a server refuses this worker, or ends the job because replicas differ.
        """
        ...

    def fail(self, text: str, retry: bool) -> None:
        """Ends the exchange from another thread: the coordinator has aborted the job or is gone."""
        ...

    def close(self, end: End) -> None:
        """Ends our part and tells the others how."""
        ...
