"""`datps bench network`: our topologies and gloo on the same shaped links, in the same run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.goodput import STREAM_S
from bench.laboratory import nodes_needed, run_settings
from bench.links import CONGESTION_CONTROL, Links, refuse_where_impossible, shaped_links
from bench.measure import Orders
from bench.processes import Crew, Host, Loopback, Say
from bench.settings import Setting, rate_text
from bench.signals import signals_unwind

_GOODPUT_DEADLINE_S = 30.0


def run_network(
    settings: Sequence[Setting], orders: Orders, repeats: int, say: Say, trace: Path | None = None
) -> dict[str, Any]:
    """Makes nodes and links, checks what a link carries at each rate, runs all settings, removes the nodes.

    `trace` is that of `run_settings`.

    Raises:
        SpecError: this machine or user cannot make the links, or a setting fits no layout.
        DatpsError: a measurement failed.
    """
    refuse_where_impossible()
    nodes = nodes_needed(settings, orders)
    with signals_unwind():
        say(f"making {nodes} nodes on one switch")
        with shaped_links(nodes) as links:
            rates_bps = dict.fromkeys(setting.rate_bps for setting in settings if setting.rate_bps is not None)
            checked = [_check_link(links, rate_bps, say) for rate_bps in rates_bps]

            def prepare(setting: Setting) -> None:
                if setting.rate_bps is not None:
                    links.shape(setting.rate_bps)

            result = run_settings(
                settings, links.nodes, orders, repeats, say, prepare=prepare, count_links=links.count, trace=trace
            )
    result["environment"] |= {"tcp_congestion_control": CONGESTION_CONTROL, "link_goodput": checked}
    return result


@contextmanager
def hosts_at_rate(nodes: int, rate_bps: int | None, say: Say) -> Iterator[tuple[Sequence[Host], list[dict[str, Any]]]]:
    """So many hosts with links of one rate, and what a link carries; None: all of them are this machine.

    Raises:
        SpecError: this machine or user cannot make the links.
    """
    with signals_unwind():
        if rate_bps is None:
            yield [Loopback()] * nodes, []
            return
        refuse_where_impossible()
        say(f"making {nodes} nodes on one switch")
        with shaped_links(nodes) as links:
            checked = [_check_link(links, rate_bps, say)] if nodes > 1 else []
            links.shape(rate_bps)
            yield links.nodes, checked


def _check_link(links: Links, rate_bps: int, say: Say) -> dict[str, Any]:
    """What one link carries, from node 0 to node 1."""
    links.shape(rate_bps)
    sender, receiver = links.nodes[:2]
    end = [sys.executable, "-m", "bench.goodput"]
    with TemporaryDirectory(prefix="datps-bench-") as logs, Crew(Path(logs), say) as crew:
        crew.start("receiver", receiver.command([*end, "receive", receiver.address]))
        port = crew.collect("listening", ["receiver"], _GOODPUT_DEADLINE_S, "the address")["receiver"]["port"]
        crew.start("sender", sender.command([*end, "send", receiver.address, str(port)]))
        heard = crew.collect("goodput", ["receiver"], _GOODPUT_DEADLINE_S + STREAM_S, "the goodput")["receiver"]
        crew.join(_GOODPUT_DEADLINE_S)
    goodput = heard["bits_per_s"]
    say(f"a link of {rate_text(rate_bps)} carries {goodput / 1e6:.1f} Mbit/s of payload, one TCP stream")
    if not 0.85 <= goodput / rate_bps <= 1.0:
        say(f"the shaper is off: expected 85 to 100 % of {rate_text(rate_bps)}; is the machine busy?")
    return {"rate_bits_per_s": rate_bps, "goodput_bits_per_s": round(goodput)}
