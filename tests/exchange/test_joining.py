"""Who may join, who is refused and why, and what a server is before and beside that."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common.errors import MismatchError, PeerLostError, SpecError
from common.events import Emitter
from common.layout import plan_layout
from common.wire.v1 import ps_pb2 as wire
from ps.membership import FormView
from ps.outcome import Outcome
from ps.server import Server, ServerOptions
from tests.exchange.raw import JOIN, RawStream, raw_channel
from tests.support import (
    DEADLINE_S,
    DIGEST,
    TENSORS,
    RunningServer,
    introduce,
    job,
    members,
    ready,
    running_server,
    running_servers,
    silent,
)
from worker.exchange.coordination import Coordination, connect

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


def test_a_shard_has_its_number_on_the_timeline_once_it_is_told_which_it_is(tmp_path: Path) -> None:
    view = FormView(view=1, worker_ids=("a", "b"), connections=(), samples=(), layout_digest=b"", round=0)

    async def serve() -> None:
        spec, trace = job("workers=2", "exchange.topology=colocated"), tmp_path / "trace.json"
        server = Server(ServerOptions(spec=spec, shard=None, host="127.0.0.1", port=0, trace=trace), shard_emitter)
        await server.start()
        server.assign(1, view, 7)
        server.end(Outcome(exit_code=75, text="the test is over"))
        await server.serve()

    shard_emitter = Emitter("shard", as_json=True, stream=io.StringIO())
    asyncio.run(serve())
    (named, *_) = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert named["args"] == {"name": "shard-1"}
