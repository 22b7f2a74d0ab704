"""Real processes, started as a user starts them: runs are reproducible and resumable, and leave no orphans."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SMALL = (
    *("workers=2", "model.width=4", "data.batch_per_worker=64", "schedule.epochs=2", "evaluation.every_epochs=0"),
    *("attack.epsilon=0.2", "attack.steps=2", "attack.step_size=0.1", "evaluation.attack.steps=2"),
    *("codec.two_sided=true", "checkpoint.every_epochs=0"),
)
LONG = (*SMALL, "schedule.epochs=1000", "deadlines.keepalive_s=3", "deadlines.report_s=1")
WAIT_S = 60.0


@contextmanager
def datps(*arguments: str, settings: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    """A `datps` command in a session of its own; everything in it is gone on leaving."""
    command = [sys.executable, "-m", "deploy.cli", *arguments, *(part for s in settings for part in ("--set", s))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pid in descendants(process.pid):
            _kill(pid)
        _kill(process.pid)
        process.communicate()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Living children of a process, and theirs."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *descendants(int(child))]
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read_until(stream: IO[str], **wanted: Any) -> dict[str, Any]:
    """The first event with these values, from JSON lines; what comes after it stays unread."""
    seen = []
    for line in stream:
        event = json.loads(line)
        seen.append(event)
        if all(event.get(name) == value for name, value in wanted.items()):
            return event
    raise AssertionError(f"no event {wanted} in {seen}")


def train(out: Path, *settings: str) -> dict[str, Any]:
    """`datps train` to the end; its result."""
    with datps("train", "--no-baseline", "--json", "--out", str(out), settings=(*SMALL, *settings)) as process:
        output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output + errors
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("runs") / "undisturbed", "servers=2")


def test_the_same_run_twice_gives_the_same_parameters(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    again = train(tmp_path / "again", "servers=2")
    assert again["parameter_digest"] == undisturbed["parameter_digest"]
    assert again["clean_accuracy"] == undisturbed["clean_accuracy"]
    other = train(tmp_path / "other", "servers=2", "seed=1")
    assert other["parameter_digest"] != undisturbed["parameter_digest"]


def test_a_run_that_is_stopped_and_resumed_ends_with_the_parameters_of_an_undisturbed_one(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    with datps("train", "--no-baseline", "--json", "--out", str(out), settings=(*SMALL, "servers=2")) as process:
        rounds = out / "logs" / "worker-0.jsonl"
        wait_for_line(process, rounds, '"event": "round"')
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 143
    saved = [path.name for path in (out / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert 1 <= int(saved[0].removeprefix("round-")) < undisturbed["rounds"]
    with datps("train", "--no-baseline", "--json", "--resume", str(out)) as process:
        output, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, output + errors
    result = json.loads((out / "result.json").read_text())
    assert result["parameter_digest"] == undisturbed["parameter_digest"]
    lines = [json.loads(line)["round"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert lines == list(range(1, undisturbed["rounds"] + 1))


def wait_for_line(process: subprocess.Popen[str], file: Path, text: str) -> None:
    """Follows the launcher's output until a file that it writes contains a text."""
    assert process.stdout
    for _ in process.stdout:
        if file.exists() and text in file.read_text():
            return
    raise AssertionError(f"{text} never came in {file}")


@pytest.mark.parametrize("victim", ["worker-1", "server-0"])
def test_a_process_that_is_killed_in_mid_run_ends_the_run_with_75_naming_it(victim: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with datps("train", "--no-baseline", "--json", "--out", str(out), settings=LONG) as process:
        pids: dict[str, int] = {}
        assert process.stdout
        for line in process.stdout:
            event = json.loads(line)
            if event.get("event") == "started":
                pids[event["process"]] = event["pid"]
            if event.get("event") == "round":
                break
        os.kill(pids[victim], signal.SIGKILL)
        output, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 75, output + errors
        assert victim in output + errors
        assert not [name for name, pid in pids.items() if alive(pid)]


@contextmanager
def server_and_workers(count: int, settings: tuple[str, ...]) -> Iterator[tuple[Any, list[Any]]]:
    """One server and some workers started by hand."""
    with datps("server", "--json", "--host", "127.0.0.1", "--port", "0", settings=settings) as server:
        assert server.stdout
        address = read_until(server.stdout, event="listening")["address"]
        with workers(address, count) as started:
            yield server, started


@contextmanager
def workers(address: str, count: int) -> Iterator[list[Any]]:
    if count == 0:
        yield []
        return
    name = f"worker-{count - 1}"
    with (
        workers(address, count - 1) as others,
        datps("worker", "--json", "--server", address, "--worker-id", name, "--threads", "1") as last,
    ):
        yield [*others, last]


def test_started_by_hand_a_server_that_freezes_ends_the_workers_with_75_within_the_keepalive() -> None:
    with server_and_workers(2, LONG) as (server, (first, second)):
        read_until(first.stdout, event="round")
        os.kill(server.pid, signal.SIGSTOP)
        for worker in (first, second):
            output, _ = worker.communicate(timeout=WAIT_S)
            assert worker.returncode == 75
            assert "server 127.0.0.1" in output
            assert "is gone" in output


def test_a_worker_that_dies_before_the_view_forms_frees_its_place_and_too_few_end_with_75() -> None:
    settings = (*LONG, "workers=3", "deadlines.join_s=12")
    with server_and_workers(2, settings) as (server, (first, second)):
        read_until(server.stdout, event="joined", joined=2)
        os.kill(second.pid, signal.SIGKILL)
        output, errors = server.communicate(timeout=WAIT_S)
        told, _ = first.communicate(timeout=WAIT_S)
    text = "expected 3 workers to be ready within 12 s, got ready=1 (joined: worker-0)"
    assert (server.returncode, text in output) == (75, True)
    assert (first.returncode, text in told) == (75, True)
    assert "Traceback" not in errors


def test_sigterm_ends_a_server_that_waits_and_a_worker_that_waits_with_143() -> None:
    with server_and_workers(1, LONG) as (server, (worker,)):
        read_until(worker.stdout, event="waiting")
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=WAIT_S)
        server.send_signal(signal.SIGTERM)
        _, errors = server.communicate(timeout=WAIT_S)
        assert (server.returncode, worker.returncode) == (143, 143)
        assert "Traceback" not in errors


def test_sigterm_to_the_server_stops_the_workers_after_the_round() -> None:
    with server_and_workers(2, LONG) as (server, started):
        read_until(started[0].stdout, event="round")
        server.send_signal(signal.SIGTERM)
        outputs = [worker.communicate(timeout=WAIT_S)[0] for worker in started]
        _, errors = server.communicate(timeout=WAIT_S)
        assert [process.returncode for process in (server, *started)] == [143, 143, 143]
        assert all("stopped after round" in output for output in outputs)
        assert "Traceback" not in errors
