"""One measurement: real processes on their nodes, warm-up and timed rounds, and what they cost."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gate import StartingLine
from bench.job import START_S, Job
from bench.links import LinkCount
from bench.processes import Crew, Host, ProcessCount, Say, count_process, forget_peak
from bench.settings import Setting
from bench.workload import TRACE, WORKLOAD, Workload
from common.errors import MismatchError, refusal
from common.timeline import merge

_IDLE_S = 0.3
"""What the last streams get to open before the servers count as idle."""
_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What all measurements of a run have in common.

    Attributes:
        workers: M.
        elements: of the gradient; None for ResNet-50's.
        rounds, warmup_rounds: timed and untimed ones.
    """

    workers: int
    elements: int | None
    rounds: int
    warmup_rounds: int


@dataclass(kw_only=True)
class Sample:
    """What one measurement gave.

    Attributes:
        rounds: by timed round, the workers' events by worker.
        done: the workers' last events.
        idle, before, after: the shards' processes, by shard, when all streams were open, before the first and after
            the last timed round. A coordinator without a shard is not counted: it has nothing to do in a round.
        links_before, links_after: of the links, at the same moments; empty on loopback.
    """

    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    done: list[dict[str, Any]] = field(default_factory=list)
    idle: list[ProcessCount] = field(default_factory=list)
    before: list[ProcessCount] = field(default_factory=list)
    after: list[ProcessCount] = field(default_factory=list)
    links_before: list[LinkCount] = field(default_factory=list)
    links_after: list[LinkCount] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """By timed round: from the first worker's start to the last worker's end."""
        return [max(e["end_s"] for e in events) - min(e["start_s"] for e in events) for events in self.rounds]


def measure(
    setting: Setting,
    hosts: Sequence[Host],
    orders: Orders,
    say: Say,
    count_links: Callable[[], list[LinkCount]],
    trace: Path | None = None,
) -> Sample:
    """Runs one setting once; `trace`: file for the timelines of all its processes.

    Raises:
        SpecError: the setting is refused by a process.
        PeerLostError: a process failed, or did not answer in time.
        MismatchError: two workers decoded different averages.
    """
    sample, pids, find_shards = Sample(), list[int](), list[Callable[[], list[int]]]()

    def everybody_is_here(meeting: int) -> None:
        start, at_the_end = divmod(meeting, 2)  # before each round and after it
        if at_the_end:
            return
        if start == 0:
            time.sleep(_IDLE_S)
            pids.extend(pid for find in find_shards for pid in find())
            sample.idle = [count_process(pid) for pid in pids]
            for pid in pids:
                forget_peak(pid)
        if start == orders.warmup_rounds:
            sample.before, sample.links_before = [count_process(pid) for pid in pids], count_links()
        if start == orders.warmup_rounds + orders.rounds:
            sample.after, sample.links_after = [count_process(pid) for pid in pids], count_links()

    with tempfile.TemporaryDirectory(prefix="datps-bench-") as name:
        folder = Path(name)
        workload = Workload(
            elements=orders.elements,
            rounds=orders.warmup_rounds + orders.rounds,
            warmup_rounds=orders.warmup_rounds,
            gate=str(folder / "gate"),
            deadline_s=setting.deadline_s,
            traces=str(folder) if trace else None,
        )
        workload.write(folder / WORKLOAD)
        with (
            StartingLine(folder / "gate", orders.workers, everybody_is_here),
            Crew(folder, say) as crew,
        ):
            if setting.topology is None or setting.spec is None:
                names = _start_gloo(crew, hosts, orders.workers, folder)
            else:
                job = Job(crew, hosts, setting.topology, setting.spec, folder, traced=trace is not None)
                names = job.start("bench.exchange_worker", folder / WORKLOAD)
                find_shards.append(job.shard_pids)
            _follow(crew, names, orders, setting.deadline_s, sample, lambda text: say(f"{setting.name}: {text}"))
            crew.join(_END_S)
        if trace:
            merge(folder.glob(f"*{TRACE}"), trace)
    return sample


def _start_gloo(crew: Crew, hosts: Sequence[Host], workers: int, folder: Path) -> list[str]:
    """Starts worker 0, which opens the store, then the others; returns their names."""
    store, names = f"{hosts[0].address}:0", [f"gloo-{number}" for number in range(workers)]
    for number, name in enumerate(names):
        command = [sys.executable, "-m", "bench.gloo_worker", store, str(workers), str(number)]
        environment = {"GLOO_SOCKET_IFNAME": hosts[number].device}
        crew.start(name, hosts[number].command([*command, str(folder / WORKLOAD)]), environment)
        if number == 0:
            store = crew.collect("listening", [name], START_S, "the address")[name]["address"]
    return names


def _follow(crew: Crew, names: Sequence[str], orders: Orders, deadline_s: float, sample: Sample, say: Say) -> None:
    for round_ in range(orders.warmup_rounds + orders.rounds):
        patience_s = deadline_s + (START_S if round_ == 0 else 0.0)
        events = list(crew.collect("bench_round", names, patience_s, f"round {round_ + 1}").values())
        digests = {event["digest"] for event in events}
        if len(digests) != 1:
            rule = f"one average at all workers after round {round_}"
            raise MismatchError(refusal(rule, "digests", sorted(digests)))
        seconds = max(e["end_s"] for e in events) - min(e["start_s"] for e in events)
        timed = round_ >= orders.warmup_rounds
        say(f"{'round' if timed else 'warm-up round'} {round_ + 1}: {seconds:.3f} s")
        if timed:
            sample.rounds.append(events)
    sample.done = list(crew.collect("bench_done", names, _END_S, "the last words").values())
