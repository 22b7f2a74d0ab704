"""`datps bench overlap`: the share of communication that is hidden behind backward.

Three phases in turn, in one run: the exchange alone, backward alone, both at once. With t the medians,

    hidden    = 1 - t(waited, both at once) / t(exchange alone)
    end to end = (t(backward alone) + t(exchange alone) - t(both at once)) / t(exchange alone)

The first counts what a worker still waits for averages once backward is over; the second also counts by how much the
exchange slows backward down, which on a machine whose cores are all busy it must.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gate import StartingLine
from bench.job import START_S, Job
from bench.network import hosts_at_rate
from bench.overlap_worker import PHASES, OverlapOrders
from bench.processes import Crew, Host, Say
from bench.report import environment, table
from bench.settings import Setting
from bench.workload import TRACE, WORKLOAD
from common.errors import SpecError, refusal
from common.timeline import merge

_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class OverlapPlan:
    """What is measured.

    Attributes:
        cycles, warmup_cycles: timed and untimed ones, each of all three phases.
        batch: images of a backward pass.
        threads: of each worker, for backward.
    """

    cycles: int
    warmup_cycles: int
    batch: int
    threads: int


@dataclass(kw_only=True)
class Cycle:
    """One cycle: for each phase the events of all workers."""

    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def longest(self, phase: str, key: str) -> float:
        """The slowest worker's seconds: it is the one that the round waits for."""
        return max(float(event[key]) for event in self.events[phase])


def run_overlap(setting: Setting, plan: OverlapPlan, say: Say, trace: Path | None = None) -> dict[str, Any]:
    """Measures one setting; `trace`: file for the timelines of all processes.

    Raises:
        SpecError: this machine or user cannot make the links, or the setting is refused.
        DatpsError: the measurement failed.
    """
    if setting.topology is None or setting.spec is None:
        raise SpecError(refusal("a topology of ours", "topology", "gloo"))
    with hosts_at_rate(setting.topology.nodes, setting.rate_bps, say) as (hosts, links):
        ready, cycles = _measure(setting, hosts, plan, say, trace)
    row = row_of(cycles)
    if row["backward_s"] <= row["exchange_s"]:
        say(
            f"backward ({row['backward_s']:.3f} s) is shorter than the exchange ({row['exchange_s']:.3f} s), which it "
            "can hide only in part: choose a larger batch or model, fewer bits or a faster link"
        )
    return {
        "environment": {**environment(), "link_goodput": links},
        "setting": {
            "topology": str(setting.topology),
            "codec": setting.codec,
            "rate_bits_per_s": setting.rate_bps,
            "workers": setting.topology.workers,
            "model": setting.spec.model.name.value,
            "batch": plan.batch,
            "threads": plan.threads,
            "parameters": ready["parameters"],
            "buckets": ready["buckets"],
            "job_spec": setting.spec.model_dump(mode="json"),
        },
        **row,
    }


def row_of(cycles: Sequence[Cycle]) -> dict[str, Any]:
    """The figures of all timed cycles: medians, and every cycle's own."""
    exchange = [cycle.longest("exchange", "exchange_s") for cycle in cycles]
    backward = [cycle.longest("backward", "backward_s") for cycle in cycles]
    slowed = [cycle.longest("both", "backward_s") for cycle in cycles]
    waited = [cycle.longest("both", "waited_s") for cycle in cycles]
    both = [cycle.longest("both", "both_s") for cycle in cycles]
    alone_s, both_s = statistics.median(exchange), statistics.median(both)
    backward_s, waited_s = statistics.median(backward), statistics.median(waited)
    each = [1 - w / e for w, e in zip(waited, exchange, strict=True)]
    return {
        "hidden_fraction": 1 - waited_s / alone_s,
        "hidden_fraction_smallest": min(each),
        "hidden_fraction_largest": max(each),
        "hidden_end_to_end_fraction": (backward_s + alone_s - both_s) / alone_s,
        "exchange_s": alone_s,
        "backward_s": backward_s,
        "backward_with_exchange_s": statistics.median(slowed),
        "waited_s": waited_s,
        "both_s": both_s,
        "cycles": [
            {"exchange_s": e, "backward_s": b, "backward_with_exchange_s": s, "waited_s": w, "both_s": t}
            for e, b, s, w, t in zip(exchange, backward, slowed, waited, both, strict=True)
        ],
    }


def _measure(
    setting: Setting, hosts: Sequence[Host], plan: OverlapPlan, say: Say, trace: Path | None
) -> tuple[dict[str, Any], list[Cycle]]:
    assert setting.topology is not None
    assert setting.spec is not None
    cycles = []
    with tempfile.TemporaryDirectory(prefix="datps-bench-") as name:
        folder = Path(name)
        orders = OverlapOrders(
            cycles=plan.warmup_cycles + plan.cycles,
            warmup_cycles=plan.warmup_cycles,
            batch=plan.batch,
            threads=plan.threads,
            gate=str(folder / "gate"),
            deadline_s=setting.deadline_s,
            traces=str(folder) if trace else None,
        )
        orders.write(folder / WORKLOAD)
        workers = setting.topology.workers
        with StartingLine(folder / "gate", workers, lambda _start: None), Crew(folder, say) as crew:
            job = Job(crew, hosts, setting.topology, setting.spec, folder, traced=trace is not None)
            environment = {"OMP_NUM_THREADS": str(plan.threads)}
            names = job.start("bench.overlap_worker", folder / WORKLOAD, environment)
            ready = crew.collect("overlap_ready", names, setting.deadline_s + START_S, "the model")
            for number in range(orders.cycles):
                cycle = Cycle()
                for phase in PHASES:
                    what = f"cycle {number + 1}, {phase},"
                    events = crew.collect("overlap_phase", names, setting.deadline_s, what)
                    cycle.events[phase] = list(events.values())
                if number >= plan.warmup_cycles:
                    cycles.append(cycle)
                say(_words(number, number >= plan.warmup_cycles, cycle))
            crew.join(_END_S)
        if trace:
            merge(folder.glob(f"*{TRACE}"), trace)
    return ready[names[0]], cycles


def _words(number: int, timed: bool, cycle: Cycle) -> str:
    exchange_s, backward_s = cycle.longest("exchange", "exchange_s"), cycle.longest("backward", "backward_s")
    waited_s, both_s = cycle.longest("both", "waited_s"), cycle.longest("both", "both_s")
    return (
        f"{'cycle' if timed else 'warm-up cycle'} {number + 1}: exchange alone {exchange_s:.3f} s, backward alone "
        f"{backward_s:.3f} s, both {both_s:.3f} s of which {waited_s:.3f} s waiting"
    )


def print_overlap(result: dict[str, Any], console: Console) -> None:
    """One table for people."""
    setting = result["setting"]
    shown = table(f"{setting['model']}, batch {setting['batch']}: seconds", "median")
    for words, key in (
        ("exchange alone", "exchange_s"),
        ("backward alone", "backward_s"),
        ("both at once", "both_s"),
        ("  backward in it", "backward_with_exchange_s"),
        ("  waiting in it", "waited_s"),
    ):
        shown.add_row(words, f"{result[key]:.3f}")
    console.print(shown)
    smallest, largest = result["hidden_fraction_smallest"], result["hidden_fraction_largest"]
    console.print(
        f"Hidden behind backward: {_percent(result['hidden_fraction'])} of the exchange ({_percent(smallest)} to "
        f"{_percent(largest)} by cycle); end to end {_percent(result['hidden_end_to_end_fraction'])}.",
        highlight=False,
    )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"
