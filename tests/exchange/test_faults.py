"""Faults that a review found: stuck servers, broken outputs, bad first words; each ends with who and what."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.errors import MismatchError, PeerLostError
from common.events import Emitter
from common.layout import plan_layout
from common.wire import rpc
from common.wire.v1 import ps_pb2 as wire
from tests.exchange.raw import EXCHANGE, RawStream, raw_channel
from tests.support import DEADLINE_S, DIGEST, TENSORS, introduce, job, members, ready, running_server, running_servers
from worker.exchange import ps
from worker.exchange.coordination import End, connect, tensor_messages
from worker.interruptions import AbortRelay


def test_a_server_that_is_there_but_stuck_is_given_up_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ps, "GRACE_S", 0.3)
    spec = job("workers=1", "deadlines.round_s=0.3")
    free = threading.Event()
    with running_server(spec) as server, members(spec, server.address) as joined:
        server.call(free.wait, DEADLINE_S)
        layout = joined[0].layout
        with pytest.raises(
            PeerLostError, match=rf"no (Welcome|average of round 0) within 0\.6 s from {server.address} \(shard 0\)"
        ):
            joined[0].exchange.average(0, np.zeros(layout.d, np.float32), np.zeros(layout.e, np.float32), DIGEST)
        free.set()


def test_a_coordinator_that_is_there_but_stuck_is_given_up() -> None:
    spec = job("workers=2")
    free = threading.Event()
    with running_server(spec) as server:
        channel, coordination, _ = introduce(server.address, "worker-0")
        server.call(free.wait, DEADLINE_S)
        with pytest.raises(PeerLostError, match=r"expected an admission within 0\.3 s"):
            coordination.get_ready(ready(plan_layout(TENSORS, spec)), 0.3)
        free.set()
        channel.close()


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        ({"layout_digest": b"\x07" * 32}, wire.REASON_LAYOUT, "got layout_digest=0707"),
        ({"round": 77}, wire.REASON_ROUND, "expected round=0, which is open, got round=77"),
    ],
)
def test_the_first_hello_must_say_what_all_said_at_join(change: dict[str, Any], reason: int, text: str) -> None:
    spec = job("workers=1")
    layout = plan_layout(TENSORS, spec)
    with running_server(spec) as server, raw_channel(server.address) as raw:
        channel, coordination, _ = introduce(server.address, "worker-0")
        admission = coordination.get_ready(ready(layout), DEADLINE_S)
        values = {
            "protocol_version": rpc.PROTOCOL_VERSION,
            "job_id": spec.job_id,
            "job_digest": bytes.fromhex(spec.digest()),
            "view": admission.view,
            "coordinator_incarnation": admission.coordinator_incarnation,
            "worker_ids": admission.worker_ids,
            "tensors": tensor_messages(layout.tensors),
            "layout_digest": layout.digest(),
        }
        bad = RawStream(raw, EXCHANGE)
        bad.put(wire.WorkerMessage(hello=wire.Hello(**{**values, **change})))
        refused = bad.next_of("refusal")
        assert (refused.reason, text in refused.text) == (reason, True)
        good = RawStream(raw, EXCHANGE)
        good.put(wire.WorkerMessage(hello=wire.Hello(**values)))
        assert good.next_of("welcome").round == 0
        channel.close()


def test_a_mismatch_has_the_same_exit_code_on_all_servers_and_workers() -> None:
    spec = job("workers=2", "servers=3")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        layout, errors = joined[0].layout, {}

        def average(worker: int) -> None:
            vectors = np.zeros(layout.d, np.float32), np.zeros(layout.e, np.float32)
            try:
                joined[worker].exchange.average(0, *vectors, b"%016d" % worker)
            except Exception as error:
                errors[worker] = error
                joined[worker].leave(End.after(error))

        threads = [threading.Thread(target=average, args=(worker,)) for worker in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert [server.outcome.result(DEADLINE_S).exit_code for server in servers] == [76, 76, 76]
    assert all(isinstance(errors[worker], MismatchError) for worker in range(2))
    assert all("failed" not in server.outcome.result().text for server in servers)


def test_replicas_that_differ_after_the_last_update_are_told_when_they_leave() -> None:
    spec = job("workers=2")
    with running_server(spec) as server, members(spec, server.address) as joined:
        joined[0].exchange.close(End(ending=wire.ENDING_COMPLETED))
        joined[1].exchange.close(End(ending=wire.ENDING_COMPLETED))
        joined[0].coordination.leave(End(ending=wire.ENDING_COMPLETED), b"\x01" * 16)
        with pytest.raises(MismatchError, match=r"the replicas differ.*worker-0.*worker-1"):
            joined[1].coordination.leave(End(ending=wire.ENDING_COMPLETED), b"\x02" * 16)
        assert server.outcome.result(DEADLINE_S).exit_code == 76


def test_a_defect_in_the_tick_ends_the_job_instead_of_its_deadlines() -> None:
    spec = job("workers=1")
    with running_server(spec) as server:

        def broken() -> None:
            raise ZeroDivisionError("scripted")

        server.server.aggregator.tick = broken  # type: ignore[method-assign]
        outcome = server.outcome.result(DEADLINE_S)
    assert outcome.exit_code == 76
    assert "ZeroDivisionError('scripted')" in outcome.text


def test_an_output_that_is_full_or_closed_does_not_stop_the_one_who_speaks() -> None:
    class Full:
        def isatty(self) -> bool:
            return False

        def write(self, _: str) -> int:
            raise OSError(28, "No space left on device")

        def flush(self) -> None:
            raise AssertionError("not reached")

    Emitter("server-0", stream=Full())("listening", address="a")  # type: ignore[arg-type]


def test_an_abort_that_comes_before_there_is_an_exchange_is_not_lost() -> None:
    relay, heard = AbortRelay(), []
    relay.raise_if_aborted()
    relay.aborted("worker-3 is gone", True)
    with pytest.raises(PeerLostError, match="worker-3 is gone"):
        relay.raise_if_aborted()
    with pytest.raises(PeerLostError, match="worker-3 is gone"):
        connect("127.0.0.1:1", DEADLINE_S, 10.0, relay.raise_if_aborted)
    relay.stop_requested("SIGTERM")
    exchange = SimpleNamespace(fail=lambda text, retry: heard.append((text, retry)), stop_requested=None)
    relay.attach(exchange)
    assert heard == [("worker-3 is gone", True)]
    assert exchange.stop_requested == "SIGTERM"
