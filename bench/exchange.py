"""`datps bench exchange`: real servers and workers on loopback, synthetic gradients, no training; needs no root."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.laboratory import nodes_needed, run_settings
from bench.measure import Orders
from bench.processes import Loopback, Say
from bench.settings import Setting
from bench.signals import signals_unwind


def run_exchange(
    settings: Sequence[Setting], orders: Orders, repeats: int, say: Say, trace: Path | None = None
) -> dict[str, Any]:
    """Runs all settings on this machine; `trace` is that of `run_settings`.

    Raises:
        SpecError: a setting fits no layout.
        DatpsError: a measurement failed.
    """
    nodes = nodes_needed(settings, orders)
    with signals_unwind():
        return run_settings(settings, [Loopback()] * nodes, orders, repeats, say, trace=trace)
