"""The Aggregator service: a thin gRPC shell around the rounds and the reducer of one shard.

Checks and decisions run on the event loop; sums and encodings run in order on one thread of their own, so that a busy
reducer never stops the streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from common.codecs import Encoded
from common.config import JobSpec
from common.errors import CodecError, SpecError, clipped, refusal
from common.events import Emitter
from common.layout import Layout, TensorSpec, plan_layout
from common.wire.rpc import PROTOCOL_VERSION
from common.wire.v1 import ps_pb2 as wire
from ps import rounds as r
from ps.membership import FormView
from ps.outcome import REASONS, Outcome, ending_of
from ps.reduce import ShardReducer
from ps.streams import Outbox, first_message, kind_of, serve_stream

MAXIMAL_REFUSALS = 32
"""Refused contributions after which a stream is closed: its worker does not speak our protocol."""
DIGEST_BYTES = 16
"""Of XXH3-128."""
SPARE_MESSAGES = 256
"""Room in an outbox beside two rounds of averages."""


class Aggregator:
    """One shard of one job."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        shard: int,
        incarnation: int,
        emit: Emitter,
        end: Callable[[Outcome], None],
    ) -> None:
        self._spec = spec
        self._shard = shard
        self._incarnation = incarnation
        self._emit = emit
        self._end = end
        self._lane = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reduce")
        self._rounds: r.Rounds | None = None
        self._reducer: ShardReducer | None = None
        self._layout: Layout | None = None
        self._view: tuple[int, int] | None = None
        self._worker_ids: tuple[str, ...] = ()
        self._peers: dict[int, Outbox] = {}
        self._held: dict[tuple[int, int], Encoded] = {}
        self._averages: dict[tuple[int, int], bytes] = {}
        self._expected: FormView | None = None
        self._stop: bytes | None = None

    def expect(self, formed: FormView) -> None:
        """Tells the coordinator's own shard which view has formed; other shards learn it from the first Hello."""
        self._view = (self._incarnation, formed.view)
        self._worker_ids = formed.worker_ids
        self._expected = formed

    @property
    def round(self) -> int:
        """The open round, 0 before the first Hello."""
        return self._rounds.round if self._rounds else 0

    @property
    def has_workers(self) -> bool:
        """True while a worker's stream is open."""
        return bool(self._peers)

    def tick(self) -> None:
        """Lets the rounds see the time."""
        if self._rounds:
            self._perform(self._rounds.handle(r.Tick(), time.monotonic()))

    def request_stop(self, text: str) -> None:
        """Asks all workers, also those whose streams are still to open, to finish the round and leave."""
        self._stop = wire.ServerMessage(stop=wire.StopRequest(text=text)).SerializeToString()
        for outbox in self._peers.values():
            outbox.put(self._stop)

    def broadcast(self, message: wire.ServerMessage, *, last: bool = False) -> None:
        """Queues a message for every worker; `last` ends the streams after it."""
        data = message.SerializeToString()
        for outbox in self._peers.values():
            outbox.put(data)
            if last:
                outbox.close()

    def close(self) -> None:
        """Ends the arithmetic thread once its work is done."""
        self._lane.shutdown(wait=False, cancel_futures=True)

    async def exchange(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """Handles one Exchange stream."""
        await serve_stream(requests, context, Outbox(SPARE_MESSAGES), self._read)

    async def _read(self, requests: AsyncIterator[Any], outbox: Outbox) -> None:
        message = await first_message(requests, self._spec.deadlines.hello_s)
        if message is None:
            return
        if kind_of(message) != "hello":
            self._refuse(outbox, wire.REASON_MALFORMED, refusal("Hello first", "message", kind_of(message)))
            return
        hello = message.hello
        why_not = self._greet(hello)
        if why_not:
            self._refuse(outbox, *why_not)
            return
        worker = hello.worker_index
        outbox.limit = SPARE_MESSAGES + 2 * len(self._layout.buckets if self._layout else ())
        self._peers[worker] = outbox
        said_goodbye = False
        try:
            self._event(r.HelloReceived(worker_index=worker, view=hello.view, round=hello.round))
            if self._stop:
                outbox.put(self._stop)
            said_goodbye = await self._read_contributions(requests, worker, outbox)
        finally:
            if self._peers.get(worker) is outbox:
                del self._peers[worker]
            if outbox.overflowed.is_set():
                text = refusal("a worker that reads", "unread_messages", outbox.limit)
                self._emit("refused", worker_id=self._worker_ids[worker], text=text)
            if not said_goodbye:
                self._event(r.StreamLost(worker_index=worker))

    async def _read_contributions(self, requests: AsyncIterator[Any], worker: int, outbox: Outbox) -> bool:
        refusals = 0
        async for message in requests:
            match kind_of(message):
                case "contribution":
                    refusals += not self._contribution(message.contribution, worker, outbox)
                case "goodbye":
                    said = message.goodbye
                    goodbye = r.GoodbyeReceived(
                        worker_index=worker, ending=ending_of(said.ending), text=clipped(said.text), retry=said.retry
                    )
                    self._event(goodbye)
                    return True
                case kind:
                    rule, who = "a contribution or Goodbye", self._worker_ids[worker]
                    self._refuse(outbox, wire.REASON_MALFORMED, refusal(rule, "message", kind, who))
                    refusals += 1
            if refusals > MAXIMAL_REFUSALS:
                return False
        return False

    # Hello

    def _greet(self, hello: wire.Hello) -> tuple[int, str] | None:
        """Checks a Hello, and takes the first good one's layout; returns why it is refused, if it is."""
        spec, ids = self._spec, tuple(hello.worker_ids)
        view = (hello.coordinator_incarnation, hello.view)
        expected_view = self._view or view
        rules: list[tuple[int, str, object, object]] = [
            (wire.REASON_PROTOCOL_VERSION, "protocol_version", PROTOCOL_VERSION, hello.protocol_version),
            (wire.REASON_JOB, "job_id", spec.job_id, hello.job_id),
            (wire.REASON_JOB, "job_digest", spec.digest(), hello.job_digest.hex()),
            (wire.REASON_BUCKET, "shard", self._shard, hello.shard),
            (wire.REASON_VIEW, "coordinator_incarnation", expected_view[0], view[0]),
            (wire.REASON_VIEW, "view", expected_view[1], view[1]),
            (wire.REASON_VIEW, "workers", spec.workers, len(ids)),
            (wire.REASON_VIEW, "worker_ids", list(self._worker_ids or ids), list(ids)),
        ]
        for reason, name, expected, got in rules:
            if expected != got:
                return reason, refusal(f"{name}={expected}", name, got, f"Hello to shard {self._shard}")
        if not self._view and self._shard == 0:
            return wire.REASON_VIEW, refusal("a view that has formed", "view", hello.view)
        if hello.worker_index >= spec.workers:
            return wire.REASON_VIEW, refusal(f"worker_index below {spec.workers}", "worker_index", hello.worker_index)
        if hello.worker_index in self._peers:
            worker_id = ids[hello.worker_index]
            return wire.REASON_WORKER_ID, refusal("a worker_id that is not live", "worker_id", worker_id)
        return self._take_layout(hello)

    def _take_layout(self, hello: wire.Hello) -> tuple[int, str] | None:
        """Plans the first good Hello's layout; at shard 0 only the one that all members had when they joined."""
        agreed = self._expected
        if agreed and self._rounds is None and hello.round != agreed.round:
            return wire.REASON_ROUND, refusal(f"round={agreed.round}, which is open", "round", hello.round)
        digest = agreed.layout_digest if agreed else None
        try:
            if digest is None or digest == hello.layout_digest:
                layout = self._layout or plan_layout(tensors_from(hello.tensors), self._spec)
                digest = layout.digest()
        except (SpecError, CodecError) as error:
            return wire.REASON_LAYOUT, str(error)
        if digest != hello.layout_digest:
            rule = f"layout_digest={digest.hex()}"
            return wire.REASON_LAYOUT, refusal(rule, "layout_digest", hello.layout_digest.hex())
        if self._rounds is None:
            self._start(layout, hello)
        return None

    def _start(self, layout: Layout, hello: wire.Hello) -> None:
        self._reducer = ShardReducer(layout, self._spec, self._shard)
        self._layout = layout
        self._view = (hello.coordinator_incarnation, hello.view)
        self._worker_ids = tuple(hello.worker_ids)
        config = r.RoundsConfig(
            view=hello.view,
            worker_ids=self._worker_ids,
            buckets=tuple(self._reducer.buckets),
            together=self._reducer.published_together,
            first_round=hello.round,
            deadline_s=self._spec.deadlines.round_s,
            report_s=self._spec.deadlines.report_s,
        )
        self._rounds = r.Rounds(config, time.monotonic())

    # Contributions

    def _contribution(self, contribution: wire.Contribution, worker: int, outbox: Outbox) -> bool:
        """Checks a contribution's content and hands it to the rounds; False if it was refused."""
        assert self._reducer is not None
        number, who = contribution.bucket, self._worker_ids[worker]
        where = f"round {contribution.round}, bucket {number}, {who}"
        if contribution.incarnation != self._incarnation:
            text = refusal(f"incarnation={self._incarnation}", "incarnation", contribution.incarnation, where)
            self._refuse(outbox, wire.REASON_INCARNATION, text, contribution)
            return False
        if len(contribution.parameter_digest) != DIGEST_BYTES:
            size = len(contribution.parameter_digest)
            text = refusal(f"a digest of {DIGEST_BYTES} bytes", "digest_bytes", size, where)
            self._refuse(outbox, wire.REASON_CONTENT, text, contribution)
            return False
        encoded = encoded_from(contribution)
        if number in self._reducer.buckets:
            try:
                if encoded is None:
                    raise CodecError(refusal("whole float32 scales", "scale_bytes", len(contribution.scales)))
                self._reducer.check(number, contribution.codec, encoded)
            except CodecError as error:
                expected = self._reducer.push_codec_of(number).wire_name
                reason = wire.REASON_CONTENT if contribution.codec == expected else wire.REASON_CODEC
                self._refuse(outbox, reason, f"{error} ({where})", contribution)
                return False
        event = r.ContributionReceived(
            worker_index=worker,
            view=contribution.view,
            round=contribution.round,
            bucket=number,
            parameter_digest=contribution.parameter_digest,
        )
        return self._event(event, encoded)

    def _event(self, event: r.Event, encoded: Encoded | None = None) -> bool:
        assert self._rounds is not None
        effects = self._rounds.handle(event, time.monotonic())
        self._perform(effects, encoded)
        return not any(isinstance(effect, r.Refuse) for effect in effects)

    def _perform(self, effects: Iterable[r.Effect], encoded: Encoded | None = None) -> None:
        for effect in effects:
            match effect:
                case r.Hold() if encoded is not None:
                    self._held[effect.worker_index, effect.bucket] = encoded
                case r.Add():
                    content = self._held.pop((effect.worker_index, effect.bucket), encoded)
                    self._submit(self._add, effect, content)
                case r.Publish():
                    self._submit(self._publish, effect, asyncio.get_running_loop())
                case r.Fail():
                    ids = tuple(self._worker_ids[worker] for worker in effect.worker_indices)
                    self._end(Outcome.failed(effect.text, ids, retry=effect.retry))
                case r.Finish():
                    self._end(Outcome.finished(effect.ending))
                case _:
                    self._tell(effect)

    def _tell(self, effect: r.Effect) -> None:
        """Performs the effects that are messages to workers, or nothing."""
        match effect:
            case r.Welcome():
                welcome = wire.Welcome(incarnation=self._incarnation, round=effect.round, missing=effect.missing)
                self._put(effect.worker_index, wire.ServerMessage(welcome=welcome))
            case r.SendAverage():
                average = self._averages.get((effect.round, effect.bucket))
                if average is not None:  # otherwise it is being encoded and goes to all when it is ready
                    self._put(effect.worker_index, average)
            case r.Refuse():
                text, reason = effect.text, REASONS[effect.why]
                refused = wire.Refusal(reason=reason, text=text, round=effect.round, bucket=effect.bucket)
                self._emit("refused", worker_id=self._worker_ids[effect.worker_index], text=text)
                self._put(effect.worker_index, wire.ServerMessage(refusal=refused))
            case r.ReportWaiting():
                ids = [self._worker_ids[worker] for worker in effect.worker_indices]
                self._emit("waiting", missing=ids, waited_s=round(effect.waited_s, 1), round=effect.round)
                waiting = wire.Waiting(worker_ids=ids, waited_s=effect.waited_s, round=effect.round)
                self.broadcast(wire.ServerMessage(waiting=waiting))
            case r.Forget():
                for key in [key for key in self._averages if key[0] <= effect.round]:
                    del self._averages[key]

    # Arithmetic, on its own thread

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        loop = asyncio.get_running_loop()

        def guarded() -> None:
            try:
                work(*arguments)
            except CodecError as error:
                loop.call_soon_threadsafe(self._end, Outcome.failed(str(error), (), retry=False))
            except Exception as error:  # a defect of ours must end the job, not leave it waiting
                loop.call_soon_threadsafe(
                    self._end, Outcome.failed(f"defect in the reducer: {error!r}", (), retry=False)
                )
                raise

        self._lane.submit(guarded)

    def _add(self, effect: r.Add, encoded: Encoded) -> None:
        assert self._reducer is not None
        self._reducer.add(effect.bucket, encoded, first=effect.first)

    def _publish(self, effect: r.Publish, loop: asyncio.AbstractEventLoop) -> None:
        assert self._reducer is not None
        messages = {}
        for number, encoded in self._reducer.publish(effect.round, effect.buckets).items():
            average = wire.Average(
                view=self._rounds.config.view if self._rounds else 0,
                round=effect.round,
                bucket=number,
                codec=self._reducer.pull_codec_of(number).wire_name,
                scales=encoded.scales.astype("<f4", copy=False).tobytes(),
                payload=bytes(encoded.payload),
                incarnation=self._incarnation,
            )
            messages[effect.round, number] = wire.ServerMessage(average=average).SerializeToString()
        loop.call_soon_threadsafe(self._published, messages)

    def _published(self, messages: dict[tuple[int, int], bytes]) -> None:
        self._averages.update(messages)
        for message in messages.values():
            for outbox in self._peers.values():
                outbox.put(message)

    def _put(self, worker: int, message: wire.ServerMessage | bytes) -> None:
        outbox = self._peers.get(worker)
        if outbox:
            outbox.put(message)

    def _refuse(self, outbox: Outbox, reason: int, text: str, contribution: wire.Contribution | None = None) -> None:
        self._emit("refused", worker_id="", text=text)
        refused = wire.Refusal(reason=reason, text=text)  # type: ignore[arg-type]
        if contribution is not None:
            refused.round, refused.bucket = contribution.round, contribution.bucket
        outbox.put(wire.ServerMessage(refusal=refused))


def tensors_from(messages: Iterable[wire.Tensor]) -> list[TensorSpec]:
    """The layout's input as a worker sent it."""
    return [TensorSpec(name=m.name, shape=tuple(m.shape), buffer=m.buffer) for m in messages]


def encoded_from(message: wire.Contribution | wire.Average) -> Encoded | None:
    """A bucket's content as received; None if its scales are no whole float32 values."""
    if len(message.scales) % 4:
        return None
    return Encoded(scales=np.frombuffer(message.scales, "<f4"), payload=message.payload)
