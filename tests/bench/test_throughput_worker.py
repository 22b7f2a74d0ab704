"""The worker of `datps bench throughput`, in this process, with a real server: both its loops are one and the same."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import member
from bench.gate import StartingLine
from bench.settings import parse_topology, plan_settings
from bench.throughput_worker import ThroughputOrders, run
from common.events import Emitter
from tests.support import running_server

SETTINGS = ["model.name=resnet8", "model.width=8", "data.batch_per_worker=4", "attack.steps=2"]
SETTINGS += ["evaluation.every_epochs=0", "checkpoint.every_epochs=0"]


def events_of(folder: Path, optimizer: str, blocks: int) -> list[dict[str, Any]]:
    (setting,) = plan_settings(
        topologies=[parse_topology("dedicated:1", 1)],
        codecs=["none"],
        rates_bps=[None],
        gloo=False,
        elements=1000,
        settings=[*SETTINGS, f"optimizer.name={optimizer}"],
    )
    assert setting.spec is not None
    orders = ThroughputOrders(
        blocks=blocks,
        warmup_blocks=0,
        block_rounds=2,
        data="synthetic",
        threads=1,
        gate=str(folder / "gate"),
        deadline_s=60.0,
    )
    said = io.StringIO()
    with running_server(setting.spec) as server, StartingLine(folder / "gate", 1, lambda _start: None):
        run(server.address, "127.0.0.1", 0, orders, Emitter("worker-0", as_json=True, stream=said))
    events = [json.loads(line) for line in said.getvalue().splitlines()]
    return [event for event in events if event["event"].startswith("throughput_")]


@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
def test_training_through_the_system_ends_where_the_plain_loop_does(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(member, "keep_freed_memory", lambda: True)  # both are for a process of its own
    monkeypatch.setattr(torch, "set_num_threads", lambda _threads: None)
    ready, *blocks, done = events_of(tmp_path, optimizer, blocks=2)
    assert ready["parameters"] > 1000
    assert [block["kind"] for block in blocks] == ["ours", "plain", "plain", "ours"]
    for block in blocks:
        assert block["seconds"] > 0
        assert (block["waited_s"] > 0) == (block["kind"] == "ours")
    assert done["same_parameters"] is True
