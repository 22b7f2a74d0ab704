"""Local clusters of fake daemons: what each process does is written in the test."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import JobSpec
from deploy.cluster import LocalCluster
from deploy.supervision import Outcome, Patience

DAEMON = Path(__file__).with_name("fake_daemon.py")
Step = list[Any]
Script = list[Step]

BRIEF = Patience(startup_s=20, aftermath_s=0.2, stop_s=20, farewell_s=0.2, kill_s=0.3)
"""Deadlines that tests let pass are short, those that they do not mean to meet are long."""

LISTENS: Step = ["say", {"event": "listening", "address": "127.0.0.1:7", "shard": 0, "job_id": "datps"}]
CONNECTS: Step = ["say", {"event": "connecting", "address": "127.0.0.1:7"}]
HANG: Step = ["hang"]


def round_event(number: int, rounds: int = 4) -> dict[str, Any]:
    return {
        "event": "round",
        "time": 1000.0 + number,
        "round": number,
        "rounds": rounds,
        "epoch": number / 2,
        "loss": 2.0 / number,
        "train_accuracy": 0.5,
        "learning_rate": 0.03,
        "attack_s": 0.4,
        "compute_s": 0.2,
        "communication_s": 0.1,
        "pushed_bytes": 1000,
        "pulled_bytes": 2000,
        "seconds": 0.7 * number,
    }


def result(clean: float = 0.98, robust: float = 0.76) -> dict[str, Any]:
    return {
        "clean_accuracy": clean,
        "robust_accuracy": robust,
        "rounds": 4,
        "workers": 2,
        "servers": 1,
        "parameters": 1000,
        "pushed_bytes_per_round": 1010.0,
        "pulled_bytes_per_round": 1000.0,
        "seconds": 12.5,
        "attack_seconds": 8.0,
        "compute_seconds": 3.0,
        "communication_seconds": 1.5,
    }


@dataclass
class FakeCommands:
    """Commands that play scripts; `calls` keeps what each process was told."""

    scripts: Mapping[str, Script]
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)

    def server(self, *, shard: int, port: int, shard_addresses: tuple[str, ...]) -> list[str]:
        return self._command(f"server-{shard}", {"port": port, "shard_addresses": shard_addresses})

    def worker(self, *, index: int, server: str) -> list[str]:
        return self._command(f"worker-{index}", {"server": server})

    def _command(self, name: str, call: dict[str, Any]) -> list[str]:
        self.calls[name] = call
        script = self.scripts[name]
        return [sys.executable, "-S", "-E", str(DAEMON), json.dumps(script)]


@dataclass
class Observed:
    """Keeps events; `when` maps an event's name and process to what the test does then, once."""

    when: dict[tuple[str, str], Callable[[], None]] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] != "tick":
            self.events.append(event)
        if act := self.when.pop((event["event"], event["process"]), None):
            act()

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]


def run(
    scripts: Mapping[str, Script],
    folder: Path,
    *,
    observed: Observed | None = None,
    patience: Patience = BRIEF,
) -> tuple[Outcome, Observed, FakeCommands]:
    """Runs a cluster of the processes that `scripts` names."""
    observed = observed or Observed()
    commands = FakeCommands(scripts)
    servers = sum(name.startswith("server-") for name in scripts)
    spec = JobSpec(servers=servers, workers=len(scripts) - servers)
    cluster = LocalCluster(spec=spec, folder=folder, commands=commands, observe=observed, patience=patience)
    return cluster.run(), observed, commands
