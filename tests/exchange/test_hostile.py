"""Bad peers are refused with a reason, and the others never notice."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.codecs import RandomKey
from common.config import JobSpec
from common.errors import MismatchError, PeerLostError, SpecError
from common.layout import TensorSpec, plan_layout, push_codec, state_codec
from common.wire import rpc
from common.wire.v1 import ps_pb2 as wire
from ps.server import Server, ServerOptions
from ps.streams import Outbox
from tests.support import (
    DEADLINE_S,
    DIGEST,
    TENSORS,
    RunningServer,
    introduce,
    job,
    join,
    members,
    ready,
    running_server,
    running_servers,
    silent,
)
from worker.exchange.coordination import Coordination, connect, tensor_messages


class RawStream:
    """An Exchange or Join stream that sends whatever it is told to."""

    def __init__(self, channel: grpc.Channel, path: str) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = channel.stream_stream(path, request_serializer=None, response_deserializer=None)
        self._responses = call(iter(self._outgoing.get, None), timeout=DEADLINE_S)

    def put(self, data: bytes | Any) -> None:
        self._outgoing.put(data if isinstance(data, bytes) else data.SerializeToString())

    def next(self) -> wire.ServerMessage:
        return wire.ServerMessage.FromString(next(self._responses))

    def next_of(self, kind: str) -> Any:
        """The next message of a kind; passes over `waiting`."""
        while (message := self.next()).WhichOneof("kind") != kind:
            assert message.WhichOneof("kind") == "waiting", message
        return getattr(message, kind)

    def end(self) -> None:
        self._outgoing.put(None)
        self._responses.cancel()


EXCHANGE, JOIN = "/datps.v1.Aggregator/Exchange", "/datps.v1.Coordinator/Join"


@contextlib.contextmanager
def raw_channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


class RawMember:
    """A view of two: `honest` is worker-0; `stream` is worker-1's Exchange, spoken by hand."""

    def __init__(self, spec: JobSpec, server: RunningServer, tensors: Sequence[TensorSpec] = TENSORS) -> None:
        self.spec = spec
        self.layout = plan_layout(tensors, spec)
        self._stack = contextlib.ExitStack()
        with ThreadPoolExecutor(1) as pool:
            honest = pool.submit(join, server.address, "worker-0", tensors)
            channel, coordination, _ = introduce(server.address, "worker-1")
            self._stack.callback(channel.close)
            self.admission = coordination.get_ready(ready(self.layout), DEADLINE_S)
            self.honest = honest.result(DEADLINE_S)
        self._stack.callback(self.honest.vanish)
        self.raw = self._stack.enter_context(raw_channel(server.address))

    def __enter__(self) -> RawMember:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def hello(self, **changes: Any) -> wire.WorkerMessage:
        values = {
            "protocol_version": rpc.PROTOCOL_VERSION,
            "job_id": self.spec.job_id,
            "job_digest": bytes.fromhex(self.spec.digest()),
            "view": self.admission.view,
            "coordinator_incarnation": self.admission.coordinator_incarnation,
            "worker_ids": self.admission.worker_ids,
            "worker_index": 1,
            "shard": 0,
            "tensors": tensor_messages(self.layout.tensors),
            "layout_digest": self.layout.digest(),
            "round": 0,
        }
        return wire.WorkerMessage(hello=wire.Hello(**{**values, **changes}))

    def open(self) -> tuple[RawStream, int]:
        stream = RawStream(self.raw, EXCHANGE)
        stream.put(self.hello())
        return stream, stream.next_of("welcome").incarnation

    def contribution(self, own: int, number: int, /, **changes: Any) -> wire.WorkerMessage:
        cut = self.layout.buckets[number]
        codec = push_codec(self.layout, self.spec) if cut.kind == "gradient" else state_codec(self.layout)
        key = RandomKey(seed=0, round=0, source=1)
        encoded = codec.encode(np.ones(cut.n, np.float32), cut.start, key)
        values = {
            "view": 1,
            "round": 0,
            "bucket": number,
            "codec": codec.wire_name,
            "scales": encoded.scales.tobytes(),
            "payload": bytes(encoded.payload),
            "parameter_digest": DIGEST,
            "incarnation": own,
        }
        return wire.WorkerMessage(contribution=wire.Contribution(**{**values, **changes}))

    def finish_round(self, stream: RawStream, incarnation: int, round_: int = 0) -> np.ndarray:
        """Contributes properly, as worker-0 does, and returns worker-0's average gradient."""
        gradient = np.ones(self.layout.d, np.float32)
        with ThreadPoolExecutor(1) as pool:
            state = np.ones(self.layout.e, np.float32)
            average = pool.submit(self.honest.exchange.average, round_, gradient, state, DIGEST)
            for bucket in range(len(self.layout.buckets)):
                stream.put(self.contribution(incarnation, bucket, round=round_))
            average.result(DEADLINE_S)
        return gradient


