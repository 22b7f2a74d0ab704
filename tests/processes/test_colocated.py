"""Real processes with a shard on every node: the results of dedicated servers, and ends that leave no shard behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.spec_sources import load_job_spec
from deploy.recipes import DEFAULT, recipe
from tests.processes.test_processes import LONG, SMALL, datps, descendants, wait_for_line
from tests.processes.test_worker_in_thread import work
from tests.support import running_servers

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]

COLOCATED = "exchange.topology=colocated"
ROUNDS = 22
WAIT_S = 150.0
"""Five processes start at once, each with its libraries; on a busy machine that takes its time."""


@pytest.fixture(scope="module")
def with_dedicated_servers() -> str:
    """The parameter digest of the same job with two servers, all in threads."""
    spec = load_job_spec(yaml_text=recipe(DEFAULT).text, settings=(*SMALL, "servers=2"))
    with running_servers(spec) as servers, ThreadPoolExecutor(2) as pool:
        running = [pool.submit(work, servers[0].address, f"worker-{n}", threads=1) for n in range(2)]
        ended = [worker.result(WAIT_S) for worker in running]
    digests = [[event["parameter_digest"] for event in events if event["event"] == "round"] for _, events in ended]
    assert [code for code, _ in ended] == [0, 0]
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == ROUNDS
    return digests[0][-1]


def is_shard(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2:4] == [b"deploy.cli", b"shard"]


def gone(handle: int) -> bool:
    """Waits until the process of a pidfd is gone, whosever child it is."""
    ended, _, _ = select.select([handle], [], [], WAIT_S)
    os.close(handle)
    return bool(ended)


def until_first_round(process: subprocess.Popen[str]) -> dict[str, int]:
    """Follows the launcher to the first round; what runs: workers, server, and the shard of `worker-N` as `shard-N`."""
    pids: dict[str, int] = {}
    assert process.stdout
    for line in process.stdout:
        event = json.loads(line)
        if event.get("event") == "started":
            pids[event["process"]] = event["pid"]
        if event.get("event") == "round":
            break
    for number in range(2):
        (pids[f"shard-{number}"],) = [pid for pid in descendants(pids[f"worker-{number}"]) if is_shard(pid)]
    return pids


def complete(flag: str, folder: str, settings: tuple[str, ...] = ()) -> dict[str, Any]:
    """`datps train` to the end; its result."""
    with datps("train", "--no-baseline", "--json", flag, folder, settings=settings) as process:
        output, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, output + errors
    result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return result


def test_a_run_with_a_shard_on_every_node_ends_with_the_parameters_of_dedicated_servers(
    with_dedicated_servers: str, tmp_path: Path
) -> None:
    result = complete("--out", str(tmp_path / "run"), settings=(*SMALL, COLOCATED))
    assert (result["parameter_digest"], result["rounds"]) == (with_dedicated_servers, ROUNDS)
    assert [path.read_text() for path in (tmp_path / "run" / "logs").glob("*.stderr")] == ["", "", ""]


@pytest.mark.parametrize(
    ("victim", "named"),
    [("shard-1", "(shard 1) is gone"), ("worker-1", "worker-1 was killed by SIGKILL")],
    ids=["shard", "worker"],
)
def test_a_shard_or_worker_that_is_killed_in_mid_run_ends_the_run_with_75_naming_it_and_leaves_no_process(
    victim: str, named: str, tmp_path: Path
) -> None:
    run = ("train", "--no-baseline", "--json", "--out", str(tmp_path / "run"))
    with datps(*run, settings=(*LONG, COLOCATED)) as process:
        pids = until_first_round(process)
        handles = [os.pidfd_open(pid) for pid in pids.values()]
        os.kill(pids[victim], signal.SIGKILL)
        output, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 75, output + errors
        assert [gone(handle) for handle in handles] == [True] * 5
    last: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert (last["event"], last["exit_code"], named in last["text"]) == ("error", 75, True), last
    assert "Traceback" not in output + errors


def test_a_run_with_a_shard_on_every_node_that_is_stopped_and_resumed_ends_as_an_undisturbed_one(
    with_dedicated_servers: str, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    with datps("train", "--no-baseline", "--json", "--out", str(out), settings=(*SMALL, COLOCATED)) as process:
        wait_for_line(process, out / "logs" / "worker-0.jsonl", '"event": "round"')
        handles = [os.pidfd_open(pid) for pid in descendants(process.pid)]
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 143, output + errors
        assert all(gone(handle) for handle in handles)
    (saved,) = (out / "checkpoints").iterdir()
    assert 1 <= int(saved.name.removeprefix("round-")) < ROUNDS
    assert complete("--resume", str(out))["parameter_digest"] == with_dedicated_servers
    lines = [json.loads(line)["round"] for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert lines == list(range(1, ROUNDS + 1))
