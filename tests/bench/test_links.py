"""Shaped links: refusals, and that nothing of ours stays behind whatever happens."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import links
from common.errors import PeerLostError, SpecError

ROOT = Path(__file__).parent.parent.parent


def devices() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def namespaces_of(pid: int) -> list[str]:
    return [name for name in links.our_namespaces() if name.split("-")[2] == str(pid)]


# Refusals, without any namespace


def test_user_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(SpecError, match=r"expected root \(user id 0\), got user_id=1000") as error,
        links.shaped_links(2),
    ):
        pass
    assert error.value.exit_code == 2


def test_other_system_than_linux_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SpecError, match="expected Linux, got platform=darwin"):
        links.refuse_where_impossible()


@pytest.mark.parametrize("tool", ["ip", "tc"])
def test_missing_program_is_named(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name == tool else f"/sbin/{name}")
    with pytest.raises(SpecError, match=rf"expected the program `{tool}` \(package iproute2\)"):
        links.refuse_where_impossible()


def test_namespaces_that_may_not_be_made_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str]) -> str:
        if command[:3] == ["ip", "netns", "add"]:
            raise PeerLostError("`ip netns add` failed: Operation not permitted")
        return ""

    monkeypatch.setattr(links, "refuse_where_impossible", lambda: None)
    monkeypatch.setattr(links, "_run", refuse)
    with pytest.raises(SpecError, match="expected permission to make network namespaces"), links.shaped_links(2):
        pass


def test_command_of_a_node_runs_in_its_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, **_: f"/sbin/{name}")
    node = links.Node(index=0, namespace="here", address="10.77.0.1")
    assert node.command(["python", "-V"]) == ["/sbin/ip", "netns", "exec", "here", "python", "-V"]


def test_burst_holds_a_whole_packet_before_it_is_cut() -> None:
    def values(rate_bps: int) -> tuple[int, int]:
        command = links.shaping_command("here", "eth0", rate_bps)
        return int(command[command.index("burst") + 1]), int(command[command.index("limit") + 1])

    for rate_bps in (10**6, 10**8, 10**9, 10**10):
        burst, limit = values(rate_bps)
        assert burst > 65_536 + 45 * 66  # the headers that its 45 frames will have
        assert limit > burst
    assert values(10**9) == (200_000, 200_000 + 2_500_000)


# With namespaces


@pytest.mark.usefixtures("namespaces")
def test_links_are_gone_after_a_failure_within() -> None:
    before = devices()
    sleepers = []

    def fail_within() -> None:
        with links.shaped_links(2) as made:
            assert len(namespaces_of(os.getpid())) == 3
            here = made.nodes[0].command([sys.executable, "-c", "import time; time.sleep(60)"])
            sleepers.append(subprocess.Popen(here))
            time.sleep(0.2)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_within()
    assert sleepers[0].wait(5) == -signal.SIGKILL  # what still ran in there
    assert namespaces_of(os.getpid()) == []
    assert devices() == before


@pytest.mark.usefixtures("namespaces")
def test_links_of_a_killed_process_are_removed_at_the_next_start() -> None:
    before = devices()
    code = "import os; from bench.links import shaped_links\nwith shaped_links(2): os.kill(os.getpid(), 9)"
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    assert killed.wait(20) == -signal.SIGKILL
    assert len(namespaces_of(killed.pid)) == 3
    with links.shaped_links(1):
        assert namespaces_of(killed.pid) == []
        assert len(namespaces_of(os.getpid())) == 2  # ours is alive, and so not taken for a leftover
        assert links.remove_leftovers() == []
    assert devices() == before


@pytest.mark.usefixtures("namespaces")
def test_sigterm_while_measuring_leaves_nothing_behind() -> None:
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "bench",
        "network",
        "--nodes",
        "2",
        "--elements",
        "3000",
        "--no-gloo",
    ]
    process = subprocess.Popen(
        [*command, "--rounds", "10000", "--topology", "colocated"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "starting" in line:  # its processes run in the namespaces now
            break
    time.sleep(0.5)
    assert len(namespaces_of(process.pid)) == 3
    process.terminate()
    _, words = process.communicate(timeout=20)
    assert process.returncode == 143, words
    assert "SIGTERM: the measurement is given up" in words
    assert "Traceback" not in words
    assert namespaces_of(process.pid) == []