BAD_HELLOS: dict[str, tuple[dict[str, Any], str]] = {
    "protocol version": ({"protocol_version": 99}, r"protocol_version=1, got protocol_version=99"),
    "job": ({"job_id": "other"}, r"job_id=datps, got job_id=other"),
    "job spec": ({"job_digest": b"\x00" * 32}, r"job_digest=[0-9a-f]{64}, got job_digest=00"),
    "view": ({"view": 7}, r"view=1, got view=7"),
    "coordinator": ({"coordinator_incarnation": 5}, r"got coordinator_incarnation=5"),
    "shard": ({"shard": 3}, r"shard=0, got shard=3"),
    "worker ids": ({"worker_ids": ["worker-0", "eve"]}, r"got worker_ids=\['worker-0', 'eve'\]"),
    "worker index": ({"worker_index": 2}, r"worker_index below 2, got worker_index=2"),
    "live worker": ({"worker_index": 0}, r"a worker_id that is not live, got worker_id=worker-0"),
    "layout": ({"layout_digest": b"\x01" * 32}, r"layout_digest=[0-9a-f]{64}, got layout_digest=0101"),
    "round": ({"round": 9}, r"round=0, which is open, got round=9"),
}


@pytest.mark.parametrize(("changes", "text"), BAD_HELLOS.values(), ids=BAD_HELLOS.keys())
def test_a_bad_hello_is_refused_and_a_good_one_still_welcome(changes: dict[str, Any], text: str) -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        bad = RawStream(member.raw, EXCHANGE)
        bad.put(member.hello(**changes))
        bad_text = bad.next_of("refusal").text
        assert re.search(text, bad_text), bad_text
        if "round" not in changes:
            stream, incarnation = member.open()
            average = member.finish_round(stream, incarnation)
            assert np.array_equal(average, np.ones(member.layout.d, np.float32))


