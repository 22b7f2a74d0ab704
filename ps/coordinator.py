"""The Coordinator service: a thin gRPC shell around the membership."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import grpc

from common.config import JobSpec, Split
from common.errors import clipped, refusal
from common.events import Emitter
from common.wire.rpc import PROTOCOL_VERSION, Malformed
from common.wire.v1 import ps_pb2 as wire
from ps import membership as m
from ps.outcome import REASONS, Outcome, ending_of
from ps.streams import Outbox, first_message, kind_of, serve_stream

OUTBOX_LIMIT = 1024
ViewFormed = Callable[[m.FormView], None]


class Coordinator:
    """Admits the workers of one job."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        incarnation: int,
        shard_addresses: tuple[str, ...],
        emit: Emitter,
        end: Callable[[Outcome], None],
        view_formed: ViewFormed,
    ) -> None:
        self._spec = spec
        self._incarnation = incarnation
        self._shard_addresses = shard_addresses
        self._emit = emit
        self._end = end
        self._view_formed = view_formed
        self._numbers = itertools.count()
        self._connections: dict[int, Outbox] = {}
        self._view = 0
        self._waiting: wire.Waiting | None = None
        self._membership = m.Membership(
            m.MembershipConfig(
                job_id=spec.job_id,
                protocol_version=PROTOCOL_VERSION,
                workers=spec.workers,
                same_samples=spec.data.split is Split.SHARED,
                join_s=spec.deadlines.join_s,
                report_s=spec.deadlines.report_s,
            )
        )

    @property
    def formed(self) -> bool:
        """True once the view has formed."""
        return self._membership.formed

    def tick(self) -> None:
        """Lets the membership see the time, and tells the workers what has changed since the last tick."""
        self._event(m.Tick())
        if self._waiting is not None:
            self.broadcast(wire.JoinResponse(waiting=self._waiting))
            self._waiting = None

    def broadcast(self, message: wire.JoinResponse, *, last: bool = False) -> None:
        """Queues a message for every worker; `last` ends the streams after it."""
        data = message.SerializeToString()
        for outbox in self._connections.values():
            outbox.put(data)
            if last:
                outbox.close()

    async def join(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """Handles one Join stream, which lasts as long as its worker takes part."""
        await serve_stream(requests, context, Outbox(OUTBOX_LIMIT), self._read)

    async def leave(
        self, request: wire.LeaveRequest | Malformed, context: grpc.aio.ServicerContext
    ) -> wire.LeaveResponse:
        """Handles one Leave."""
        if isinstance(request, Malformed):
            text = refusal("a LeaveRequest", "bytes", request.size_bytes)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
            raise AssertionError("abort raises")
        if not self._view or (request.incarnation, request.view) != (self._incarnation, self._view):
            text = refusal(f"view={self._view} of incarnation={self._incarnation}", "view", request.view)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        ending = ending_of(request.ending)
        self._emit("left", worker_id=request.worker_id, ending=ending.name.lower())
        left = m.Left(
            worker_id=request.worker_id,
            ending=ending,
            text=clipped(request.text),
            retry=request.retry,
            replica_digest=request.replica_digest,
        )
        for effect in self._event(left):
            if isinstance(effect, m.Fail) and not effect.retry and request.worker_id in effect.worker_ids:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, effect.text)
        return wire.LeaveResponse()

    async def _read(self, requests: AsyncIterator[Any], outbox: Outbox) -> None:
        message = await first_message(requests, self._spec.deadlines.hello_s)
        if message is None:
            return
        if kind_of(message) != "introduction":
            _refuse(outbox, wire.REASON_MALFORMED, refusal("Introduction first", "message", kind_of(message)))
            return
        said, connection = message.introduction, next(self._numbers)
        self._connections[connection] = outbox
        introduced = m.Introduced(
            connection=connection,
            protocol_version=said.protocol_version,
            job_id=said.job_id,
            worker_id=said.worker_id,
        )
        try:
            self._event(introduced)
            async for message in requests:
                if kind_of(message) != "readiness" or outbox.closed or self.formed:
                    _refuse(outbox, wire.REASON_MALFORMED, refusal("one Readiness", "message", kind_of(message)))
                    return
                self._event(_ready(message.readiness, connection))
        finally:
            del self._connections[connection]
            self._event(m.ConnectionLost(connection=connection))

    def _event(self, event: m.Event) -> list[m.Effect]:
        effects = self._membership.handle(event, time.monotonic())
        self._perform(effects)
        return effects

    def _perform(self, effects: Iterable[m.Effect]) -> None:
        for effect in effects:
            match effect:
                case m.Offer():
                    offer = wire.JobOffer(job_spec=self._spec.to_json(), incarnation=self._incarnation)
                    self._connections[effect.connection].put(wire.JoinResponse(offer=offer))
                case m.Refuse():
                    self._emit("refused", worker_id=effect.worker_id, text=effect.text)
                    _refuse(self._connections[effect.connection], REASONS[effect.why], effect.text)
                    self._connections[effect.connection].close()
                case m.FormView():
                    self._form(effect)
                case m.ReportJoined():
                    self._report(effect)
                case m.Fail():
                    self._end(Outcome.failed(effect.text, effect.worker_ids, retry=effect.retry))
                case m.Finish():
                    self._end(Outcome.finished(effect.ending))

    def _form(self, view: m.FormView) -> None:
        self._view = view.view
        self._emit("view", view=view.view, workers=list(view.worker_ids))
        self._view_formed(view)
        for worker_index, connection in enumerate(view.connections):
            admission = wire.Admission(
                worker_index=worker_index,
                view=view.view,
                worker_ids=view.worker_ids,
                samples=view.samples,
                shard_addresses=self._shard_addresses,
                worker_addresses=view.addresses,
            )
            self._connections[connection].put(wire.JoinResponse(admission=admission))

    def _report(self, effect: m.ReportJoined) -> None:
        missing, waited_s = effect.expected - len(effect.worker_ids), round(effect.waited_s, 1)
        if effect.newcomer:
            joined = len(effect.worker_ids)
            self._emit("joined", worker_id=effect.newcomer, joined=joined, expected=effect.expected)
        else:
            awaited = [*effect.not_ready, *([f"{missing} more to join"] if missing else [])]
            self._emit("waiting", missing=awaited, waited_s=waited_s, round=0)
        self._waiting = wire.Waiting(worker_ids=effect.not_ready, waited_s=waited_s, missing=missing)


def _ready(said: wire.Readiness, connection: int) -> m.Ready:
    return m.Ready(
        connection=connection,
        layout_digest=said.layout_digest,
        replica_digest=said.replica_digest,
        round=said.round,
        samples=said.samples,
        classes=said.classes,
        address=said.address,
    )


def _refuse(outbox: Outbox, reason: int, text: str) -> None:
    outbox.put(wire.JoinResponse(refusal=wire.Refusal(reason=reason, text=text)))  # type: ignore[arg-type]
