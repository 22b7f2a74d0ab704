"""From what processes say to the figures of overlap and throughput."""

from __future__ import annotations

import pytest

from bench.overlap import Cycle
from bench.overlap import row_of as overlap_row
from bench.throughput import row_of as throughput_row


def cycle(exchange_s: float, backward_s: float, waited_s: float, both_s: float) -> Cycle:
    """A cycle of two workers, the second of which takes no time."""
    fast = {"exchange_s": 0.0, "backward_s": 0.0, "waited_s": 0.0, "both_s": 0.0}
    both = {"backward_s": both_s - waited_s, "waited_s": waited_s, "both_s": both_s}
    return Cycle(
        events={
            "exchange": [{"exchange_s": exchange_s}, fast],
            "backward": [{"backward_s": backward_s}, fast],
            "both": [both, fast],
        }
    )


def test_hidden_is_what_needs_not_be_waited_for() -> None:
    row = overlap_row([cycle(1.0, 3.0, 0.25, 3.5)] * 3)
    assert row["hidden_fraction"] == 0.75
    assert row["hidden_end_to_end_fraction"] == 0.5
    assert (row["exchange_s"], row["backward_s"], row["waited_s"]) == (1.0, 3.0, 0.25)


def test_median_cycle_counts_and_the_range_is_told() -> None:
    row = overlap_row([cycle(1.0, 3.0, waited_s, 3.5) for waited_s in (0.1, 0.2, 0.9)])
    assert row["hidden_fraction"] == pytest.approx(0.8)
    assert row["hidden_fraction_smallest"] == pytest.approx(0.1)
    assert row["hidden_fraction_largest"] == pytest.approx(0.9)
    assert len(row["cycles"]) == 3


def test_throughput_is_compared_by_median_block_by_total_and_by_pair() -> None:
    seconds = {"ours": [1.0, 2.0, 1.0], "plain": [1.0, 1.0, 0.5]}
    events = [
        {"kind": kind, "seconds": second, "waited_s": 0.25 * (kind == "ours")}
        for pair in zip(*seconds.values(), strict=True)
        for kind, second in zip(seconds, pair, strict=True)
    ]
    row = throughput_row(events, samples=100)
    assert row["throughput_ratio"] == 1.0
    assert row["throughput_ratio_of_totals"] == 2.5 / 4
    assert (row["throughput_ratio_smallest"], row["throughput_ratio_largest"]) == (0.5, 1.0)
    assert (row["samples_per_s"], row["plain_samples_per_s"]) == (100.0, 100.0)
    assert row["waited_fraction"] == 0.75 / 4
