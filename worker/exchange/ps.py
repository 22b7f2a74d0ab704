"""The exchange over gRPC with parameter servers: a thin shell around the session.

The caller's thread encodes buckets and queues them; one thread per shard receives and decodes averages. So a bucket is
on its way while the next one is being encoded, and decoded while others are still on their way.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable
from typing import Any

import grpc
import numpy as np

from common.codecs import BlockScales, Codec, Encoded, Float32, RandomKey
from common.config import JobSpec
from common.errors import CodecError, DatpsError, MismatchError, PeerLostError, refusal
from common.events import Emitter
from common.layout import Bucket, BucketKind, Layout, pull_codec, push_codec, state_codec
from common.wire import rpc
from common.wire.v1 import ps_pb2 as wire
from worker import session as s
from worker.exchange.base import Traffic
from worker.exchange.coordination import Admission, End, status_text, tensor_messages

FAREWELL_S = 5.0
GRACE_S = 10.0
"""What a server gets beyond its own deadline, which knows whom it waits for, before we give it up."""


class _ShardStream:
    """One Exchange stream: outgoing messages are queued, incoming ones read by a thread of its own."""

    def __init__(self, channel: grpc.Channel, address: str, shard: int) -> None:
        self.address = address
        self.shard = shard
        self.incarnation = 0
        self.thread: threading.Thread | None = None
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        exchange = rpc.stub(channel, rpc.AGGREGATOR, "Exchange", sized=True)
        self.responses = exchange(iter(self._outgoing.get, None))

    def put(self, message: wire.WorkerMessage) -> int:
        """Queues a message; returns its size on the wire."""
        data = message.SerializeToString()
        self._outgoing.put(data)
        return len(data)

    def end(self) -> None:
        """Ends our side of the stream once everything queued is written."""
        self._outgoing.put(None)


class ParameterServerExchange:
    """One worker's exchange with all shards."""

    def __init__(
        self,
        *,
        layout: Layout,
        spec: JobSpec,
        admission: Admission,
        channels: Iterable[grpc.Channel],
        first_round: int,
        emit: Emitter,
    ) -> None:
        """`channels`: by shard; the streams are opened at once."""
        self.stop_requested: str | None = None
        self._layout = layout
        self._spec = spec
        self._admission = admission
        self._emit = emit
        self._push = push_codec(layout, spec)
        self._pull = [pull_codec(layout, spec, shard) for shard in range(layout.servers)]
        self._state_codec = state_codec(layout)
        shard_of = tuple(bucket.shard for bucket in layout.buckets)
        self._session = s.Session(shard_of, first_round=first_round)
        self._condition = threading.Condition()
        self._failure: DatpsError | None = None
        self._closing = False
        self._kept: dict[tuple[int, int], Encoded] = {}
        self._awaited: set[int] = set()
        self._pushed_bytes = self._pulled_bytes = 0
        self._digest = b""
        self._gradient = self._state = np.empty(0, np.float32)
        self._streams = [
            _ShardStream(channel, address, shard)
            for shard, (channel, address) in enumerate(zip(channels, admission.shard_addresses, strict=True))
        ]
        for stream in self._streams:
            stream.put(wire.WorkerMessage(hello=self._hello(stream.shard, first_round)))
            stream.thread = threading.Thread(
                target=self._read, args=(stream,), name=f"pull-{stream.shard}", daemon=True
            )
            stream.thread.start()

    @property
    def worker_id(self) -> str:
        """Our own name."""
        return self._admission.worker_ids[self._admission.worker_index]

    def average(self, round_: int, gradient: Float32, state: Float32, parameter_digest: bytes) -> Traffic:
        """See `worker.exchange.base.Exchange`."""
        started_s = time.perf_counter()
        with self._condition:
            self._raise_failure()
            self._session.handle(s.BeginRound(round=round_))
            self._gradient, self._state, self._digest = gradient, state, parameter_digest
            self._pushed_bytes = self._pulled_bytes = 0
            self._awaited = {bucket.number for bucket in self._layout.buckets}
        key = RandomKey(seed=self._spec.seed, round=round_, source=self._admission.worker_index)
        measured = self._measure(gradient, round_)
        for bucket in self._layout.buckets:
            encoded = self._encode(bucket, round_, key, measured)
            with self._condition:
                self._raise_failure()
                self._kept[round_, bucket.number] = encoded
                self._perform(self._session.handle(s.BucketEncoded(bucket=bucket.number)))
        with self._condition:
            deadline_s = self._spec.deadlines.round_s + GRACE_S
            if not self._condition.wait_for(lambda: self._failure or not self._awaited, timeout=deadline_s):
                self._set_failure(self._silence(deadline_s, round_))
            self._raise_failure()
            return Traffic(
                pushed_bytes=self._pushed_bytes,
                pulled_bytes=self._pulled_bytes,
                seconds=time.perf_counter() - started_s,
            )

    def fail(self, text: str, retry: bool) -> None:
        """Ends the session from outside: the coordinator has aborted the job or is gone."""
        with self._condition:
            self._perform(self._session.handle(s.Aborted(text=text, retry=retry)))

    def close(self, end: End) -> None:
        """Says Goodbye to all shards and waits, not for long, until they have heard it."""
        with self._condition:
            self._closing = True
        for stream in self._streams:
            goodbye = wire.Goodbye(ending=end.ending, text=end.text, retry=end.retry)
            stream.put(wire.WorkerMessage(goodbye=goodbye))
            stream.end()
        deadline_s = time.monotonic() + FAREWELL_S
        for stream in self._streams:
            if stream.thread:
                stream.thread.join(max(0.0, deadline_s - time.monotonic()))
            stream.responses.cancel()

    def _hello(self, shard: int, round_: int) -> wire.Hello:
        admission = self._admission
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
        )

    # Pushing, on the caller's thread

    def _measure(self, gradient: Float32, round_: int) -> BlockScales | None:
        if not self._push.needs_whole_vector:
            return None
        try:
            return self._push.measure(gradient, 0)
        except CodecError as error:
            raise CodecError(f"{error}; {self.worker_id}, round {round_}") from None

    def _encode(self, bucket: Bucket, round_: int, key: RandomKey, measured: BlockScales | None) -> Encoded:
        try:
            if bucket.kind is BucketKind.STATE:
                return self._state_codec.encode(self._values(bucket), bucket.start, key)
            return self._push.encode(self._values(bucket), bucket.start, key, measured)
        except CodecError as error:
            where = f"{bucket.kind.value} bucket {bucket.number}, {self.worker_id}, round {round_}"
            raise CodecError(f"{error}; {where}{self._layer(bucket)}") from None

    def _layer(self, bucket: Bucket) -> str:
        values = self._values(bucket)
        bad = np.flatnonzero(~np.isfinite(values))
        if bucket.kind is BucketKind.STATE or not bad.size:
            return ""
        return f", layer {self._layout.layer_at(bucket.start + int(bad[0]))}"

    def _values(self, bucket: Bucket) -> Float32:
        vector = self._state if bucket.kind is BucketKind.STATE else self._gradient
        return vector[bucket.start : bucket.stop]

    def _perform(self, effects: Iterable[s.Effect]) -> None:
        """Performs effects; the condition is held. `Accept` is left to the caller, which decodes without it."""
        for effect in effects:
            match effect:
                case s.Push():
                    self._push_bucket(effect)
                case s.Forget():
                    for key in [key for key in self._kept if key[0] <= effect.round]:
                        del self._kept[key]
                case s.Fail():
                    error = PeerLostError if effect.failure is s.Failure.PEER_LOST else MismatchError
                    self._set_failure(error(effect.text))

    def _push_bucket(self, effect: s.Push) -> None:
        encoded, stream = self._kept[effect.round, effect.bucket], self._streams[effect.shard]
        contribution = wire.Contribution(
            view=self._admission.view,
            round=effect.round,
            bucket=effect.bucket,
            codec=self._push_codec_of(effect.bucket).wire_name,
            scales=encoded.scales.astype("<f4", copy=False).tobytes(),
            payload=bytes(encoded.payload),
            parameter_digest=self._digest,
            incarnation=stream.incarnation,
        )
        self._pushed_bytes += stream.put(wire.WorkerMessage(contribution=contribution))

    def _push_codec_of(self, number: int) -> Codec:
        return self._push if self._layout.buckets[number].kind is BucketKind.GRADIENT else self._state_codec

    # Pulling, on one thread per shard

    def _read(self, stream: _ShardStream) -> None:
        name = f"server {stream.address} (shard {stream.shard})"
        try:
            for sized in stream.responses:
                self._receive(stream, sized)
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

    def _receive(self, stream: _ShardStream, sized: rpc.Sized) -> None:
        message: Any = sized.message
        match message.WhichOneof("kind"):
            case "average":
                self._average_received(stream, message.average, sized.size_bytes)
            case "welcome":
                stream.incarnation = message.welcome.incarnation
                lacking = frozenset(message.welcome.missing)
                self._event(s.Welcomed(shard=stream.shard, round=message.welcome.round, missing=lacking))
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

    def _average_received(self, stream: _ShardStream, average: wire.Average, size_bytes: int) -> None:
        bucket, encoded, codec = self._checked(stream, average)
        effects = self._event(s.AverageReceived(round=average.round, bucket=average.bucket))
        if not any(isinstance(effect, s.Accept) for effect in effects):
            return
        codec.decode(encoded, bucket.start, self._values(bucket), add=False)
        with self._condition:
            self._awaited.discard(average.bucket)
            self._pulled_bytes += size_bytes
            self._condition.notify_all()

    def _checked(self, stream: _ShardStream, average: wire.Average) -> tuple[Bucket, Encoded, Codec]:
        where = f"round {average.round}, bucket {average.bucket}, server {stream.address}"
        if average.incarnation != stream.incarnation:
            text = refusal(f"incarnation={stream.incarnation}", "incarnation", average.incarnation, where)
            raise MismatchError(text)
        if average.bucket >= len(self._layout.buckets) or self._layout.buckets[average.bucket].shard != stream.shard:
            raise MismatchError(refusal(f"a bucket of shard {stream.shard}", "bucket", average.bucket, where))
        bucket = self._layout.buckets[average.bucket]
        codec = self._pull[stream.shard] if bucket.kind is BucketKind.GRADIENT else self._state_codec
        if average.codec != codec.wire_name or len(average.scales) % 4:
            raise MismatchError(refusal(f"codec={codec.wire_name}", "codec", average.codec, where))
        encoded = Encoded(scales=np.frombuffer(average.scales, "<f4"), payload=average.payload)
        try:
            codec.check(encoded, bucket.start, bucket.n)
        except CodecError as error:
            raise MismatchError(f"{error} ({where})") from None
        return bucket, encoded, codec

    def _silence(self, waited_s: float, round_: int) -> PeerLostError:
        shards = sorted({self._layout.buckets[number].shard for number in self._awaited})
        names = ", ".join(f"{self._streams[shard].address} (shard {shard})" for shard in shards)
        return PeerLostError(f"no average of round {round_} within {waited_s:g} s from {names}")

    def _set_failure(self, error: DatpsError) -> None:
        if self._failure is None:
            self._failure = error
        self._condition.notify_all()

    def _raise_failure(self) -> None:
        if self._failure:
            raise self._failure
