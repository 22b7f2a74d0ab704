"""The other local processes: how their ends are told, and that none stays behind; then real workers of two."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import CheckpointError, CodecError, DatpsError, MismatchError, PeerLostError
from common.events import Emitter
from tests.local.support import CPU, SMALL, dataset_of, train
from tests.processes.test_processes import alive, datps, descendants, read_until
from tests.processes.test_worker_in_thread import work
from tests.support import DEADLINE_S, job, running_server
from worker.checkpoint import find_checkpoint, load_checkpoint
from worker.daemon import WorkerOptions, run
from worker.local.group import GroupBrokenError, Store
from worker.local.processes import COMMAND, LocalProcessError, LocalProcesses, Order, built
from worker.local.team import LocalTeam
from worker.workplace import Workplace

WAIT_S = 60.0
LEASHED = "import json, os, sys, threading\ndef say(**words): print(json.dumps(words), flush=True)\n"
"""Beginning of a program that stands for a local process; it reads its standard input."""
UNTIL_CLOSED = "sys.stdin.read()"


@contextmanager
def processes(program: str, size: int = 2) -> Iterator[LocalProcesses]:
    """Local processes that run a program; all of them are gone on leaving."""
    local = LocalProcesses(("cpu",) * size, (sys.executable, "-I", "-S", "-c", LEASHED + program))
    try:
        yield local
    finally:
        local.close()
        assert not any(alive(pid) for pid in local.pids)


def workplace(*settings: str) -> Workplace:
    spec = job(*SMALL, *settings)
    return Workplace.build(spec, dataset_of(spec), CPU, None, LocalTeam(spec, 0, 2))


def failing(program: str) -> DatpsError:
    """What `join` raises where the other process does this."""
    with processes(program) as local, pytest.raises(DatpsError) as error:
        local.join(workplace("deadlines.join_s=10"))
    return error.value


def test_each_is_told_its_number_the_job_and_where_they_meet() -> None:
    order = Order(
        job_spec="{}", devices=("cpu",) * 3, threads=2, data=None, checkpoint="here", saves=True, connect_s=1.5
    )
    program = "w = json.loads(sys.stdin.readline()); say(event='error', text=json.dumps(w), exit_code=2, about='own')"
    with processes(program, 3) as local:
        local.order(order)
        told: list[str] = []
        both = threading.Event()
        local.watch(lambda text, retry: (told.append(text), both.set() if len(told) == 2 else None, retry))
        assert both.wait(WAIT_S)
    heard = [json.loads(text.split(": ", 1)[1]) for text in sorted(told)]
    assert [words["local_rank"] for words in heard] == [1, 2]
    assert heard[0]["store_port"] == heard[1]["store_port"] > 0
    assert heard[0]["devices"] == ["cpu"] * 3
    assert (heard[0]["threads"], heard[0]["saves"], heard[0]["checkpoint"]) == (2, True, "here")


@pytest.mark.parametrize(
    ("program", "text", "exit_code"),
    [
        ("sys.exit(3)", "local process 1 of 2 (cpu): it ended without a word, exit code 3", 75),
        ("os.kill(os.getpid(), 9)", "local process 1 of 2 (cpu): it ended without a word, killed by SIGKILL", 75),
        ("say(event='error', text='no cuda', exit_code=2, about='own')", "local process 1 of 2 (cpu): no cuda", 2),
        (
            "print('a library says'); print('3'); say(event='error', text='x', exit_code=65, about='own')",
            "local process 1 of 2 (cpu): x",
            65,
        ),
        (f"say(event='built', layout='a', parameters='b'); {UNTIL_CLOSED}", "as in local process 0, got built=", 76),
    ],
    ids=["exits", "is killed", "refuses", "says more than events", "builds something else"],
)
def test_a_process_that_does_not_build_the_same_ends_the_worker(program: str, text: str, exit_code: int) -> None:
    error = failing(program)
    assert isinstance(error, LocalProcessError)
    assert (text in str(error), error.exit_code) == (True, exit_code), error


def test_a_process_that_is_silent_for_too_long_is_late_and_ended() -> None:
    with processes(UNTIL_CLOSED) as local, pytest.raises(LocalProcessError) as error:
        local.join(workplace("deadlines.join_s=0.2"))
    assert str(error.value) == "local process 1 of 2 (cpu) has not built its model within 0.2 s"
    assert error.value.exit_code == 75


def test_the_cause_of_an_error_is_a_process_that_failed_itself_else_what_servers_said_else_the_error() -> None:
    peer, broken = PeerLostError("a server is gone"), GroupBrokenError("lost")
    own = "say(event='error', text='nan', exit_code=76, about='own')"
    told = "say(event='error', text='server x is gone', exit_code=75, about='peers')"
    refused = "say(event='error', text='replicas differ', exit_code=76, about='peers')"
    with processes(own) as local:
        for error in (peer, broken, MismatchError("m")):
            cause = local.cause(error)
            assert isinstance(cause, LocalProcessError)
            assert (str(cause), cause.exit_code) == ("local process 1 of 2 (cpu): nan", 76)
        for error in (CodecError("ours"), CheckpointError("ours")):
            assert local.cause(error) is error
    with processes(told) as local:
        assert local.cause(peer) is peer
        cause = local.cause(broken)
        assert (type(cause), str(cause)) == (PeerLostError, "server x is gone")
    with processes(refused) as local:
        assert isinstance(local.cause(broken), MismatchError)
    with processes("say(event='error', text='lost', exit_code=75, about='group')") as local:
        assert local.cause(broken) is broken
    assert LocalProcesses(("cpu",)).cause(peer) is peer


def test_a_process_that_has_only_lost_the_others_is_told_of_and_not_waited_for() -> None:
    class Waiting(LocalTeam):
        def __init__(self) -> None:
            self.aborted = threading.Event()

        def abort(self) -> None:
            self.aborted.set()

    heard: list[tuple[str, bool]] = []
    with processes(f"say(event='error', text='lost', exit_code=75, about='group'); {UNTIL_CLOSED}") as local:
        local._team = team = Waiting()
        local.watch(lambda text, retry: heard.append((text, retry)))
        assert team.aborted.wait(WAIT_S)
        cause = local.cause(PeerLostError(heard[0][0]))
    assert heard == [("local process 1 of 2 (cpu): lost", True)]
    assert isinstance(cause, LocalProcessError)
    assert (str(cause), cause.exit_code) == (heard[0][0], 75)


def test_processes_that_end_well_are_waited_for_and_one_that_does_not_is_named() -> None:
    with processes("say(event='ended')", 3) as local:
        local.finish(WAIT_S)
    with processes("say(event='ended') if sys.argv[1:] else sys.exit(1)") as local, pytest.raises(LocalProcessError):
        local.finish(WAIT_S)


# Real workers


LONG = (*SMALL, "schedule.epochs=100000", "evaluation.every_epochs=0", "attack.name=none", "deadlines.join_s=60")


class Events(io.StringIO):
    """A stream of events that tells when a round has closed."""

    def __init__(self) -> None:
        super().__init__()
        self.round_closed = threading.Event()

    def write(self, text: str) -> int:
        if '"event": "round"' in text:
            self.round_closed.set()
        return super().write(text)


def others_of(pid: int) -> list[int]:
    """The local processes that a process has started."""
    return [other for other in descendants(pid) if "worker.local.member" in Path(f"/proc/{other}/cmdline").read_text()]


def gone(pid: int) -> bool:
    """Waits until a process that may not be ours is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    ended, _, _ = select.select([handle], [], [], WAIT_S)
    os.close(handle)
    return bool(ended)


