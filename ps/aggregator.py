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

from common.codecs import Encoded
from common.config import JobSpec
from common.errors import CodecError, SpecError, clipped, refusal
from common.events import Emitter
from common.layout import BucketKind, Layout, bucket_bytes_of, plan_layout
from common.node_memory import NodeMemory
from common.timeline import OFF, Timeline
from common.wire.frames import BucketMessage
from common.wire.v1 import ps_pb2 as wire
from ps import rounds as r
from ps.averages import AverageMessage, publish
from ps.contributions import checked_content
from ps.greeting import Expectation, hello_refusal, tensors_from
from ps.lanes import Lane, Lanes
from ps.membership import FormView
from ps.outcome import REASONS, Outcome, RefusedError, ending_of
from ps.reduce import ShardReducer
from ps.streams import Outbox, Pull, first_message, kind_of, serve_stream

MAXIMAL_REFUSALS = 32
"""Refused contributions after which a stream is closed: its worker does not speak our protocol."""
SPARE_MESSAGES = 256
"""Room in an outbox beside two rounds of averages."""


class Aggregator:
    """One shard of one job."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        incarnation: int,
        emit: Emitter,
        end: Callable[[Outcome], None],
        timeline: Timeline = OFF,
        memory: NodeMemory | None = None,
    ) -> None:
        self._memory = memory
        self._timeline = timeline
        self._spec = spec
        self._job_digest = spec.digest()
        self._shard = 0
        self._assigned = asyncio.Event()
        self._incarnation = incarnation
        self._emit = emit
        self._end = end
        self._reduce = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reduce")
        self._rounds: r.Rounds | None = None
        self._reducer: ShardReducer | None = None
        self._layout: Layout | None = None
        self._view: tuple[int, int] | None = None
        self._worker_ids: tuple[str, ...] = ()
        self._lanes = Lanes(spec.workers, spec.exchange.window_bytes, bucket_bytes_of(spec.exchange))
        self._held: dict[tuple[int, int], tuple[Encoded, int]] = {}
        self._averages: dict[tuple[int, int], AverageMessage] = {}
        self._expected: FormView | None = None
        self._stop: bytes | None = None

    def assign(self, shard: int) -> None:
        """Says which shard this is; streams wait for it."""
        self._shard = shard
        self._assigned.set()

    def expect(self, formed: FormView, coordinator_incarnation: int) -> None:
        """Says which view has formed; dedicated shards but for the coordinator's learn it from the first Hello."""
        self._view = (coordinator_incarnation, formed.view)
        self._worker_ids = formed.worker_ids
        self._expected = formed

    @property
    def round(self) -> int:
        """The open round, 0 before the first Hello."""
        return self._rounds.round if self._rounds else 0

    @property
    def has_workers(self) -> bool:
        """True while a worker's stream is open."""
        return bool(self._lanes)

    def tick(self) -> None:
        """Lets the rounds see the time."""
        if self._rounds:
            self._perform(self._rounds.handle(r.Tick(), time.monotonic()))

    def request_stop(self, text: str) -> None:
        """Asks all workers, also those whose streams are still to open, to finish the round and leave."""
        self._stop = wire.ServerMessage(stop=wire.StopRequest(text=text)).SerializeToString()
        for lane in self._lanes:
            lane.outbox.put(self._stop)

    def broadcast(self, message: wire.ServerMessage, *, last: bool = False) -> None:
        """Queues a message for every stream; `last` ends the streams after it."""
        data = message.SerializeToString()
        for lane in self._lanes:
            lane.outbox.put(data)
            if last:
                lane.outbox.close()

    def close(self) -> None:
        """Ends the arithmetic thread once its work is done."""
        self._reduce.shutdown(wait=False, cancel_futures=True)

    async def exchange(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """Handles one Exchange stream."""
        await serve_stream(requests, context, Outbox(SPARE_MESSAGES, self._timeline), self._read)

    async def _read(self, requests: AsyncIterator[Any], outbox: Outbox) -> None:
        message = await first_message(requests, self._spec.deadlines.hello_s)
        if message is None:
            return
        if kind_of(message) != "hello":
            self._refuse(outbox, wire.REASON_MALFORMED, refusal("Hello first", "message", kind_of(message)))
            return
        hello = message.hello
        try:
            await asyncio.wait_for(self._assigned.wait(), self._spec.deadlines.hello_s)
        except TimeoutError:
            self._refuse(outbox, wire.REASON_VIEW, refusal("a view that has formed", "view", hello.view))
            return
        why_not = self._greet(hello)
        if why_not:
            self._refuse(outbox, *why_not)
            return
        assert self._reducer is not None
        buckets = frozenset(hello.buckets or self._reducer.buckets)
        lane = Lane(hello.worker_index, buckets, outbox, self._memory if hello.node_memory else None)
        outbox.limit = SPARE_MESSAGES + 2 * len(buckets)
        self._lanes.add(lane)
        said_goodbye = False
        try:
            self._event(r.HelloReceived(worker_index=lane.worker, view=hello.view, round=hello.round), lane)
            if self._stop:
                outbox.put(self._stop)
            said_goodbye = await self._read_contributions(requests, lane)
        finally:
            self._lanes.remove(lane)
            if outbox.overflowed.is_set():
                text = refusal("a worker that reads", "unread_messages", outbox.limit)
                self._emit("refused", worker_id=self._worker_ids[lane.worker], text=text)
            if not said_goodbye:
                self._event(r.StreamLost(worker_index=lane.worker))

    async def _read_contributions(self, requests: AsyncIterator[Any], lane: Lane) -> bool:
        """Reads until the Goodbye, True, or the end of the stream, False."""
        refusals = 0
        async for message in requests:
            match kind_of(message):
                case "contribution":
                    refusals += not self._contribution(message, lane)
                    await lane.room.wait()
                case "goodbye":
                    self._goodbye(message.goodbye, lane)
                    return True
                case kind:
                    rule, who = "a contribution or Goodbye", self._worker_ids[lane.worker]
                    self._refuse(lane.outbox, wire.REASON_MALFORMED, refusal(rule, "message", kind, who))
                    refusals += 1
            if refusals > MAXIMAL_REFUSALS:
                return False
        return False

    def _goodbye(self, said: wire.Goodbye, lane: Lane) -> None:
        """A worker's part has ended when all of its streams have said so, or one of them with an error."""
        assert self._reducer is not None
        ending = ending_of(said.ending)
        gone = self._lanes.take_leave(lane)
        if gone == self._reducer.buckets.keys() or ending in (r.Ending.FAILED, r.Ending.ABORTED):
            text = clipped(said.text)
            goodbye = r.GoodbyeReceived(worker_index=lane.worker, ending=ending, text=text, retry=said.retry)
            self._event(goodbye)

    # Hello

    def _greet(self, hello: wire.Hello) -> tuple[int, str] | None:
        """Checks a Hello, and takes the first good one's layout; returns why it is refused, if it is."""
        expected = Expectation(
            spec=self._spec,
            job_digest=self._job_digest,
            shard=self._shard,
            view=self._view,
            worker_ids=self._worker_ids,
            shares_memory=self._memory is not None,
        )
        why_not = hello_refusal(hello, expected)
        if why_not:
            return why_not
        return self._take_layout(hello) or self._place_refusal(hello)

    def _place_refusal(self, hello: wire.Hello) -> tuple[int, str] | None:
        """Why this stream may not carry what it wants to: buckets of other shards, or of another stream."""
        assert self._reducer is not None
        wanted, own = set(hello.buckets), self._reducer.buckets
        foreign = sorted(wanted - own.keys())
        if foreign:
            return wire.REASON_BUCKET, refusal(f"buckets of shard {self._shard}", "bucket", foreign[0])
        if self._lanes.carried(hello.worker_index) & (wanted or own.keys()):
            worker_id = hello.worker_ids[hello.worker_index]
            return wire.REASON_WORKER_ID, refusal("a worker_id that is not live", "worker_id", worker_id)
        return None

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
        if self._memory:
            self._memory.lay_out(layout, self._spec, self._shard, grow=False)
        self._reducer = ShardReducer(layout, self._spec, self._shard)
        self._layout = layout
        self._view = (hello.coordinator_incarnation, hello.view)
        self._worker_ids = tuple(hello.worker_ids)
        config = r.RoundsConfig(
            view=hello.view,
            worker_ids=self._worker_ids,
            buckets=tuple(self._reducer.buckets),
            together=self._reducer.published_together,
            any_order=self._reducer.added_in_any_order,
            first_round=hello.round,
            deadline_s=self._spec.deadlines.round_s,
            report_s=self._spec.deadlines.report_s,
        )
        self._rounds = r.Rounds(config, time.monotonic())

    # Contributions

    def _contribution(self, contribution: BucketMessage, lane: Lane) -> bool:
        """Checks a contribution's content and hands it to the rounds; False if it was refused."""
        assert self._reducer is not None
        number, who = contribution.bucket, self._worker_ids[lane.worker]
        try:
            encoded = checked_content(contribution, lane, self._reducer, self._incarnation)
        except RefusedError as refused:
            where = f"round {contribution.round}, bucket {number}, {who}"
            self._refuse(lane.outbox, refused.reason, f"{refused.text} ({where})", contribution)
            return False
        event = r.ContributionReceived(
            worker_index=lane.worker,
            view=contribution.view,
            round=contribution.round,
            bucket=number,
            parameter_digest=contribution.parameter_digest,
        )
        return self._event(event, lane, encoded)

    def _event(self, event: r.Event, lane: Lane | None = None, encoded: Encoded | None = None) -> bool:
        assert self._rounds is not None
        round_ = self._rounds.round
        effects = self._rounds.handle(event, time.monotonic())
        if lane is not None and isinstance(event, r.ContributionReceived):
            self._keep_abreast(effects, event, lane, encoded)
        if self._rounds.round != round_:
            self._lanes.open_round()
        self._perform(effects, lane, encoded)
        return not any(isinstance(effect, r.Refuse) for effect in effects)

    def _keep_abreast(
        self, effects: Iterable[r.Effect], event: r.ContributionReceived, lane: Lane, encoded: Encoded | None
    ) -> None:
        """Counts what was contributed and what is added. Scales do not count: the rest waits for all of them."""
        assert self._reducer is not None
        for effect in effects:
            if not isinstance(effect, r.Hold | r.Add):
                continue
            number = effect.bucket
            if self._reducer.buckets[number].kind is BucketKind.SCALES:
                continue
            if effect.worker_index == event.worker_index and encoded is not None:
                self._lanes.contributed(lane, number, len(encoded.payload))
            if isinstance(effect, r.Add):
                self._lanes.added(number)

    def _perform(self, effects: Iterable[r.Effect], lane: Lane | None = None, encoded: Encoded | None = None) -> None:
        work: list[Callable[[], None]] = []
        for effect in effects:
            match effect:
                case r.Hold() if encoded is not None:
                    self._hold(effect, encoded)
                case r.Add():
                    work.append(self._addition(effect, encoded))
                case r.Publish():
                    work.append(self._publication(effect))
                case r.Fail():
                    ids = tuple(self._worker_ids[worker] for worker in effect.worker_indices)
                    self._end(Outcome.failed(effect.text, ids, retry=effect.retry))
                case r.Finish():
                    self._end(Outcome.finished(effect.ending))
                case _:
                    self._tell(effect, lane)
        if work:
            self._submit(work)

    def _hold(self, effect: r.Hold, encoded: Encoded) -> None:
        """Keeps a contribution until its turn."""
        self._held[effect.worker_index, effect.bucket] = encoded, self._timeline.now_ns()

    def _addition(self, effect: r.Add, encoded: Encoded | None) -> Callable[[], None]:
        content, since_ns = self._held.pop((effect.worker_index, effect.bucket), (encoded, None))
        if since_ns is not None and self._timeline.on:
            worker = effect.worker_index
            track = f"held of worker {worker}"
            self._timeline.add_phase("held", since_ns, effect.round, effect.bucket, track=track, worker=worker)
        assert content is not None
        return lambda: self._add(effect, content)

    def _tell(self, effect: r.Effect, lane: Lane | None) -> None:
        """Performs the effects that are messages to workers, or nothing."""
        match effect:
            case r.Welcome() if lane is not None:
                missing = [number for number in effect.missing if number in lane.buckets]
                welcome = wire.Welcome(incarnation=self._incarnation, round=effect.round, missing=missing)
                lane.outbox.put(wire.ServerMessage(welcome=welcome))
            case r.SendAverage():
                average = self._averages.get((effect.round, effect.bucket))
                carrier = self._lanes.carrier(effect.worker_index, effect.bucket)
                if average is not None and carrier:  # else it is being encoded and goes to all when it is ready
                    self._put_average(carrier, effect.round, effect.bucket, average)
            case r.Refuse() if lane is not None:
                text, reason = effect.text, REASONS[effect.why]
                refused = wire.Refusal(reason=reason, text=text, round=effect.round, bucket=effect.bucket)
                self._emit("refused", worker_id=self._worker_ids[effect.worker_index], text=text)
                lane.outbox.put(wire.ServerMessage(refusal=refused))
            case r.ReportWaiting():
                ids = [self._worker_ids[worker] for worker in effect.worker_indices]
                self._emit("waiting", missing=ids, waited_s=round(effect.waited_s, 1), round=effect.round)
                waiting = wire.Waiting(worker_ids=ids, waited_s=effect.waited_s, round=effect.round)
                self.broadcast(wire.ServerMessage(waiting=waiting))
            case r.Forget():
                for key in [key for key in self._averages if key[0] <= effect.round]:
                    del self._averages[key]

    # Arithmetic, on its own thread

    def _submit(self, work: list[Callable[[], None]]) -> None:
        loop = asyncio.get_running_loop()

        def guarded() -> None:
            try:
                for each in work:
                    each()
            except CodecError as error:
                loop.call_soon_threadsafe(self._end, Outcome.failed(str(error), (), retry=False))
            except Exception as error:  # a defect of ours must end the job, not leave it waiting
                loop.call_soon_threadsafe(
                    self._end, Outcome.failed(f"defect in the reducer: {error!r}", (), retry=False)
                )
                raise

        self._reduce.submit(guarded)

    def _add(self, effect: r.Add, encoded: Encoded) -> None:
        assert self._reducer is not None
        worker, round_, start_ns = effect.worker_index, effect.round, self._timeline.now_ns()
        self._reducer.add(effect.bucket, encoded, worker=worker, round_=round_, first=effect.first)
        self._timeline.add_phase("add", start_ns, round_, effect.bucket, worker=worker)

    def _publication(self, effect: r.Publish) -> Callable[[], None]:
        loop = asyncio.get_running_loop()
        return lambda: self._publish(effect, loop)

    def _publish(self, effect: r.Publish, loop: asyncio.AbstractEventLoop) -> None:
        assert self._reducer is not None
        assert self._rounds is not None
        messages = publish(
            self._reducer,
            effect.round,
            effect.buckets,
            view=self._rounds.config.view,
            incarnation=self._incarnation,
            memory=self._memory,
            timeline=self._timeline,
        )
        loop.call_soon_threadsafe(self._published, effect.round, messages)

    def _published(self, round_: int, messages: dict[int, AverageMessage]) -> None:
        for number, message in messages.items():
            self._averages[round_, number] = message
            for lane in self._lanes:
                if number in lane.buckets:
                    self._put_average(lane, round_, number, message)

    def _put_average(self, lane: Lane, round_: int, number: int, message: AverageMessage) -> None:
        lane.outbox.put(message.to(lane), Pull(round_, number, lane.worker) if self._timeline.on else None)

    def _refuse(self, outbox: Outbox, reason: int, text: str, contribution: BucketMessage | None = None) -> None:
        self._emit("refused", worker_id="", text=text)
        refused = wire.Refusal(reason=reason, text=text)  # type: ignore[arg-type]
        if contribution is not None:
            refused.round, refused.bucket = contribution.round, contribution.bucket
        outbox.put(wire.ServerMessage(refusal=refused))