NAN_SCALES = np.full(-(-plan_layout(TENSORS, job("codec.two_sided=true")).buckets[0].n // 512), np.nan, np.float32)
BAD_CONTRIBUTIONS: dict[str, tuple[dict[str, Any], int, str]] = {
    "wrong length": ({"payload": b"\x01" * 3}, wire.REASON_CONTENT, r"got .*=3"),
    "unknown codec": ({"codec": "zip"}, wire.REASON_CODEC, r"codec=randomized/8/512/linf, got codec=zip"),
    "NaN scale": ({"scales": NAN_SCALES.tobytes()}, wire.REASON_CONTENT, r"nan"),
    "torn scales": ({"scales": b"\x00" * 5}, wire.REASON_CONTENT, r"whole float32 scales, got scale_bytes=5"),
    "future round": ({"round": 4}, wire.REASON_ROUND, r"round=0, which is open, got round=4"),
    "unknown bucket": ({"bucket": 77}, wire.REASON_BUCKET, r"a bucket from 0 to 1, got bucket=77"),
    "another view": ({"view": 2}, wire.REASON_VIEW, r"view=1, got view=2"),
    "no digest": ({"parameter_digest": b"x" * 3}, wire.REASON_CONTENT, r"a digest of 16 bytes, got digest_bytes=3"),
    "another server": ({"incarnation": 3}, wire.REASON_INCARNATION, r"got incarnation=3"),
}


@pytest.mark.parametrize(("change", "reason", "text"), BAD_CONTRIBUTIONS.values(), ids=BAD_CONTRIBUTIONS.keys())
def test_a_bad_contribution_is_refused_and_the_right_one_still_counts(change: Any, reason: int, text: str) -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        stream, incarnation = member.open()
        stream.put(member.contribution(incarnation, 0, **change))
        refused = stream.next_of("refusal")
        assert refused.reason == reason
        assert re.search(text, refused.text), refused.text
        assert "worker-1" in refused.text
        average = member.finish_round(stream, incarnation)
        assert np.array_equal(average, np.ones(member.layout.d, np.float32))


def test_a_stale_round_is_refused_and_a_copy_of_the_last_one_answered_with_its_average() -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        stream, incarnation = member.open()
        for round_ in range(2):
            member.finish_round(stream, incarnation, round_)
        stream.put(member.contribution(incarnation, 0, round=0))
        stream.put(member.contribution(incarnation, 0, round=1))
        received = [stream.next() for _ in range(2 * len(member.layout.buckets) + 2)]
    averages = [(m.average.round, m.average.bucket) for m in received if m.WhichOneof("kind") == "average"]
    refusals = [m.refusal for m in received if m.WhichOneof("kind") == "refusal"]
    assert [refusal.reason for refusal in refusals] == [wire.REASON_ROUND]
    assert "expected round=2; that one is closed, got round=0 (bucket 0, worker-1)" in refusals[0].text
    assert sorted(averages) == [(0, 0), (0, 1), (1, 0), (1, 0), (1, 1)]


def test_random_bytes_are_refused_as_malformed_on_every_method() -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        stream, incarnation = member.open()
        stream.put(os.urandom(64) + b"\xff\xff\xff")
        assert stream.next_of("refusal").reason == wire.REASON_MALFORMED
        for path in (EXCHANGE, JOIN):
            garbage = RawStream(member.raw, path)
            garbage.put(b"\xff" * 50)
            message = (wire.ServerMessage if path == EXCHANGE else wire.JoinResponse).FromString(
                next(garbage._responses)
            )
            assert message.refusal.reason == wire.REASON_MALFORMED
        leave = member.raw.unary_unary("/datps.v1.Coordinator/Leave", None, None)
        with pytest.raises(grpc.RpcError) as error:
            leave(b"\xff" * 50, timeout=DEADLINE_S)
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        average = member.finish_round(stream, incarnation)
        assert np.array_equal(average, np.ones(member.layout.d, np.float32))


def test_an_oversized_message_ends_its_own_stream_only() -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        stream, incarnation = member.open()
        stranger = RawStream(member.raw, EXCHANGE)
        stranger.put(b"\x00" * (5 << 20))
        with pytest.raises(grpc.RpcError) as error:
            stranger.next()
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        average = member.finish_round(stream, incarnation)
        assert np.array_equal(average, np.ones(member.layout.d, np.float32))


def test_a_worker_whose_contributions_are_refused_again_and_again_is_cut_off() -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        stream, incarnation = member.open()
        for _ in range(100):
            stream.put(member.contribution(incarnation, 0, codec="zip"))
        outcome = server.outcome.result(DEADLINE_S)
    assert outcome.exit_code == 75
    assert "worker-1" in outcome.text


def test_hundreds_of_streams_that_say_nothing_do_not_stop_the_workers() -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_server(spec) as server, RawMember(spec, server) as member:
        idle = [RawStream(member.raw, path) for path in (EXCHANGE, JOIN) for _ in range(150)]
        stream, incarnation = member.open()
        average = member.finish_round(stream, incarnation)
        for silent_stream in idle:
            silent_stream.end()
        assert np.array_equal(average, np.ones(member.layout.d, np.float32))


def test_a_stream_that_says_nothing_is_closed_after_its_deadline() -> None:
    spec = job("workers=2", "deadlines.hello_s=0.3")
    with running_server(spec) as server, raw_channel(server.address) as channel:
        stream = RawStream(channel, EXCHANGE)
        with pytest.raises(StopIteration):
            stream.next()


def test_a_member_that_stops_reading_does_not_stop_the_others() -> None:
    tensors = (TensorSpec(name="w", shape=(1 << 20,), buffer=False), *TENSORS[3:])
    spec = job("workers=2", "codec.name=none")
    with running_server(spec) as server, RawMember(spec, server, tensors) as member:
        stream, incarnation = member.open()
        for round_ in range(8):  # 32 MiB of averages that worker-1 never reads
            average = member.finish_round(stream, incarnation, round_)
            assert np.array_equal(average, np.ones(member.layout.d, np.float32))


def test_a_member_that_reads_nothing_gets_a_full_outbox_not_the_servers_memory() -> None:
    outbox = Outbox(limit=3)
    for number in range(10):
        outbox.put(b"%d" % number)
    assert outbox.closed
    assert outbox.overflowed.is_set()
    assert outbox._queue.qsize() == 3


BAD_INTRODUCTIONS = {
    "version": (
        {"protocol_version": 2, "worker_id": "worker-1"},
        wire.REASON_PROTOCOL_VERSION,
        "got protocol_version=2",
    ),
    "job": ({"protocol_version": 1, "job_id": "other", "worker_id": "worker-1"}, wire.REASON_JOB, "got job_id=other"),
    "name": ({"protocol_version": 1, "worker_id": "bad name!"}, wire.REASON_NAME, "got worker_id='bad name!'"),
    "live": ({"protocol_version": 1, "worker_id": "worker-0"}, wire.REASON_WORKER_ID, "got worker_id=worker-0"),
}


@pytest.mark.parametrize(("said", "reason", "text"), BAD_INTRODUCTIONS.values(), ids=BAD_INTRODUCTIONS.keys())
def test_a_bad_introduction_is_refused_naming_both_values(said: dict[str, Any], reason: int, text: str) -> None:
    spec = job("workers=2")
    with running_server(spec) as server:
        first, *_ = introduce(server.address, "worker-0")
        with raw_channel(server.address) as channel:
            stream = RawStream(channel, JOIN)
            stream.put(wire.JoinRequest(introduction=wire.Introduction(**said)))
            refusal = wire.JoinResponse.FromString(next(stream._responses)).refusal
        first.close()
    assert refusal.reason == reason
    assert text in refusal.text


def test_one_worker_too_many_is_refused() -> None:
    spec = job("workers=2")
    with running_server(spec) as server, members(spec, server.address):
        channel = connect(server.address, DEADLINE_S, 10.0)
        with channel:
            extra = Coordination(channel, server.address, "worker-2", silent())
            with pytest.raises(
                PeerLostError, match=r"at most workers=2 in the view \(worker-0, worker-1\), got worker_id=worker-2"
            ):
                extra.introduce(None, DEADLINE_S)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"replica_digest": b"q" * 16}, "replica_digest=7070.* as on worker-0, got replica_digest=7171"),
        ({"round": 5}, "round=0 as on worker-0, got round=5"),
        ({"samples": 7}, "samples=100 as on worker-0, got samples=7"),
        ({"classes": "3 classes"}, "classes=10 classes as on worker-0, got classes=3 classes"),
    ],
)
def test_another_replica_is_refused_at_join_naming_both_values(change: dict[str, Any], text: str) -> None:
    spec = job("workers=3")
    layout = plan_layout(TENSORS, spec)
    with running_server(spec) as server, ThreadPoolExecutor(1) as pool:
        first, coordination, _ = introduce(server.address, "worker-0")
        waiting = pool.submit(coordination.get_ready, ready(layout), DEADLINE_S)
        second, other, _ = introduce(server.address, "worker-1")
        _wait_until_ready(server, "worker-0")
        with pytest.raises(MismatchError, match=text):
            other.get_ready(ready(layout, **change), DEADLINE_S)
        coordination.close()
        with contextlib.suppress(PeerLostError):
            waiting.result(DEADLINE_S)
        first.close()
        second.close()


