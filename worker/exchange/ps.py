"""The exchange over gRPC with parameter servers: a thin shell around the session.

Three threads: the caller's says which buckets are ready; one encodes them, in the order of their numbers; one moves the
messages of all streams and decodes averages. So a bucket is on its way while the next one is being encoded (or backward
is still computing it), and decoded while others are still on their way.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import grpc
import numpy as np

from common.codecs import SERVER, BlockScales, Codec, Encoded, Float32, RandomKey
from common.config import JobSpec
from common.errors import CodecError, DatpsError, MismatchError, PeerLostError, refusal
from common.events import Emitter
from common.layout import Bucket, BucketKind, Layout, pull_codec, push_codec, state_codec
from common.node_memory import NodeMemory
from common.timeline import OFF, Timeline
from common.wire import rpc
from common.wire.frames import BucketMessage, new_frame
from common.wire.rpc import Malformed
from common.wire.v1 import ps_pb2 as wire
from worker import session as s
from worker.exchange.base import Traffic
from worker.exchange.coordination import LOOK_S, Admission, End, status_text, tensor_messages
from worker.exchange.encoder import Encoder
from worker.exchange.gradients import GradientMemory, HostGradient
from worker.exchange.streams import ShardStream, StreamLoop
from worker.exchange.turns import Turns

FAREWELL_S = 5.0
GRACE_S = 10.0
"""What a server gets beyond its own deadline, which knows whom it waits for, before we give it up."""


class ParameterServerExchange:
    """One worker's exchange with all shards; see `worker.exchange.base.Exchange`."""

    def __init__(
        self,
        *,
        layout: Layout,
        spec: JobSpec,
        admission: Admission,
        first_round: int,
        emit: Emitter,
        timeline: Timeline = OFF,
        carried: frozenset[int] | None = None,
        connect_s: float = 60.0,
        give_up: Callable[[], None] = lambda: None,
        memory: NodeMemory | None = None,
    ) -> None:
        """
        Args:
            layout: how the vectors are cut.
            spec: the job.
            admission: this worker's place.
            first_round: the round to begin with.
            emit: told for whom a server waits.
            timeline: of this process.
            carried: the buckets that this exchange is for, others of this worker being for the rest; None: all.
            connect_s: how long to wait for the servers to answer.
            give_up: called now and then while waiting for them; raises if that has become pointless.
            memory: shared with the shard of our own index, which runs on this node; None: it is like any other.

        Raises:
            PeerLostError: a server does not answer.
        """
        self.stop_requested: str | None = None
        self._layout, self._spec, self._admission = layout, spec, admission
        self._timeline, self._emit = timeline, emit
        self._encoder = Encoder(layout, spec, admission)
        self.feedback = self._encoder.feedback
        self._push = push_codec(layout, spec)
        self._pull = [pull_codec(layout, spec, shard) for shard in range(layout.shards)]
        self._state_codec = state_codec(layout)
        self._carried, self._memory = carried, memory
        self._buckets = tuple(b for b in layout.buckets if carried is None or b.number in carried)
        self._session = s.Session(tuple(b.shard for b in layout.buckets), first_round=first_round, carried=carried)
        self._condition = threading.Condition()
        self._failure: DatpsError | None = None
        self._closing = self._abandoned = False
        self._kept: dict[tuple[int, int], bytes] = {}
        self._beside: dict[int, int] = {}
        self._awaited: set[int] = set()
        in_turn = [bucket for bucket in self._buckets if bucket.kind is not BucketKind.SCALES]
        self._turns = Turns(in_turn, whole=self._push.needs_whole_vector)
        self._scales: dict[int, Float32] = {}
        self._pushed_bytes = self._pulled_bytes = 0
        self._started_s, self._round, self._digest = 0.0, first_round - 1, b""
        self._state: Float32 = np.empty(0, np.float32)
        self._gradient: GradientMemory = HostGradient(self._state)
        self._to_encode: queue.SimpleQueue[tuple[Bucket, ...] | None] = queue.SimpleQueue()
        self._encoding = threading.Thread(target=self._encode_all, name="encode", daemon=True)
        self._loop = StreamLoop("streams")
        self._streams = self._make_streams()
        self._open(connect_s, give_up)

    def _make_streams(self) -> dict[int, ShardStream]:
        """One for each shard that has buckets of ours."""
        shards = {bucket.shard for bucket in self._buckets}
        addresses = enumerate(self._admission.shard_addresses)
        timeline, room = self._timeline, self._spec.exchange.receive_buffer_bytes
        streams = {n: ShardStream(self._loop, address, n, timeline, room) for n, address in addresses if n in shards}
        if self._memory is not None and self._admission.worker_index in streams:
            streams[self._admission.worker_index].uses_memory = True
        return streams

    def _open(self, connect_s: float, give_up: Callable[[], None]) -> None:
        """Connects to all shards and says who we are."""
        self._encoding.start()
        try:
            self._connect(connect_s, give_up)
        except BaseException:
            self.abandon()
            raise
        for stream in self._streams.values():
            hello = self._hello(stream.shard, self._round + 1)
            stream.put(wire.WorkerMessage(hello=hello).SerializeToString())
            self._loop.start(self._read(stream))

    @property
    def worker_id(self) -> str:
        """Our own name."""
        return self._admission.worker_ids[self._admission.worker_index]

    def begin(self, round_: int, gradient: GradientMemory, parameter_digest: bytes) -> None:
        """See `worker.exchange.base.Exchange`."""
        with self._condition:
            self._wait_for(lambda: all(stream.incarnation is not None for stream in self._streams.values()))
            self._session.handle(s.BeginRound(round=round_))
            self._round, self._gradient, self._digest = round_, gradient, parameter_digest
            self._pushed_bytes = self._pulled_bytes = 0
            self._awaited = {bucket.number for bucket in self._buckets}
            self._encoder.begin(round_, gradient)
            self._turns.begin()
            self._started_s = 0.0

    def ready(self, buckets: Iterable[int]) -> None:
        """See `worker.exchange.base.Exchange`."""
        numbers = tuple(buckets)
        self._gradient.final(numbers)
        with self._condition:
            self._started_s = self._started_s or time.perf_counter()
            scales_first = {BucketKind.GRADIENT} if self._push.needs_shared_scales else set()
            turn = self._turns.ready(numbers)
            self._to_encode.put(tuple(self._layout.scales_of(b) if b.kind in scales_first else b for b in turn))

    def finish(self, state: Float32) -> Traffic:
        """See `worker.exchange.base.Exchange`."""
        called_s = time.perf_counter()
        self._state = state
        self.ready(bucket.number for bucket in self._layout.of_kind(BucketKind.STATE))
        with self._condition:
            self._wait_for(lambda: not self._awaited)
            self._gradient.settle()
            now_s = time.perf_counter()
            return Traffic(
                pushed_bytes=self._pushed_bytes,
                pulled_bytes=self._pulled_bytes,
                seconds=now_s - self._started_s,
                waited_s=now_s - called_s,
            )

    def average(self, round_: int, gradient: Float32, state: Float32, parameter_digest: bytes) -> Traffic:
        """A whole round of a gradient that is complete, on the host: `begin`, `ready`, `finish`."""
        self.begin(round_, HostGradient(gradient), parameter_digest)
        self.ready(bucket.number for bucket in self._layout.of_kind(BucketKind.GRADIENT))
        return self.finish(state)

    def fail(self, text: str, retry: bool) -> None:
        """Ends the session from outside: the coordinator has aborted the job or is gone."""
        with self._condition:
            self._perform(self._session.handle(s.Aborted(text=text, retry=retry)))

    def close(self, end: End) -> None:
        """Says Goodbye to all shards and waits, not for long, until they have heard it."""
        with self._condition:
            self._closing = True
        goodbye = wire.Goodbye(ending=end.ending, text=end.text, retry=end.retry)
        for stream in self._streams.values():
            stream.put(wire.WorkerMessage(goodbye=goodbye).SerializeToString())
            stream.end()
        deadline_s = time.monotonic() + FAREWELL_S
        for stream in self._streams.values():
            stream.ended.wait(max(0.0, deadline_s - time.monotonic()))
        self.abandon()

    def abandon(self) -> None:
        """Ends everything at once, without a word; the servers take us for dead unless `close` came before."""
        with self._condition:
            if self._abandoned:
                return
            self._abandoned = self._closing = True
        self._to_encode.put(None)
        self._encoding.join(FAREWELL_S)
        for stream in self._streams.values():
            self._loop.run(stream.close())
        self._loop.close()

    def _connect(self, connect_s: float, give_up: Callable[[], None]) -> None:
        until_s, keepalive_s = time.monotonic() + connect_s, self._spec.deadlines.keepalive_s
        for stream in self._streams.values():
            while not self._loop.run(stream.connect(LOOK_S, keepalive_s)):
                give_up()
                if time.monotonic() >= until_s:
                    rule = f"a server that answers within {connect_s:g} s"
                    raise PeerLostError(refusal(rule, "server", stream.address, f"shard {stream.shard}"))

    def _hello(self, shard: int, round_: int) -> wire.Hello:
        admission = self._admission
        own = () if self._carried is None else [b.number for b in self._buckets if b.shard == shard]
        return wire.Hello(
            protocol_version=rpc.PROTOCOL_VERSION,
            job_id=self._spec.job_id,
            job_digest=bytes.fromhex(self._spec.digest()),
            view=admission.view,
            coordinator_incarnation=admission.coordinator_incarnation,
            worker_ids=admission.worker_ids,
            worker_index=admission.worker_index,
            shard=shard,
            tensors=tensor_messages(self._layout.tensors),
            layout_digest=self._layout.digest(),
            round=round_,
            buckets=own,
            node_memory=self._streams[shard].uses_memory,
        )

    # Encoding, on a thread of its own

    def _encode_all(self) -> None:
        while (turn := self._to_encode.get()) is not None:
            try:
                self._gradient.start()
                for bucket in turn:
                    self._encode(bucket)
            except DatpsError as error:
                with self._condition:
                    self._set_failure(error)
            except Exception as error:
                with self._condition:
                    self._set_failure(PeerLostError(f"defect in the encoder: {error!r}"))
                raise

    def _encode(self, bucket: Bucket) -> None:
        """Encodes a bucket into its message and hands it to the session."""
        if self._failure:
            return
        round_, codec, stream = self._round, self._encoder.codec_of(bucket), self._streams[bucket.shard]
        header = wire.Contribution(
            view=self._admission.view,
            round=round_,
            bucket=bucket.number,
            codec=codec.wire_name,
            parameter_digest=self._digest,
            incarnation=stream.incarnation or 0,
        )
        start, n = bucket.start, bucket.n
        slot = self._memory.contribution(round_, bucket.number) if self._memory and stream.uses_memory else None
        frame = new_frame(header, codec.scale_count(start, n), codec.payload_bytes(start, n) if slot is None else 0)
        payload = frame.payload if slot is None else slot
        with self._timeline.phase("encode", round_, bucket.number, bucket.kind):
            if bucket.kind is BucketKind.SCALES:
                self._scales[bucket.number] = self._encoder.scales(self._layout.scales_of(bucket))
            values, shared = self._values(bucket), self._shared(bucket)
            encoded = self._encoder.encode(bucket, payload, values=values, shared=shared)
        frame.put_scales(encoded.scales)
        with self._condition:
            self._kept[round_, bucket.number] = frame.data
            self._beside[bucket.number] = 0 if slot is None else slot.size
            self._perform(self._session.handle(s.BucketEncoded(bucket=bucket.number)))

    def _shared(self, bucket: Bucket) -> BlockScales | None:
        """The scales of a gradient bucket that all workers share, where the codec needs them."""
        if not self._push.needs_shared_scales or bucket.kind is not BucketKind.GRADIENT:
            return None
        scales = self._layout.scales_of(bucket)
        return BlockScales(first_block=scales.start, values=self._scales[scales.number])

    def _values(self, bucket: Bucket) -> Float32 | None:
        """The values of a bucket of another vector than the gradient."""
        if bucket.kind is BucketKind.SCALES:
            return self._scales[bucket.number]
        return self._state[bucket.start : bucket.stop] if bucket.kind is BucketKind.STATE else None

    def _perform(self, effects: Iterable[s.Effect]) -> None:
        """Performs effects; the condition is held. `Accept` is left to the caller, which decodes without it."""
        for effect in effects:
            match effect:
                case s.Push():
                    message = self._kept[effect.round, effect.bucket]
                    self._pushed_bytes += len(message) + self._beside[effect.bucket]
                    self._streams[effect.shard].put(message, effect)
                case s.Forget():
                    for key in [key for key in self._kept if key[0] <= effect.round]:
                        del self._kept[key]
                case s.Fail():
                    error = PeerLostError if effect.failure is s.Failure.PEER_LOST else MismatchError
                    self._set_failure(error(effect.text))

    # Pulling, on the event loop of the streams

    async def _read(self, stream: ShardStream) -> None:
        name = f"server {stream.address} (shard {stream.shard})"
        try:
            await stream.talk(self._receive)
            text = f"{name} closed its stream"
        except grpc.RpcError as error:
            text = f"{name} is gone: {status_text(error)}"
        except DatpsError as error:
            with self._condition:
                self._set_failure(error)
            return
        except Exception as error:
            with self._condition:
                self._set_failure(PeerLostError(f"defect in the reader of {name}: {error!r}"))
            raise
        with self._condition:
            if not self._closing:
                self._perform(self._session.handle(s.ShardLost(shard=stream.shard, text=text)))

    def _receive(self, stream: ShardStream, message: Any) -> None:
        if isinstance(message, BucketMessage):
            self._average_received(stream, message)
            return
        if isinstance(message, Malformed):
            raise MismatchError(refusal("a message of this protocol", "bytes", message.size_bytes, stream.address))
        match message.WhichOneof("kind"):
            case "welcome":
                lacking = frozenset(message.welcome.missing)
                welcomed = s.Welcomed(shard=stream.shard, round=message.welcome.round, missing=lacking)
                with self._condition:
                    stream.incarnation = message.welcome.incarnation
                    self._perform(self._session.handle(welcomed))
                    self._condition.notify_all()
            case "waiting":
                waited_s = round(message.waiting.waited_s, 1)
                missing = list(message.waiting.worker_ids)
                self._emit("waiting", missing=missing, waited_s=waited_s, round=message.waiting.round)
            case "refusal":
                self._event(s.Refused(shard=stream.shard, text=message.refusal.text))
            case "abort":
                self._event(s.Aborted(text=message.abort.text, retry=message.abort.retry))
            case "stop":
                self.stop_requested = message.stop.text
            case kind:
                raise MismatchError(refusal("a message of this protocol", "message", kind, f"shard {stream.shard}"))

    def _event(self, event: s.Event) -> list[s.Effect]:
        with self._condition:
            effects = self._session.handle(event)
            self._perform(effects)
            return effects

    def _average_received(self, stream: ShardStream, average: BucketMessage) -> None:
        bucket, codec, encoded = self._expected(stream, average)
        effects = self._event(s.AverageReceived(round=average.round, bucket=average.bucket))
        if not any(isinstance(effect, s.Accept) for effect in effects):
            return
        if (average.round, average.bucket) not in self._kept:
            where = f"round {average.round}, bucket {average.bucket}, server {stream.address}"
            raise MismatchError(refusal("an average of what this worker has contributed to", "average", "early", where))
        with self._timeline.phase("decode", average.round, bucket.number, bucket.kind):
            self._decode(bucket, codec, encoded)
        if bucket.kind is BucketKind.SCALES:
            self._to_encode.put((self._layout.scales_of(bucket),))
        with self._condition:
            self._awaited.discard(average.bucket)
            self._pulled_bytes += average.size_bytes + (len(encoded.payload) if stream.uses_memory else 0)
            if not self._awaited:
                self._condition.notify_all()

    def _decode(self, bucket: Bucket, codec: Codec, encoded: Encoded) -> None:
        """Replaces a bucket by its average."""
        key = RandomKey(seed=self._spec.seed, round=self._round, source=SERVER)
        values, shared = self._values(bucket), self._shared(bucket)
        if values is not None:
            codec.decode(encoded, bucket.start, values, add=False, key=key)
        elif shared is None:
            self._gradient.decode(codec, bucket, encoded, key)
        else:
            values = self._gradient.room(bucket)
            codec.decode(encoded, bucket.start, values, add=False, key=key)
            self._encoder.average(values, bucket.start, shared)
            self._gradient.store(bucket)

    def _expected(self, stream: ShardStream, average: BucketMessage) -> tuple[Bucket, Codec, Encoded]:
        """The bucket, codec and content of an average that is what it should be.

        Raises:
            MismatchError: it is not.
        """
        where = f"round {average.round}, bucket {average.bucket}, server {stream.address}"
        if average.incarnation != stream.incarnation:
            text = refusal(f"incarnation={stream.incarnation}", "incarnation", average.incarnation, where)
            raise MismatchError(text)
        if average.bucket >= len(self._layout.buckets) or self._layout.buckets[average.bucket].shard != stream.shard:
            raise MismatchError(refusal(f"a bucket of shard {stream.shard}", "bucket", average.bucket, where))
        if self._carried is not None and average.bucket not in self._carried:
            raise MismatchError(refusal("a bucket of this stream", "bucket", average.bucket, where))
        bucket = self._layout.buckets[average.bucket]
        codec = self._pull[stream.shard] if bucket.kind is BucketKind.GRADIENT else self._state_codec
        encoded = average.encoded
        if average.codec != codec.wire_name or encoded is None:
            raise MismatchError(refusal(f"codec={codec.wire_name}", "codec", average.codec, where))
        if self._memory and stream.uses_memory:
            if len(average.payload):
                rule = "an empty payload (node_memory: it lies in shared memory)"
                raise MismatchError(refusal(rule, "payload_bytes", len(average.payload), where))
            encoded = replace(encoded, payload=self._memory.average(average.round, bucket.number))
        try:
            codec.check(encoded, bucket.start, bucket.n)
        except CodecError as error:
            raise MismatchError(f"{error} ({where})") from None
        return bucket, codec, encoded

    def _wait_for(self, done: Callable[[], bool]) -> None:
        """Waits, the condition held.

        Raises:
            DatpsError: the exchange has failed, or the servers say nothing.
        """
        deadline_s = self._spec.deadlines.round_s + GRACE_S
        if not self._condition.wait_for(lambda: self._failure or done(), timeout=deadline_s):
            self._set_failure(self._silence(deadline_s))
        if self._failure:
            raise self._failure

    def _silence(self, waited_s: float) -> PeerLostError:
        shards = {self._layout.buckets[number].shard for number in self._awaited}
        silent = [x for x in self._streams.values() if (x.shard in shards if self._awaited else x.incarnation is None)]
        names = ", ".join(f"{stream.address} (shard {stream.shard})" for stream in silent)
        missing = f"average of round {self._round}" if self._awaited else "Welcome"
        return PeerLostError(f"no {missing} within {waited_s:g} s from {names}")

    def _set_failure(self, error: DatpsError) -> None:
        if self._failure is None:
            self._failure = error
        self._condition.notify_all()
