"""The laboratory as people start it: real processes on this machine, and on shaped links."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.links import our_namespaces
from bench.tensors import STATE
from deploy.cli import app

ROOT = Path(__file__).parent.parent.parent
ELEMENTS = 30_000


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def result_of(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.processes
def test_exchange_is_measured_on_this_machine() -> None:
    arguments = ("--workers", "2", "--servers", "2", "--elements", str(ELEMENTS), "--rounds", "3", "--codec", "8x2")
    result = result_of("exchange", *arguments)
    (row,) = result["rows"]
    payload_bytes = ELEMENTS + 4 * -(-ELEMENTS // 512) + 4 * STATE.elements
    assert result["environment"]["cores"] >= 1
    assert result["settings"][0]["job_spec"]["codec"]["bits"] == 8
    assert len(row["rounds_s"]) == 3
    assert 0 < row["min_s"] <= row["median_s"]
    assert row["pushed_bytes_per_worker"] == row["pulled_bytes_per_worker"] == payload_bytes
    assert payload_bytes <= row["pushed_message_bytes_per_worker"] < 1.2 * payload_bytes
    assert row["worker_cpu_s"] > 0
    assert row["limit_s"] is None
    if sys.platform == "linux":
        assert row["server_rss_idle_bytes"] > 1 << 20


@pytest.mark.processes
@pytest.mark.usefixtures("namespaces")
def test_network_is_measured_beside_gloo_and_leaves_nothing_behind() -> None:
    before = set(our_namespaces())
    devices = sorted(path.name for path in Path("/sys/class/net").iterdir())
    arguments = ("--nodes", "2", "--rate", "100mbit", "--elements", str(ELEMENTS), "--rounds", "2")
    result = result_of("network", *arguments, "--codec", "32", "--topology", "colocated")
    gloo, colocated = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["gloo 100mbit", "colocated 32 100mbit"]
    payload_bytes = 4 * ELEMENTS + 4 * STATE.elements
    assert gloo["limit_s"] == pytest.approx(8 * 4 * ELEMENTS / 1e8)
    assert colocated["limit_s"] == pytest.approx(8 * payload_bytes / 1e8, rel=0.01)
    for row in result["rows"]:
        assert row["digest"] == gloo["digest"]  # two float32 vectors: whoever adds them, one sum, all workers alike
        assert row["gloo_over_this"] == pytest.approx(gloo["median_s"] / row["median_s"])
        for sent_bytes, payload in zip(
            row["link_sent_bytes_per_node"], row["payload_sent_bytes_per_node"], strict=False
        ):
            assert payload < sent_bytes < 1.3 * payload + 20_000
    (link,) = result["environment"]["link_goodput"]
    assert 0.5 < link["goodput_bits_per_s"] / link["rate_bits_per_s"] < 1.0
    assert set(our_namespaces()) == before
    assert sorted(path.name for path in Path("/sys/class/net").iterdir()) == devices


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("exchange", "--codec", "9x2"), "expected 2 to 8, or 16, got bits=9"),
        (("exchange", "--servers", "5", "--elements", "600"), "got servers=5"),
        (("exchange", "--set", "codec.bit=4"), "did you mean codec.bits?"),
        (("network", "--rate", "fast"), "expected a rate from 1mbit to 100gbit, got rate=fast"),
        (("network", "--topology", "star"), "expected colocated, dedicated"),
    ],
)
def test_mistake_ends_with_words_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert words in done.stderr
