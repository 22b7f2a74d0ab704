"""Bad peers on the data plane are refused with a reason, and the others never notice."""

from __future__ import annotations

import os
import re
from typing import Any

import grpc
import numpy as np
import pytest

from common.layout import TensorSpec, plan_layout
from common.wire.v1 import ps_pb2 as wire
from ps.streams import Outbox
from tests.exchange.raw import EXCHANGE, JOIN, RawMember, RawStream, raw_channel
from tests.support import (
    DEADLINE_S,
    TENSORS,
    job,
    running_server,
)

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
    "node memory": ({"node_memory": True}, r"payloads in the messages, got node_memory=True"),
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