@pytest.mark.processes
def test_a_local_process_that_is_killed_ends_its_worker_with_75_naming_it() -> None:
    events = Events()
    with running_server(job(*LONG, "workers=1")) as server, ThreadPoolExecutor(1) as pool:
        options = WorkerOptions(server=server.address, worker_id="worker-0", devices="cpu:2")
        running = pool.submit(run, options, Emitter("worker-0", stream=events))
        assert events.round_closed.wait(2 * WAIT_S)
        (other,) = others_of(os.getpid())
        os.kill(other, signal.SIGKILL)
        assert running.result(WAIT_S) == 75
        outcome = server.outcome.result(DEADLINE_S)
    said = [event["text"] for event in map(json.loads, events.getvalue().splitlines()) if event["event"] == "error"]
    assert said == ["local process 1 of 2 (cpu): it ended without a word, killed by SIGKILL"]
    assert (outcome.exit_code, "worker-0" in outcome.text) == (75, True)
    assert others_of(os.getpid()) == []


@pytest.mark.processes
def test_real_processes_with_a_shard_of_their_own_train_as_threads_with_a_server_do() -> None:
    settings = ("workers=1", *SMALL, "data.batch_per_worker=512", "schedule.epochs=1", *LONG[-3:])
    ((reference, _),) = train(job(*settings), [2], 2)
    with running_server(job(*settings, "exchange.topology=colocated")) as server:
        shard = (sys.executable, "-m", "deploy.cli", "shard")
        code, events = work(server.address, devices="cpu:2", threads=1, shard_command=shard)
    digests = [event["parameter_digest"] for event in events if event["event"] == "round"]
    assert (code, digests) == (0, [report.parameter_digest for report in reference.recording.reports])
    assert len(set(digests)) == 2


