"""What a run gives: one tidy dictionary for programs, one table for people."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.limits import FLOAT32_BYTES, NodeBytes, limit_s, node_bytes, ring_bytes, shard_bytes
from bench.measure import Orders, Sample
from bench.settings import Setting, Topology, TopologyKind, rate_text
from bench.tensors import elements_of, tensors_of
from common.config import JobSpec
from common.layout import BucketKind, Layout, bucket_bytes_of, plan_layout, push_codec

_PACKAGES = ("datps", "numpy", "grpcio", "protobuf", "torch")
_LEGEND = (
    "limit: payload of the busiest node (MB out, in) at the link's rate. gloo x: its median over this one's.\n"
    "worker s, server s: CPU time of each. cores: how busy this machine's were; near 100 % they are the limit.\n"
    "server MB: memory above idle, of the largest server; x shard: over its shard in float32."
)
_CONGESTION = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def environment() -> dict[str, Any]:
    """What the numbers depend on beside the settings."""
    return {
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in _PACKAGES},
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": _cores(),
        "tcp_congestion_control": _CONGESTION.read_text().strip() if _CONGESTION.exists() else None,
    }


def row_of(setting: Setting, samples: Sequence[Sample], orders: Orders) -> dict[str, Any]:
    """Everything about one setting over its repeats, units in the names.

    Bytes are payload per round unless they are of links, which are counted with all headers.
    """
    seconds = [second for sample in samples for second in sample.seconds]
    if setting.topology is not None and setting.spec is not None:
        nodes, told = _ours(setting.topology, setting.spec, samples, orders)
    else:
        nodes, told = ring_bytes(orders.workers, elements_of(orders.elements)), {}
    limit = None if setting.rate_bps is None else limit_s(nodes, setting.rate_bps)
    median = statistics.median(seconds)
    return {
        "name": setting.name,
        "exchange": "ours" if setting.topology else "gloo",
        "topology": str(setting.topology) if setting.topology else "ring",
        "codec": setting.codec or "32",
        "rate_bits_per_s": setting.rate_bps,
        "workers": orders.workers,
        "shards": setting.topology.shards if setting.topology else 0,
        "elements": elements_of(orders.elements),
        "rounds_s": [round(second, 6) for second in seconds],
        "median_s": median,
        "min_s": min(seconds),
        "payload_sent_bytes_per_node": [node.sent for node in nodes],
        "payload_received_bytes_per_node": [node.received for node in nodes],
        "limit_s": limit,
        "ratio_to_limit": None if limit is None else median / limit,
        **_worker_costs(samples),
        **told,
        "machine_cpu_fraction": _machine_cpu_fraction(samples),
        **_link_costs(samples, orders),
    }


def _ours(
    topology: Topology, spec: JobSpec, samples: Sequence[Sample], orders: Orders
) -> tuple[list[NodeBytes], dict[str, Any]]:
    layout = plan_layout(tensors_of(orders.elements), spec)
    first = samples[0].rounds[0][0]
    nodes = node_bytes(topology, layout, spec)
    told = {
        "codec_wire_name": push_codec(layout, spec).wire_name,
        "bucket_bytes": bucket_bytes_of(spec.exchange),
        "buckets": len(layout.buckets),
        "pushed_message_bytes_per_worker": first["pushed_bytes"],
        "pulled_message_bytes_per_worker": first["pulled_bytes"],
    }
    if topology.kind is TopologyKind.COLLECTIVE:
        return nodes, told
    shards = shard_bytes(layout, spec)
    told |= {
        "pushed_bytes_per_worker": sum(shard.pushed for shard in shards),
        "pulled_bytes_per_worker": sum(shard.pulled for shard in shards),
    }
    return nodes, told | _server_costs(topology, layout, samples, orders)


def _server_costs(topology: Topology, layout: Layout, samples: Sequence[Sample], orders: Orders) -> dict[str, Any]:
    idle = [[count.rss_bytes for count in sample.idle] for sample in samples]
    peak = [[count.peak_rss_bytes for count in sample.after] for sample in samples]
    shard_float32 = [
        FLOAT32_BYTES * sum(b.n for b in layout.of_shard(shard) if b.kind is BucketKind.GRADIENT)
        for shard in range(topology.shards)
    ]
    ratios = [
        (p - i) / size
        for idles, peaks in zip(idle, peak, strict=True)
        for i, p, size in zip(idles, peaks, shard_float32, strict=True)
    ]
    cpu_s = [
        sum(a.cpu_s - b.cpu_s for a, b in zip(sample.after, sample.before, strict=True))
        / (orders.rounds * topology.shards)
        for sample in samples
    ]
    return {
        "server_cpu_s": statistics.mean(cpu_s),
        "server_rss_idle_bytes": max(max(each) for each in idle),
        "server_rss_peak_bytes": max(max(each) for each in peak),
        "server_shard_float32_bytes": max(shard_float32),
        "server_memory_ratio": max(ratios),
    }


def _worker_costs(samples: Sequence[Sample]) -> dict[str, Any]:
    events = [event for sample in samples for round_ in sample.rounds for event in round_]
    return {
        "worker_cpu_s": statistics.mean(e["user_s"] + e["system_s"] for e in events),
        "worker_user_s": statistics.mean(e["user_s"] for e in events),
        "worker_system_s": statistics.mean(e["system_s"] for e in events),
        "worker_rss_peak_bytes": max(e["peak_rss_bytes"] for sample in samples for e in sample.done),
        "digest": events[-1]["digest"],
    }


def _machine_cpu_fraction(samples: Sequence[Sample]) -> float:
    """CPU time of our processes over what the cores had to give during the rounds; near 1 the machine is the limit.

    On one machine the nodes share the cores; real nodes have their own.
    """
    used_s = 0.0
    for sample in samples:
        used_s += sum(e["user_s"] + e["system_s"] for events in sample.rounds for e in events)
        used_s += sum(a.cpu_s - b.cpu_s for b, a in zip(sample.before, sample.after, strict=True))
    return used_s / (_cores() * sum(second for sample in samples for second in sample.seconds))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _link_costs(samples: Sequence[Sample], orders: Orders) -> dict[str, Any]:
    if not samples[0].links_after:
        return {}
    pairs = [
        list(zip(sample.links_before, sample.links_after, strict=True)) for sample in samples if sample.links_after
    ]
    rounds, nodes = orders.rounds * len(pairs), range(len(pairs[0]))
    return {
        "link_sent_bytes_per_node": [
            round(sum(p[n][1].sent_bytes - p[n][0].sent_bytes for p in pairs) / rounds) for n in nodes
        ],
        "link_received_bytes_per_node": [
            round(sum(p[n][1].received_bytes - p[n][0].received_bytes for p in pairs) / rounds) for n in nodes
        ],
        "link_dropped_packets": sum(a.dropped_packets - b.dropped_packets for pair in pairs for b, a in pair),
    }


def add_gloo_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds `gloo_over_this`, the median of gloo at the same rate over the row's own."""
    gloo = {row["rate_bits_per_s"]: row["median_s"] for row in rows if row["exchange"] == "gloo"}
    for row in rows:
        yardstick = gloo.get(row["rate_bits_per_s"])
        row["gloo_over_this"] = None if yardstick is None else yardstick / row["median_s"]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """Times beside the limit, then what they cost."""
    times = table("a round: seconds", "median", "min", "limit", "x limit", "gloo x", "MB out", "MB in")
    costs = table("a round: costs", "worker s", "server s", "cores", "server MB", "x shard")
    for row in result["rows"]:
        times.add_row(
            row["name"],
            f"{row['median_s']:.3f}",
            f"{row['min_s']:.3f}",
            _number(row["limit_s"], ".3f"),
            _number(row["ratio_to_limit"], ".2f"),
            _number(row["gloo_over_this"], ".2f"),
            f"{max(row['payload_sent_bytes_per_node']) / 1e6:.1f}",
            f"{max(row['payload_received_bytes_per_node']) / 1e6:.1f}",
        )
        above_bytes = row.get("server_rss_peak_bytes", 0) - row.get("server_rss_idle_bytes", 0)
        costs.add_row(
            row["name"],
            f"{row['worker_cpu_s']:.3f}",
            _number(row.get("server_cpu_s"), ".3f"),
            f"{100 * row['machine_cpu_fraction']:.0f} %",
            f"{above_bytes / 1e6:.1f}" if row["shards"] else "",
            _number(row.get("server_memory_ratio"), ".2f"),
        )
    console.print(times)
    console.print(costs)
    console.print(_LEGEND, style="bright_black", highlight=False)
    for link in result["environment"].get("link_goodput", []):
        share = link["goodput_bits_per_s"] / link["rate_bits_per_s"]
        console.print(f"A link of {rate_text(link['rate_bits_per_s'])}: {100 * share:.1f} % goodput, one TCP stream.")


def table(first: str, *others: str) -> Table:
    """An empty table in the house's style: one column of names, others of numbers."""
    empty = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    empty.add_column(first, no_wrap=True)
    for name in others:
        empty.add_column(name, justify="right")
    return empty


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