def test_another_layout_is_refused_at_join() -> None:
    spec = job("workers=3")
    with running_server(spec) as server, ThreadPoolExecutor(1) as pool:
        first, coordination, _ = introduce(server.address, "worker-0")
        waiting = pool.submit(coordination.get_ready, ready(plan_layout(TENSORS, spec)), DEADLINE_S)
        second, other, _ = introduce(server.address, "worker-1")
        _wait_until_ready(server, "worker-0")
        with pytest.raises(MismatchError, match=r"layout_digest=[0-9a-f]{64} as on worker-0"):
            other.get_ready(ready(plan_layout(TENSORS[1:], spec)), DEADLINE_S)
        coordination.close()
        with contextlib.suppress(PeerLostError):
            waiting.result(DEADLINE_S)
        first.close()
        second.close()


def _wait_until_ready(server: RunningServer, worker_id: str) -> None:
    """Waits for the membership itself, not for time, until a worker is ready."""
    coordinator = server.server.coordinator
    assert coordinator is not None
    seen = threading.Event()

    def look() -> None:
        member = coordinator._membership._members.get(worker_id)
        if member and member.ready:
            seen.set()
        else:
            server.loop.call_later(0.01, look)

    server.call(look)
    assert seen.wait(DEADLINE_S)


def test_the_view_that_does_not_fill_in_time_fails_saying_who_was_there() -> None:
    spec = job("workers=3", "deadlines.join_s=0.5")
    with running_server(spec) as server:
        channel, coordination, _ = introduce(server.address, "worker-0")
        with pytest.raises(
            PeerLostError, match=r"expected 3 workers to be ready within 0\.5 s, got ready=1 \(joined: worker-0\)"
        ):
            coordination.get_ready(ready(plan_layout(TENSORS, spec)), DEADLINE_S)
        assert server.outcome.result(DEADLINE_S).exit_code == 75
        channel.close()


