"""The learning rate against its closed form."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import ScheduleSpec
from worker.schedules import Schedule


def test_rate_rises_linearly_then_stays_then_falls_at_the_decay_points() -> None:
    spec = ScheduleSpec(warmup=0.1, decay_at=(0.5, 0.9), decay_factor=0.1)
    schedule = Schedule(spec, learning_rate=0.4, rounds=40)
    rates = [schedule.learning_rate(round_) for round_ in range(40)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert rates[4:20] == pytest.approx([0.4] * 16)
    assert rates[20:36] == pytest.approx([0.04] * 16)
    assert rates[36:] == pytest.approx([0.004] * 4)


@given(
    rounds=st.integers(1, 500),
    warmup=st.floats(0, 0.99),
    decay_at=st.lists(st.floats(0.01, 0.99), max_size=4, unique=True).map(sorted),
    factor=st.floats(0.01, 1),
    data=st.data(),
)
def test_rate_is_the_closed_form_in_every_round(
    rounds: int, warmup: float, decay_at: list[float], factor: float, data: st.DataObject
) -> None:
    spec = ScheduleSpec(warmup=warmup, decay_at=tuple(decay_at), decay_factor=factor)
    round_ = data.draw(st.integers(0, rounds - 1))
    warmup_rounds = round(warmup * rounds)
    passed = sum(round_ >= round(point * rounds) for point in decay_at)
    rise = min(1.0, (round_ + 1) / warmup_rounds) if warmup_rounds else 1.0
    schedule = Schedule(spec, learning_rate=0.03, rounds=rounds)
    assert schedule.learning_rate(round_) == pytest.approx(0.03 * rise * factor**passed, rel=1e-12)


def test_without_warmup_and_decay_the_rate_is_constant() -> None:
    schedule = Schedule(ScheduleSpec(warmup=0, decay_at=()), learning_rate=0.2, rounds=7)
    assert {schedule.learning_rate(round_) for round_ in range(7)} == {0.2}


def test_paper_schedule_decays_at_epochs_20_25_and_28_of_30() -> None:
    spec = ScheduleSpec(epochs=30, decay_at=(20 / 30, 25 / 30, 28 / 30))
    schedule = Schedule(spec, learning_rate=0.4, rounds=30 * 417)
    by_epoch = [schedule.learning_rate(epoch * 417) for epoch in (19, 20, 24, 25, 27, 28)]
    assert by_epoch == pytest.approx([0.4, 0.04, 0.04, 0.004, 0.004, 0.0004])
