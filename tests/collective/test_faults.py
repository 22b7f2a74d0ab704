"""What goes wrong without servers: everyone ends, soon, and hears who and what."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.errors import CodecError, MismatchError, PeerLostError, SpecError
from common.layout import plan_layout
from common.wire.v1 import ps_pb2 as wire
from tests.collective.support import CollectiveMember, collective, collective_members, failures, join
from tests.support import DEADLINE_S, TENSORS, in_threads, introduce, ready, running_server, silent
from worker.exchange import collective as exchange_module
from worker.exchange.coordination import Admission, End
from worker.exchange.group import Pending, RollCall, meet, open_store
from worker.exchange.nodes import NodeOptions, make_node


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody waits for long for collectives that never end."""
    monkeypatch.setattr(exchange_module, "ENDING_S", 0.3)
    return


def nan_at(member: CollectiveMember, layer: int) -> np.ndarray:
    gradient = np.zeros(member.layout.d, np.float32)
    gradient[member.layout.layer_edges[layer] + 5] = np.nan
    return gradient


def average_or_leave(member: CollectiveMember, gradient: np.ndarray) -> None:
    """As a worker does it: whoever fails says so when it leaves."""
    try:
        member.average(0, gradient)
    except Exception as error:
        member.leave(End.after(error))
        raise


@pytest.mark.parametrize(
    ("settings", "bucket"),
    [(("codec.name=none",), 0), (("codec.bits=8", "exchange.bucket_bytes=1024"), 3), (("codec.block=all",), 0)],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_gradient_that_is_not_finite_names_bucket_layer_and_worker_and_ends_the_others(
    settings: tuple[str, ...], bucket: int
) -> None:
    spec = collective("workers=3", *settings)
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        started_s = time.monotonic()
        zeros = np.zeros(joined[0].layout.d, np.float32)
        vectors = [zeros.copy(), nan_at(joined[1], 2), zeros.copy()]
        raised = failures([lambda m=m, v=v: average_or_leave(m, v) for m, v in zip(joined, vectors, strict=True)])
        assert server.outcome.result(DEADLINE_S).exit_code == 75
        assert time.monotonic() - started_s < exchange_module.GRACE_S
    own, others = str(raised[1]), [str(raised[0]), str(raised[2])]
    assert isinstance(raised[1], CodecError)
    assert "nan" in own
    assert own.endswith(f"gradient bucket {bucket}, worker-1, round 0, layer fc.weight")
    assert all(isinstance(raised[worker], PeerLostError) for worker in (0, 2))
    assert others == [f"worker-1 failed: {own}"] * 2


def test_a_sum_that_overflows_is_an_error_on_all_workers() -> None:
    spec = collective("workers=2", "codec.name=none")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        layout = joined[0].layout
        raised = failures([lambda m=m: m.average(0, np.full(layout.d, 3e38, np.float32)) for m in joined])
    assert all(isinstance(error, CodecError) for error in raised)
    assert all("inf" in str(error) and "average of round 0, gradient bucket 0" in str(error) for error in raised)


def test_replicas_that_differ_are_an_error_that_names_the_workers() -> None:
    spec = collective("workers=4")
    digests = [b"\x01" * 16, b"\x02" * 16, b"\x01" * 16, b"\x03" * 16]
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        raised = failures(
            [lambda m=m, d=d: m.average(parameter_digest=d) for m, d in zip(joined, digests, strict=True)]
        )
        rule = f"expected parameter_digest={digests[0].hex()} as on worker-0, got parameter_digest={digests[1].hex()}"
        assert {str(error) for error in raised} == {f"the replicas differ: {rule} (worker-1, worker-3, round 0)"}
        assert all(isinstance(error, MismatchError) for error in raised)
        in_threads([lambda m=m, e=e: m.leave(End.after(e)) for m, e in zip(joined, raised, strict=True) if e])
        assert server.outcome.result(DEADLINE_S).exit_code == 76


@pytest.mark.usefixtures("short_patience")
def test_a_worker_that_vanishes_in_mid_round_ends_the_others_naming_it() -> None:
    spec = collective("workers=3")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(member.average) for member in joined[:2]]
            joined[2].vanish()
            raised = [future.exception(DEADLINE_S) for future in waiting]
        assert [str(error) for error in raised] == ["worker-2 is gone: its Join stream ended"] * 2
        assert all(isinstance(error, PeerLostError) for error in raised)
        assert server.outcome.result(DEADLINE_S).exit_code == 75


def test_connections_that_break_while_the_coordinator_knows_of_nothing_end_the_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(exchange_module, "GRACE_S", 0.2)
    spec = collective("workers=2")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        joined[1].node.close()
        with pytest.raises(PeerLostError, match=r"^round 0 broke off: .+"):
            joined[0].average()


@pytest.mark.usefixtures("short_patience")
def test_a_round_that_does_not_close_in_time_fails_naming_whom_it_waited_for() -> None:
    spec = collective("workers=3", "deadlines.round_s=0.6", "deadlines.report_s=0.2")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        raised = failures([joined[0].average, joined[2].average])
        text = "round 0 did not close within 0.6 s: waiting for worker-1"
        assert {str(error) for error in raised} == {text}
        waiting = [event for event in joined[2].events if event["event"] == "waiting"]
        assert len(waiting) >= 2
        assert all((event["missing"], event["round"]) == (["worker-1"], 0) for event in waiting)
        started_s = time.monotonic()
        end = End.after(PeerLostError(text))
        in_threads([lambda m=member: m.leave(end) for member in (joined[0], joined[2])])
        assert time.monotonic() - started_s < 3  # although their collectives are still under way
        assert server.outcome.result(DEADLINE_S).text == text


