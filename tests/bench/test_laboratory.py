"""The laboratory as people start it: real processes on this machine, and on shaped links."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.links import our_namespaces
from bench.settings import Setting
from bench.tensors import STATE
from deploy.cli import app

ROOT = Path(__file__).parent.parent.parent
ELEMENTS = 30_000
PAYLOAD_BYTES = ELEMENTS + 4 * -(-ELEMENTS // 512) + 4 * STATE.elements
"""Of one worker with 8 bits."""


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def result_of(*arguments: str) -> dict[str, Any]:
    done = bench(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.processes
def test_exchange_is_measured_on_this_machine_with_a_shard_on_every_node(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    arguments = ("--workers", "2", "--topology", "colocated", "--elements", str(ELEMENTS), "--rounds", "2")
    result = result_of("exchange", *arguments, "--codec", "8x2", "--trace", str(trace))
    (row,) = result["rows"]
    assert result["environment"]["cores"] >= 1
    assert result["settings"][0]["job_spec"]["exchange"]["topology"] == "colocated"
    assert len(row["rounds_s"]) == 2
    assert 0 < row["min_s"] <= row["median_s"]
    assert row["pushed_bytes_per_worker"] == row["pulled_bytes_per_worker"] == PAYLOAD_BYTES
    assert PAYLOAD_BYTES <= row["pushed_message_bytes_per_worker"] < 1.2 * PAYLOAD_BYTES
    assert row["worker_cpu_s"] > 0
    assert row["limit_s"] is None
    assert row["shards"] == 2
    if sys.platform == "linux":
        assert row["server_rss_idle_bytes"] > 1 << 20
    events = json.loads(trace.read_text())["traceEvents"]
    assert len({event["pid"] for event in events}) == 5  # coordinator, two workers, two shards
    assert {"round", "encode", "decode"} <= {event["name"] for event in events}


@pytest.mark.processes
@pytest.mark.usefixtures("namespaces")
def test_network_is_measured_beside_gloo_and_leaves_nothing_behind() -> None:
    before = set(our_namespaces())
    devices = sorted(path.name for path in Path("/sys/class/net").iterdir())
    arguments = ("--nodes", "2", "--rate", "100mbit", "--elements", str(ELEMENTS), "--rounds", "2")
    result = result_of("network", *arguments, "--codec", "32", "--topology", "collective")
    gloo, collective = result["rows"]
    assert [row["name"] for row in result["rows"]] == ["gloo 100mbit", "collective 32 100mbit"]
    assert gloo["limit_s"] == pytest.approx(8 * 4 * ELEMENTS / 1e8)
    assert collective["limit_s"] == pytest.approx(gloo["limit_s"], rel=0.01)
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


@pytest.mark.processes
def test_overlap_is_measured_on_this_machine() -> None:
    model = ("--model", "resnet8", "--batch", "4", "--set", "model.width=8")
    result = result_of("overlap", "--rate", "loopback", "--topology", "dedicated:2", "--cycles", "2", *model)
    assert len(result["cycles"]) == 2
    assert result["setting"]["parameters"] > 1000
    assert 0 < result["waited_s"] < result["both_s"]
    assert result["backward_with_exchange_s"] <= result["both_s"]
    assert result["hidden_fraction"] == pytest.approx(1 - result["waited_s"] / result["exchange_s"])


@pytest.mark.parametrize("command", ["network", "overlap"])
def test_who_may_not_make_links_is_refused_before_anything_is_said_or_made(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = CliRunner().invoke(app, ["bench", command])
    assert done.exit_code == 2
    assert done.stdout == ""
    assert " ".join(done.stderr.split()).startswith("error: expected root (user id 0), got user_id=1000 (network ")


@pytest.mark.parametrize(
    ("codecs", "names"),
    [
        ((), ["gloo 1gbit", "colocated 8x2 1gbit", "dedicated:1 8x2 1gbit", "collective 8 1gbit"]),
        (("shared:4",), ["gloo 1gbit", "colocated shared:4 1gbit", "dedicated:1 shared:4 1gbit"]),
    ],
    ids=["all", "not those that cannot have the codec"],
)
def test_network_measures_all_our_topologies_where_none_is_named(
    codecs: tuple[str, ...], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []

    def run_network(settings: Sequence[Setting], *_: object) -> dict[str, Any]:
        planned.extend(setting.name for setting in settings)
        return {}

    monkeypatch.setattr("bench.network.run_network", run_network)
    done = CliRunner().invoke(app, ["bench", "network", "--json", *(part for c in codecs for part in ("--codec", c))])
    assert done.exit_code == 0, done.output
    assert planned == names


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("exchange", ["dedicated:SERVERS", "8x2"]),
        ("network", ["colocated, dedicated:1, and collective unless a codec is shared", "8x2", "1gbit"]),
        ("predict", ["dedicated:1, colocated, collective", "32, 8x2, 4x2", "200mbit, 1gbit, 10gbit"]),
    ],
)
def test_help_says_what_is_measured_where_nothing_is_said(command: str, defaults: list[str]) -> None:
    done = CliRunner().invoke(app, ["bench", command, "--help"], env={"COLUMNS": "300"})
    text = " ".join(done.stdout.replace("│", " ").split())
    assert [default for default in defaults if f"[default: ({default})]" not in text] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("exchange", "--codec", "9x2"), "expected 2 to 8, or 16, got bits=9"),
        (("exchange", "--servers", "5", "--elements", "600"), "got servers=5"),
        (("exchange", "--set", "codec.bit=4"), "did you mean codec.bits?"),
        (("exchange", "--set", "exchange.topology=colocated"), "expected the flag for exchange.topology"),
        (("exchange", "--codec", "8", "--codec", "4", "--trace", "t.json"), "expected one setting, run once"),
        (("network", "--rate", "fast"), "expected a rate from 1mbit to 100gbit, got rate=fast"),
        (("network", "--topology", "star"), "expected colocated, collective, dedicated"),
        (("overlap", "--model", "resnet9"), "resnet9"),
        (("overlap", "--rate", "slow"), "expected a rate from 1mbit to 100gbit, got rate=slow"),
        (("throughput", "--data", "cats"), "expected synthetic or digits, got data=cats"),
        (("throughput", "--set", "attack.name=fgsm"), "expected attack.name=pgd, got attack.name=fgsm"),
        (("throughput", "--set", "data.augment=true"), "expected data.augment=False, got data.augment=True"),
        (("predict", "--measured", "nothing.json"), "expected a JSON file that can be read, got file=nothing.json"),
        (("predict", "--topology", "star"), "expected colocated, collective, dedicated"),
        (("predict", "--codec", "9x2"), "expected 2 to 8, or 16, got bits=9"),
    ],
)
def test_mistake_ends_with_words_and_exit_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
