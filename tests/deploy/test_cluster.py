"""Local clusters of real processes that play scripts: starts, ends, logs, exit codes, and that nobody stays behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.spec_sources import load_job_spec
from deploy.cluster import DatpsCommands, child_environment, threads_per_worker
from deploy.process import parse_event
from tests.deploy.fakes import BRIEF, CONNECTS, DAEMON, HANG, LISTENS, Observed, Script, run

ROOT = Path(__file__).parents[2]
TRAINS: Script = [["term", 143], CONNECTS, HANG]


def signals_itself(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def exit_codes(observed: Observed) -> dict[str, int]:
    return {event["process"]: event["exit_code"] for event in observed.of("ended")}


@contextmanager
def everyone_holds(fifo: Path, processes: int) -> Iterator[Callable[[], None]]:
    """A FIFO that `processes` processes hold open; yields a check that they do, and at the end all must be gone."""
    os.mkfifo(fifo)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)

    def read() -> bytes:
        readable, _, _ = select.select([descriptor], [], [], 20)
        assert readable, "nothing within 20 s"
        return os.read(descriptor, 100)

    def all_are_here() -> None:
        seen = 0
        while seen < processes:
            seen += len(read())

    yield all_are_here
    assert read() == b"", "a process is still there"
    os.close(descriptor)


def test_servers_come_before_workers_and_hand_on_their_addresses(tmp_path: Path) -> None:
    def listens(port: int) -> list[list[object]]:
        return [["say", {"event": "listening", "address": f"127.0.0.1:{port}"}], ["exit", 0]]

    scripts = {
        "server-0": listens(5000),
        "server-1": listens(5001),
        "worker-0": [["exit", 0]],
        "worker-1": [["exit", 0]],
    }

    outcome, observed, commands = run(scripts, tmp_path)

    assert outcome.exit_code == 0
    assert [event["process"] for event in observed.of("started")] == ["server-1", "server-0", "worker-0", "worker-1"]
    assert commands.calls["server-0"] == {"port": 0, "shard_addresses": ("127.0.0.1:0", "127.0.0.1:5001")}
    assert commands.calls["server-1"] == {"port": 0, "shard_addresses": ()}
    assert commands.calls["worker-1"] == {"server": "127.0.0.1:5000"}


def test_each_process_leaves_its_output_in_a_log_of_its_own(tmp_path: Path) -> None:
    scripts = {
        "server-0": [LISTENS, ["exit", 0]],
        "worker-0": [["print", "no event"], CONNECTS, ["stderr", "a warning"], ["exit", 0]],
    }

    outcome, observed, _ = run(scripts, tmp_path)

    assert outcome.exit_code == 0
    assert (tmp_path / "logs/worker-0.jsonl").read_text() == f"no event\n{json.dumps(CONNECTS[1])}\n"
    assert (tmp_path / "logs/worker-0.stderr").read_text() == "a warning\n"
    assert [event["process"] for event in observed.of("connecting")] == ["worker-0"]


def test_a_daemon_gets_none_of_the_launchers_datps_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATPS_CODEC__BITS", "4")
    scripts = {"server-0": [["environment", "DATPS_"], ["environment", "OMP_NUM"], LISTENS], "worker-0": [CONNECTS]}

    _, observed, _ = run(scripts, tmp_path)

    threads = str(threads_per_worker(1))
    assert [event["found"] for event in observed.of("environment")] == [{}, {"OMP_NUM_THREADS": threads}]


def test_the_process_that_failed_is_named_with_its_error_and_the_others_are_ended(tmp_path: Path) -> None:
    error = {"event": "error", "text": "expected a data folder, got none", "exit_code": 2}
    scripts = {
        "server-0": [["term", 143], LISTENS, HANG],
        "worker-0": [["term", None], CONNECTS, HANG],
        "worker-1": [CONNECTS, ["say", error], ["exit", 2]],
    }

    outcome, observed, _ = run(scripts, tmp_path)

    assert (outcome.exit_code, outcome.process, outcome.reason) == (2, "worker-1", "expected a data folder, got none")
    assert exit_codes(observed) == {"worker-1": 2, "server-0": 143, "worker-0": -9}


def test_a_process_without_an_error_event_is_quoted_from_its_standard_error(tmp_path: Path) -> None:
    failing: Script = [["stderr", "Traceback ..."], ["stderr", "KeyError: 'x'"], ["exit", 1]]

    outcome, observed, _ = run({"server-0": failing, "worker-0": []}, tmp_path)

    assert (outcome.exit_code, outcome.process) == (1, "server-0")
    assert outcome.reason == "Traceback ...\nKeyError: 'x'"
    assert "worker-0" not in exit_codes(observed)


def test_a_killed_worker_is_worth_a_retry(tmp_path: Path) -> None:
    lost = [CONNECTS, ["say", {"event": "error", "text": "worker-1 is gone"}], ["exit", 75]]
    scripts = {"server-0": [LISTENS, HANG], "worker-0": lost, "worker-1": [CONNECTS, ["die", signal.SIGKILL]]}

    outcome, _, _ = run(scripts, tmp_path)

    assert (outcome.exit_code, outcome.text) == (75, "worker-1 was killed by SIGKILL")


def test_a_process_that_never_speaks_is_given_up(tmp_path: Path) -> None:
    patience = type(BRIEF)(startup_s=0.3, aftermath_s=0.1, stop_s=5, farewell_s=1, kill_s=0.2)

    outcome, _, _ = run({"server-0": [HANG], "worker-0": []}, tmp_path, patience=patience)

    assert (outcome.exit_code, outcome.process) == (75, "server-0")
    assert outcome.reason == "expected a first word within 0.3 s of its start, got none"


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_lets_the_workers_save(number: signal.Signals, exit_code: int, tmp_path: Path) -> None:
    scripts = {"server-0": [["term", 143], LISTENS, HANG], "worker-0": TRAINS, "worker-1": TRAINS}
    observed = Observed(when={("connecting", "worker-1"): signals_itself(number)})
    handler = signal.getsignal(number)

    outcome, observed, _ = run(scripts, tmp_path, observed=observed)

    assert (outcome.exit_code, outcome.text) == (exit_code, "stopped")
    assert all(code in (143, -15) for code in exit_codes(observed).values())
    assert '"state saved"' in (tmp_path / "logs/worker-1.jsonl").read_text()
    assert signal.getsignal(number) is handler


def test_a_second_signal_ends_even_the_deaf_at_once(tmp_path: Path) -> None:
    deaf = [["term", None], CONNECTS, HANG]
    scripts = {"server-0": [["term", None], LISTENS, HANG], "worker-0": deaf}
    observed = Observed(
        when={
            ("connecting", "worker-0"): signals_itself(signal.SIGINT),
            ("stopping", "train"): signals_itself(signal.SIGINT),
        }
    )

    outcome, observed, _ = run(scripts, tmp_path, observed=observed)

    assert (outcome.exit_code, outcome.text) == (130, "ended at once by a second signal")
    assert exit_codes(observed).keys() <= {"server-0", "worker-0"}


def test_nobody_stays_behind_if_the_launcher_fails(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    held: Script = [["term", None], ["hold", str(fifo)]]
    scripts = {"server-0": [*held, LISTENS, HANG], "worker-0": [*held, CONNECTS, HANG]}

    def fail() -> None:
        raise RuntimeError("the display is broken")

    with everyone_holds(fifo, 2) as all_are_here:
        observed = Observed(when={("connecting", "worker-0"): fail})
        with pytest.raises(RuntimeError, match="the display is broken"):
            run(scripts, tmp_path, observed=observed)
        all_are_here()


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_nobody_stays_behind_if_the_launcher_is_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    held: Script = [["term", None], ["hold", str(fifo)]]
    scripts = {"server-0": [*held, LISTENS, HANG], "worker-0": [*held, CONNECTS, HANG]}
    program = (
        "import json, sys; from pathlib import Path; from tests.deploy.fakes import run;"
        "run(json.loads(sys.argv[1]), Path(sys.argv[2]))"
    )

    with everyone_holds(fifo, 2) as all_are_here:
        launcher = subprocess.Popen([sys.executable, "-c", program, json.dumps(scripts), str(tmp_path)], cwd=ROOT)
        try:
            all_are_here()
        finally:
            launcher.kill()
            launcher.wait()


def test_a_leash_whose_holder_is_gone_runs_nothing(tmp_path: Path) -> None:
    leash = ROOT / "deploy/leash.py"
    command = [sys.executable, "-S", "-E", str(DAEMON), json.dumps([["write", str(tmp_path / "ran"), ""]])]

    ended = subprocess.run([sys.executable, "-I", str(leash), "1", *command], check=False)

    assert ended.returncode == 1
    assert not (tmp_path / "ran").exists()


def test_the_daemons_are_told_what_belongs_to_them(tmp_path: Path) -> None:
    spec = load_job_spec(settings=["workers=2", "servers=2", "data.split=own", "data.name=imagefolder"])
    commands = DatpsCommands(
        spec=spec, folder=tmp_path, data=Path("images"), device="cuda", threads=3, resume=True
    )  # fmt: skip

    server = commands.server(shard=0, port=0, shard_addresses=("a:1", "b:2"))[3:]
    first, second = (commands.worker(index=index, server="a:1")[3:] for index in range(2))

    assert server == [
        *("server", "--json", "--job", str(tmp_path / "job.yaml"), "--shard", "0"),
        *("--host", "127.0.0.1", "--port", "0", "--shard-addresses", "a:1,b:2"),
    ]
    shared = ["worker", "--json", "--server", "a:1", "--worker-id", "worker-1", "--device", "cuda", "--threads", "3"]
    assert second == [*shared, "--data", "images/worker-1", "--resume", str(tmp_path)]
    assert first[-4:] == ["--out", str(tmp_path), "--resume", str(tmp_path)]


def test_a_daemons_environment_is_ours_without_the_job() -> None:
    environment = child_environment(2, {"PATH": "/bin", "DATPS_SEED": "1", "OMP_NUM_THREADS": "64"})

    assert environment == {"PATH": "/bin", "OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize(
    "line", [b"", b"text\n", b"[1]\n", b'{"no": 1}\n', b'{"event": 3}\n', b'{"event": "cut', b"\xff"]
)
def test_what_is_no_event_is_passed_over(line: bytes) -> None:
    assert parse_event(line) is None