@pytest.mark.usefixtures("short_patience")
def test_whoever_is_told_of_a_failure_hears_it_in_the_middle_of_a_collective() -> None:
    spec = collective("workers=2")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(joined[0].average)
            joined[1].leave(End(ending=wire.ENDING_FAILED, text="no room on the disk"))
            with pytest.raises(PeerLostError, match=r"^worker-1 failed: no room on the disk$"):
                waiting.result(DEADLINE_S)
        with pytest.raises(PeerLostError, match="worker-1 failed"):
            joined[0].average(1)


def test_a_worker_that_leaves_in_good_order_waits_for_one_that_is_slower() -> None:
    spec = collective("workers=2")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        in_threads([member.average for member in joined])
        with ThreadPoolExecutor(1) as pool:
            leaving = pool.submit(joined[0].exchange.close, End(ending=wire.ENDING_COMPLETED))
            with pytest.raises(TimeoutError):
                leaving.result(0.2)
            joined[1].exchange.close(End(ending=wire.ENDING_COMPLETED))
            leaving.result(1.0)
        in_threads([member.leave for member in joined])
        assert server.outcome.result(DEADLINE_S).exit_code == 0


def test_a_request_to_stop_reaches_all_workers() -> None:
    spec = collective("workers=2")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        server.call(server.server.request_stop, "server got SIGTERM")
        asked = threading.Event()
        for _ in range(200):
            if all(member.exchange.stop_requested == "server got SIGTERM" for member in joined):
                asked.set()
                break
            in_threads([member.average for member in joined])
        assert asked.is_set()


# Meeting


def place(worker_index: int, addresses: tuple[str, ...]) -> Admission:
    ids = tuple(f"worker-{number}" for number in range(len(addresses)))
    return Admission(
        worker_index=worker_index,
        view=1,
        worker_ids=ids,
        samples=(1,) * len(ids),
        shard_addresses=(),
        worker_addresses=addresses,
        coordinator_incarnation=1,
    )


def test_workers_that_do_not_come_are_named() -> None:
    store, address = open_store("127.0.0.1")
    other, _ = open_store("127.0.0.1")
    with pytest.raises(PeerLostError, match=r"all workers at 127.*within 0\.2 s, got missing=worker-1, worker-2"):
        meet(store, place(0, (address,) * 3), 0, 0.2, lambda: None)
    with pytest.raises(PeerLostError, match=r"got missing=worker-2$"):
        meet(other, place(1, (address,) * 3), 0, 0.2, lambda: None)


def test_a_store_that_is_gone_is_named_and_an_abort_ends_the_waiting_for_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    own, _ = open_store("127.0.0.1")
    with pytest.raises(PeerLostError, match=r"missing=worker-0 \(.*refused.*\)"):
        meet(own, place(1, (address,) * 2), 0, 0.1, lambda: None)

    def aborted() -> None:
        raise PeerLostError("worker-0 is gone")

    with pytest.raises(PeerLostError, match="worker-0 is gone"):
        meet(own, place(1, (address,) * 2), 0, DEADLINE_S, aborted)


def test_the_roll_call_names_who_is_late_and_worker_0_if_its_store_does_not_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, address = open_store("127.0.0.1")
    calls = [RollCall(store, place(worker, (address,) * 3)) for worker in range(3)]
    assert calls[0].absent() == ["worker-0", "worker-1", "worker-2"]
    for call, round_ in zip(calls, (4, 3, 5), strict=True):
        call.say(round_)
    assert (calls[1].late(4), calls[1].late(5)) == (["worker-1"], ["worker-0", "worker-1"])
    monkeypatch.setattr("worker.exchange.group.ANSWER_S", 0.05)
    frozen, answer = RollCall(FrozenStore(), place(1, (address,) * 3)), ["worker-0"]
    assert [frozen.late(4), frozen.late(4)] == [answer, answer]
    FrozenStore.thaw.set()


class FrozenStore:
    """A store in a process that is stopped."""

    thaw = threading.Event()

    def multi_get(self, _keys: list[str]) -> list[bytes]:
        self.thaw.wait(DEADLINE_S)
        return []


def test_a_host_that_is_not_this_machine_is_refused() -> None:
    with pytest.raises(SpecError, match=r"expected an address of this machine, got host=192\.0\.2\.1"):
        make_node(collective("workers=1"), NodeOptions(coordinator="127.0.0.1:1", host="192.0.2.1"), silent())


def test_a_peer_that_is_gone_before_the_group_has_formed_ends_the_others() -> None:
    spec = collective("workers=2")
    with running_server(spec) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(join, server.address, "worker-0")
        channel, coordination, _ = introduce(server.address, "worker-1")
        node = make_node(spec, NodeOptions(coordinator=server.address), silent())
        coordination.get_ready(ready(plan_layout(TENSORS, spec), address=node.address), DEADLINE_S)
        channel.close()
        with pytest.raises(PeerLostError, match="worker-1 is gone"):
            first.result(DEADLINE_S)
        node.close()


class SlowWork:
    """A collective on a device, which is done after some looks and cannot be waited for."""

    def __init__(self, looks: int) -> None:
        self._looks = looks

    def is_completed(self) -> bool:
        self._looks -= 1
        return self._looks < 0

    def wait(self) -> None:
        raise RuntimeError("a rank is gone")


def test_a_collective_on_a_device_is_looked_at_until_it_has_ended() -> None:
    pending: Pending[None] = Pending(SlowWork(looks=5), lambda: None, on_cpu=False)
    assert not pending.ended(0.0)
    assert pending.ended(DEADLINE_S)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        pending.result()
