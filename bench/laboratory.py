"""Runs all settings, interleaved over the repeats, and puts the result together; the hosts are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.links import LinkCount
from bench.measure import Orders, Sample, measure
from bench.processes import Host, Say
from bench.report import add_gloo_ratios, environment, row_of
from bench.settings import Setting
from bench.tensors import tensors_of
from common.errors import SpecError, refusal
from common.layout import plan_layout


def nodes_needed(settings: Sequence[Setting], orders: Orders) -> int:
    """For the largest setting.

    Raises:
        SpecError: the gradient cannot be cut for one of them.
    """
    for setting in settings:
        if setting.spec is not None:
            plan_layout(tensors_of(orders.elements), setting.spec)
    return max([orders.workers, *(setting.topology.nodes for setting in settings if setting.topology)])


def run_settings(
    settings: Sequence[Setting],
    hosts: Sequence[Host],
    orders: Orders,
    repeats: int,
    say: Say,
    *,
    prepare: Callable[[Setting], None] = lambda _setting: None,
    count_links: Callable[[], list[LinkCount]] = list,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measures every setting `repeats` times, one after the other within a repeat, so that all see the same machine.

    `trace`: file for the timelines of all processes, if there is one setting and one repeat.

    Raises:
        SpecError: there are more, and a trace.
        DatpsError: a measurement failed.
    """
    if trace and len(settings) * repeats > 1:
        runs = f"{len(settings)} settings, {repeats} times"
        raise SpecError(refusal("one setting, run once, for a trace", "runs", runs, "gloo counts too: --no-gloo"))
    samples: list[list[Sample]] = [[] for _ in settings]
    for repeat in range(repeats):
        for number, setting in enumerate(settings):
            say(f"{setting.name}: starting ({repeat * len(settings) + number + 1} of {repeats * len(settings)})")
            prepare(setting)
            samples[number].append(measure(setting, hosts, orders, say, count_links, trace))
    rows = [row_of(setting, each, orders) for setting, each in zip(settings, samples, strict=True)]
    add_gloo_ratios(rows)
    described = [
        {
            "name": setting.name,
            "topology": str(setting.topology) if setting.topology else "ring",
            "rate_bits_per_s": setting.rate_bps,
            "job_spec": setting.spec.model_dump(mode="json") if setting.spec else None,
        }
        for setting in settings
    ]
    return {
        "environment": environment(),
        "orders": {**asdict(orders), "repeats": repeats},
        "settings": described,
        "rows": rows,
    }