def test_a_worker_that_goes_before_the_view_has_formed_frees_its_place() -> None:
    spec = job("workers=1")
    with running_server(spec) as server:
        channel, coordination, _ = introduce(server.address, "worker-0")
        coordination.close()
        channel.close()
        with members(spec, server.address) as joined:
            assert joined[0].admission.worker_index == 0


def test_no_server_is_an_error_within_the_deadline() -> None:
    with pytest.raises(PeerLostError, match=r"a server that answers within 0\.3 s, got server=127\.0\.0\.1:1"):
        connect("127.0.0.1:1", 0.3, 10.0)


def test_a_port_in_use_is_refused() -> None:
    spec = job("workers=1")
    with running_server(spec) as server:
        port = int(server.address.rsplit(":", 1)[1])

        async def second() -> None:
            await Server(ServerOptions(spec=spec, host="127.0.0.1", port=port), silent()).start()

        with pytest.raises(SpecError, match=rf"an address that is free and ours, got address=127\.0\.0\.1:{port}"):
            asyncio.run(second())


def test_health_and_reflection_answer() -> None:
    spec = job("workers=1")
    with running_server(spec) as server, raw_channel(server.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "datps.v1.Aggregator", "datps.v1.Coordinator"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
        names = {service.name for service in next(answers).list_services_response.service}
    assert {"datps.v1.Aggregator", "datps.v1.Coordinator", "grpc.health.v1.Health"} <= names


def test_several_servers_share_the_vector() -> None:
    spec = job("workers=1", "servers=3", "codec.name=none")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        gradient = np.arange(joined[0].layout.d, dtype=np.float32)
        joined[0].exchange.average(0, gradient, np.zeros(joined[0].layout.e, np.float32), DIGEST)
    assert np.array_equal(gradient, np.arange(joined[0].layout.d, dtype=np.float32))
