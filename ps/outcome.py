"""How a server's job ended, and the wire's words for what the state machines say."""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import EXIT_COMPLETE, EXIT_MISMATCH, EXIT_RETRY, EXIT_TERMINATED
from common.wire.v1 import ps_pb2 as wire
from ps.membership import WhyNot
from ps.rounds import Ending, Why


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of the job as one server sees it."""

    exit_code: int
    text: str
    worker_ids: tuple[str, ...] = ()

    @classmethod
    def finished(cls, ending: Ending) -> Outcome:
        """All workers have left in good order."""
        if ending is Ending.STOPPED:
            return cls(exit_code=EXIT_TERMINATED, text="stopped on request, state saved")
        return cls(exit_code=EXIT_COMPLETE, text="complete")

    @classmethod
    def failed(cls, text: str, worker_ids: tuple[str, ...], *, retry: bool) -> Outcome:
        """The job cannot go on."""
        return cls(exit_code=EXIT_RETRY if retry else EXIT_MISMATCH, text=text, worker_ids=worker_ids)


ENDINGS = {
    wire.ENDING_COMPLETED: Ending.COMPLETED,
    wire.ENDING_STOPPED: Ending.STOPPED,
    wire.ENDING_FAILED: Ending.FAILED,
    wire.ENDING_ABORTED: Ending.ABORTED,
}

REASONS = {
    Why.VIEW: wire.REASON_VIEW,
    Why.ROUND: wire.REASON_ROUND,
    Why.BUCKET: wire.REASON_BUCKET,
    WhyNot.PROTOCOL_VERSION: wire.REASON_PROTOCOL_VERSION,
    WhyNot.JOB: wire.REASON_JOB,
    WhyNot.NAME: wire.REASON_NAME,
    WhyNot.WORKER_ID: wire.REASON_WORKER_ID,
    WhyNot.VIEW_FULL: wire.REASON_VIEW_FULL,
    WhyNot.LAYOUT: wire.REASON_LAYOUT,
    WhyNot.PARAMETERS: wire.REASON_PARAMETERS,
    WhyNot.ROUND: wire.REASON_ROUND,
    WhyNot.DATA: wire.REASON_DATA,
}


def ending_of(number: int) -> Ending:
    """The ending that a peer named; an unknown number counts as a failure."""
    return ENDINGS.get(number, Ending.FAILED)  # type: ignore[call-overload]


class RefusedError(Exception):
    """A contribution is refused."""

    def __init__(self, reason: int, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