@pytest.mark.processes
def test_sigterm_finishes_the_round_saves_the_whole_state_and_leaves_no_process_behind(tmp_path: Path) -> None:
    flags = ("--json", "--worker-id", "worker-0", "--threads", "1", "--devices", "cpu:2", "--out", str(tmp_path))
    flags += ("--trace", str(tmp_path / "traces" / "worker-0.json"))
    with (
        running_server(job(*LONG, "workers=1")) as server,
        datps("worker", "--server", server.address, *flags) as worker,
    ):
        read_until(worker.stdout, event="round")
        (other,) = others_of(worker.pid)
        worker.send_signal(signal.SIGTERM)
        output, errors = worker.communicate(timeout=WAIT_S)
        assert (worker.returncode, "state saved" in output) == (143, True), output + errors
        assert not alive(other)
    assert "Traceback" not in errors
    checkpoint = load_checkpoint(find_checkpoint(tmp_path))
    parameters = {name.removeprefix("model.") for name in checkpoint.tensors if name.startswith("model.")}
    moments = {name: tensor for name, tensor in checkpoint.tensors.items() if name.startswith("optimizer.m/")}
    assert {name.removeprefix("optimizer.m/") for name in moments} == parameters
    assert sum(tensor.numel() for tensor in moments.values()) == 2358
    assert all(tensor.any() for tensor in moments.values())  # also those of the other process's slice
    assert int(checkpoint.tensors["optimizer.t"]) == checkpoint.round > 0
    traces = [json.loads(path.read_text())["traceEvents"] for path in sorted((tmp_path / "traces").iterdir())]
    names = [next(event["args"]["name"] for event in events if event["name"] == "process_name") for events in traces]
    assert names == ["worker-0", "worker-0 local process 1 of 2 (cpu)"]
    first, second = ({e["args"]["bucket"] for e in events if e["name"] == "encode"} for events in traces)
    assert first.isdisjoint(second)
    assert sorted(first | second) == list(range(len(first) + len(second)))


@pytest.mark.processes
def test_a_local_process_ends_with_the_worker_whatever_it_is_doing_and_ignores_sigterm() -> None:
    """It waits for the others here, in a call that nothing interrupts; its worker's end closes its standard input."""
    spec = job(*SMALL, "workers=1")
    store = Store()
    order = Order(
        job_spec=spec.to_json(),
        devices=("cpu", "cpu"),
        threads=1,
        data=None,
        checkpoint=None,
        saves=False,
        connect_s=1.0,
        local_rank=1,
        store_port=store.port,
    )
    process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdin
        assert process.stdout
        process.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        process.stdin.flush()
        event = read_until(process.stdout, event="built")
        own = Workplace.build(spec, dataset_of(spec), CPU, None, LocalTeam(spec, 0, 2))
        assert {name: event[name] for name in built(own)} == built(own)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.2)
        process.stdin.close()
        assert process.wait(WAIT_S) == 75
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
