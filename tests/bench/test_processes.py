"""The laboratory's processes: their commands, their failures, the starting line."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.gate import Gate, StartingLine
from bench.job import server_command
from bench.processes import Crew, Loopback, children_of, count_process
from common.errors import DatpsError, MismatchError, PeerLostError, SpecError

SAYS = "import json, sys; print(json.dumps({'event': 'hello', 'number': 3}), flush=True)"
ERROR = "import json, sys; print(json.dumps({{'event': 'error', 'text': '{}', 'exit_code': {}}})); sys.exit({})"


@pytest.fixture(autouse=True)
def _short_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.processes._LAST_WORDS_S", 0.3)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_server_is_the_real_one_on_any_free_port(tmp_path: Path) -> None:
    command = server_command(tmp_path / "job.yaml", "10.77.0.1", 2, ())
    assert command[:4] == [sys.executable, "-m", "deploy.cli", "server"]
    assert command[command.index("--host") + 1] == "10.77.0.1"
    assert command[command.index("--port") + 1] == "0"
    assert "--shard-addresses" not in command
    trace = tmp_path / "trace.json"
    first = server_command(tmp_path / "job.yaml", "10.77.0.1", 0, ("10.77.0.1:0", "10.77.0.2:5"), trace)
    assert first[-4:] == ["--shard-addresses", "10.77.0.1:0,10.77.0.2:5", "--trace", str(trace)]


def test_process_on_loopback_needs_no_prefix() -> None:
    assert Loopback().command(["a", "b"]) == ["a", "b"]


def test_what_processes_say_is_collected_even_if_one_has_ended_since(tmp_path: Path) -> None:
    with Crew(tmp_path, print) as crew:
        crew.start("quick", python(SAYS))
        crew.start("slow", python("import time; time.sleep(0.7); " + SAYS))
        said = crew.collect("hello", ["quick", "slow"], 20.0, "a word")
        crew.join(20.0)
    assert {name: event["number"] for name, event in said.items()} == {"quick": 3, "slow": 3}


def test_process_that_crashes_is_named_with_its_last_words(tmp_path: Path) -> None:
    with Crew(tmp_path, print) as crew:
        crew.start("victim", python(ERROR.format("a peer is gone", 75, 75)))
        crew.start("culprit", python("import sys; sys.exit('out of luck')"))
        with pytest.raises(PeerLostError, match=r"culprit ended with exit code 1:\nout of luck"):
            crew.collect("hello", ["victim", "culprit"], 20.0, "a word")


@pytest.mark.parametrize(("exit_code", "error"), [(2, SpecError), (76, MismatchError), (75, PeerLostError)])
def test_reason_that_a_process_gives_keeps_its_exit_code(
    exit_code: int, error: type[DatpsError], tmp_path: Path
) -> None:
    with Crew(tmp_path, print) as crew:
        crew.start("process", python(ERROR.format("no bits", exit_code, exit_code)))
        with pytest.raises(error, match="process: no bits"):
            crew.collect("hello", ["process"], 20.0, "a word")


def test_process_that_says_nothing_is_waited_for_aloud_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.processes.REPORT_S", 0.2)
    aloud: list[str] = []
    with Crew(tmp_path, aloud.append) as crew:
        pid = crew.start("mute", python("import time; time.sleep(60)"))
        with pytest.raises(PeerLostError, match=r"expected a word of mute within 0\.6 s"):
            crew.collect("hello", ["mute"], 0.6, "a word")
    assert aloud[0].startswith("waiting for a word of mute")
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_nobody_starts_before_all_are_here(tmp_path: Path) -> None:
    starts: list[int] = []
    begun: list[float] = []

    def work(delay_s: float) -> None:
        gate = Gate(str(tmp_path / "gate"), 10.0)
        for _ in range(2):
            time.sleep(delay_s)
            gate.wait()
            begun.append(time.monotonic())

    with StartingLine(tmp_path / "gate", 3, starts.append):
        first_s = time.monotonic()
        threads = [threading.Thread(target=work, args=(delay_s,)) for delay_s in (0.0, 0.0, 0.2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10.0)
    assert starts == [0, 1]
    assert len(begun) == 6
    assert min(begun[:3]) >= first_s + 0.2
    assert min(begun[3:]) >= max(begun[:3]) + 0.2 - 0.05


def test_launcher_that_fails_at_the_start_says_why_and_lets_the_workers_go(tmp_path: Path) -> None:
    def fail(_start: int) -> None:
        raise PeerLostError("the links are gone")

    def start() -> None:
        with StartingLine(tmp_path / "gate", 1, fail), pytest.raises(PeerLostError, match="the launcher is gone"):
            Gate(str(tmp_path / "gate"), 10.0).wait()

    with pytest.raises(PeerLostError, match="the links are gone"):
        start()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_children_of_a_process_are_found_while_they_run() -> None:
    before = children_of(os.getpid())
    child = subprocess.Popen(["/bin/sleep", "60"], start_new_session=True)
    assert children_of(os.getpid()) == [*before, child.pid]
    child.kill()
    child.wait()
    assert children_of(os.getpid()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_time_of_a_process_are_read() -> None:
    count = count_process(os.getpid())
    assert 1 << 20 < count.rss_bytes <= count.peak_rss_bytes
    assert count.cpu_s > 0
    assert count_process(1 << 30).rss_bytes == 0
