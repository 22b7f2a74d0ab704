"""The shard of a worker's own node: what is told if it does not come up or goes away, and that nobody waits for it."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from common.errors import PeerLostError
from tests.exchange.colocated import COMMAND, ShardThread, colocated_members, shards
from tests.exchange.test_exchange import run_rounds
from tests.processes.test_processes import alive, descendants
from tests.processes.test_worker_in_thread import FAST, error_of, work
from tests.support import DEADLINE_S, DIGEST, in_threads, job, running_server, silent
from worker.exchange.colocated import ShardProcess

__all__ = ["shards"]
PYTHON = (sys.executable, "-I", "-S", "-c")
UNTIL_CLOSED = "import sys; sys.stdin.read()"
REFUSES = (
    "import json, sys; sys.stdin.readline(); print('a library says'); print('3');"
    "print(json.dumps({'event': 'error', 'text': 'no such address', 'exit_code': 2})); sys.exit(2)"
)


def spec_of(*settings: str) -> Any:
    return job("exchange.topology=colocated", "workers=1", "deadlines.join_s=100", *settings)


@pytest.fixture
def no_process_left() -> Iterator[None]:
    """Whatever the test starts is gone, and reaped, when it has ended."""
    before = descendants(os.getpid())
    yield
    assert [pid for pid in descendants(os.getpid()) if pid not in before] == []


@pytest.mark.usefixtures("no_process_left")
@pytest.mark.parametrize(
    ("command", "exit_code", "text"),
    [
        ((*PYTHON, "raise SystemExit(3)"), 75, "this node's shard: it ended before it listened, exit code 3"),
        ((*PYTHON, "import os; os.kill(os.getpid(), 9)"), 75, "it ended before it listened, killed by SIGKILL"),
        ((*PYTHON, "import os; os.close(0); os._exit(4)"), 75, "it ended before it listened, exit code 4"),
        ((*PYTHON, REFUSES), 2, "this node's shard: no such address"),
        (("/nonexistent/datps", "shard"), 2, "expected a command that runs this node's shard, got shard_command="),
        ((), 2, "expected a command that runs this node's shard, got shard_command=none"),
    ],
    ids=["exits", "is killed", "reads nothing", "refuses", "is no command", "is missing"],
)
def test_a_shard_that_ends_before_it_listens_ends_its_worker_at_once_saying_why(
    command: tuple[str, ...], exit_code: int, text: str
) -> None:
    with running_server(spec_of(*FAST)) as server:
        code, events = work(server.address, shard_command=command, connect_s=1000.0)
    assert (code, error_of(events).count("\n")) == (exit_code, 0)
    assert text in error_of(events)


@pytest.mark.usefixtures("no_process_left")
@pytest.mark.parametrize("program", [UNTIL_CLOSED, "import signal; signal.pause()"], ids=["waits", "is deaf"])
def test_a_shard_that_never_says_its_address_is_not_waited_for_longer_than_asked(program: str) -> None:
    with running_server(spec_of(*FAST)) as server:
        code, events = work(server.address, shard_command=(*PYTHON, program), connect_s=2.0)
    text = "expected a shard that listens on 127.0.0.1 within 2 s, got shard=none"
    assert (code, error_of(events)) == (75, text)


def test_an_address_that_is_not_this_machines_is_refused_with_2(shards: list[ShardThread]) -> None:
    with running_server(spec_of(*FAST)) as server:
        code, events = work(server.address, shard_command=COMMAND, host="192.0.2.1")
    assert code == 2
    assert error_of(events) == (
        "this node's shard: expected an address that is free and ours, got address=192.0.2.1:0 (it cannot be bound)"
    )
    assert [shard.wait() for shard in shards] == [2]


def test_a_shard_that_is_gone_when_its_place_is_known_is_an_error_that_says_so() -> None:
    says = "import json; input(); print(json.dumps({'event': 'listening', 'address': 'here:1'})); input()"
    shard = ShardProcess((*PYTHON, says), spec_of(), "127.0.0.1", DEADLINE_S, silent())
    assert shard.address == "here:1"
    shard._process.kill()
    shard._process.wait()
    with pytest.raises(PeerLostError, match=r"this node's shard is gone: .*Broken pipe"):
        shard._say({})
    shard.close()
    shard.close()
    assert not alive(shard._process.pid)


def test_a_shard_whose_worker_is_gone_ends_with_75_also_before_there_is_a_view(shards: list[ShardThread]) -> None:
    told: list[dict[str, Any]] = []

    class Emit:
        def __call__(self, event: str, **fields: Any) -> None:
            told.append({"event": event, **fields})

    emit: Any = Emit()
    shard = ShardProcess(COMMAND, spec_of(), "127.0.0.1", DEADLINE_S, emit)
    shards[0].stdin.close()
    assert shards[0].wait() == 75
    shard.close()
    assert [event["text"] for event in told] == ["this node's shard: the worker of this shard's node is gone"]


def test_words_that_come_after_the_jobs_end_disturb_nobody(
    shards: list[ShardThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that hears them has no event loop any more."""
    raised: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    spec = job("exchange.topology=colocated", "workers=2")
    with running_server(spec) as server, colocated_members(spec, server.address) as joined:
        in_threads([member.leave for member in joined])
        assert [member.shard.wait() for member in joined] == [0, 0]
        for shard in shards:
            shard.stdin.write(json.dumps({"shard": 0, "worker_ids": ["worker-0"]}) + "\n")
    assert raised == []


@pytest.mark.usefixtures("shards")
def test_a_worker_that_lets_go_of_its_shard_in_mid_round_ends_all_workers_by_name() -> None:
    spec = job("exchange.topology=colocated", "workers=3")
    with running_server(spec) as server, colocated_members(spec, server.address) as joined:
        run_rounds(joined, spec, [0, 1, 2], rounds=1)
        vectors = [(np.ones(m.layout.d, np.float32), np.ones(m.layout.e, np.float32)) for m in joined]
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(joined[n].exchange.average, 1, *vectors[n], DIGEST) for n in (0, 2)]
            joined[1].shard.stdin.close()
            raised = [future.exception(DEADLINE_S) for future in waiting]
        assert joined[1].shard.wait() == 75
    assert all(isinstance(error, PeerLostError) for error in raised)
    assert {str(error) for error in raised} == {"worker-1 is gone: it does not speak to its node's shard any more"}
