"""The learning rate against its closed form, and against PyTorch's schedules."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import ScheduleName, ScheduleSpec
from common.errors import SpecError
from common.spec_sources import load_job_spec
from worker.schedules import Schedule, cosine_of_half_turns


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


def rates_of(rounds: int, **settings: object) -> list[float]:
    """The rates of all rounds and of the one after the last, with eta_1 = 0.2."""
    schedule = Schedule(ScheduleSpec.model_validate(settings), learning_rate=0.2, rounds=rounds)
    return [schedule.learning_rate(round_) for round_ in range(rounds + 1)]


def rates_of_pytorch(rounds: int, name: str) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.2)
    if name == "cyclic":  # as Fast AT builds it
        schedule: torch.optim.lr_scheduler.LRScheduler = torch.optim.lr_scheduler.CyclicLR(
            optimizer, base_lr=0, max_lr=0.2, step_size_up=rounds / 2, step_size_down=rounds / 2, cycle_momentum=False
        )
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=rounds)
    rates = []
    for _ in range(rounds + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# Cosine


def test_cosine_begins_at_the_full_rate_is_half_of_it_in_the_middle_and_would_be_0_after_the_last_round() -> None:
    rates = rates_of(40, name="cosine")
    assert (rates[0], rates[20], rates[40]) == (0.2, 0.1, 0.0)
    assert rates[10] == pytest.approx(0.1 * (1 + math.sqrt(0.5)), rel=1e-15)
    assert all(before > after for before, after in itertools.pairwise(rates))


def test_cosine_is_that_of_pytorch() -> None:
    assert rates_of(40, name="cosine") == pytest.approx(rates_of_pytorch(40, "cosine"), rel=1e-12, abs=1e-16)


def test_cosine_follows_its_warm_up() -> None:
    rates = rates_of(50, name="cosine", warmup=0.2)
    assert rates[:10] == [0.2 * ((round_ + 1) / 10) for round_ in range(10)]
    assert (rates[9], rates[10], rates[30], rates[50]) == (0.2, 0.2, 0.1, 0.0)
    assert rates[10:] == rates_of(40, name="cosine")


@given(st.integers(1, 10**7), st.data())
def test_our_cosine_is_that_of_the_c_library_but_for_its_last_bits(denominator: int, data: st.DataObject) -> None:
    numerator = data.draw(st.integers(0, denominator))
    assert abs(cosine_of_half_turns(numerator, denominator) - math.cos(math.pi * numerator / denominator)) < 1e-15
    assert cosine_of_half_turns(denominator - numerator, denominator) == -cosine_of_half_turns(numerator, denominator)


# Cyclic


def test_cyclic_rises_from_0_to_the_full_rate_in_the_middle_and_falls_to_0_after_the_last_round() -> None:
    rates = rates_of(40, name="cyclic")
    assert (rates[0], rates[10], rates[20], rates[30], rates[40]) == (0.0, 0.1, 0.2, 0.1, 0.0)
    assert rates[39] == pytest.approx(0.2 / 20, rel=1e-15)


@pytest.mark.parametrize("rounds", [4, 40])
def test_cyclic_is_that_of_fast_at(rounds: int) -> None:
    assert rates_of(rounds, name="cyclic") == pytest.approx(rates_of_pytorch(rounds, "cyclic"), rel=1e-12, abs=1e-15)


def test_the_peak_of_cyclic_can_be_anywhere() -> None:
    rates = rates_of(50, name="cyclic", peak_at=0.2)
    assert (rates[0], rates[5], rates[10], rates[30], rates[50]) == (0.0, 0.1, 0.2, 0.1, 0.0)


@pytest.mark.parametrize("name", list(ScheduleName))
def test_a_training_of_one_round_has_the_full_rate(name: ScheduleName) -> None:
    assert rates_of(1, name=name, decay_at=[], peak_at=0.9)[0] == 0.2


def test_cyclic_with_a_warm_up_is_refused() -> None:
    with pytest.raises(SpecError, match=r"expected warmup=0 \(schedule cyclic\), got warmup=0.1"):
        load_job_spec(settings=["schedule.name=cyclic", "schedule.warmup=0.1"])


# The linear scaling rule


def test_the_rate_of_base_batch_samples_is_scaled_to_those_of_a_round() -> None:
    job = ("workers=8", "data.batch_per_worker=256", "optimizer.name=sgd", "optimizer.learning_rate=0.1")
    assert load_job_spec(settings=[*job, "optimizer.base_batch=256"]).peak_learning_rate == 0.8
    assert load_job_spec(settings=[*job, "optimizer.base_batch=8192"]).peak_learning_rate == 0.025
    assert load_job_spec(settings=job).peak_learning_rate == 0.1


def test_warm_up_rises_from_the_unscaled_rate_to_the_scaled_one() -> None:
    """Goyal et al. 2017: from eta to k eta by a constant amount each round; here k = 8 over 7 rounds."""
    settings = ["workers=8", "data.batch_per_worker=256", "optimizer.learning_rate=0.1", "optimizer.base_batch=256"]
    spec = load_job_spec(settings=[*settings, "schedule.warmup=0.1", "schedule.decay_at=[0.5]"])
    schedule = Schedule.of_job(spec, 70)
    rates = [schedule.learning_rate(round_) for round_ in range(70)]
    assert rates[:7] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], rel=1e-15)
    assert rates[6:35] == [0.8] * 29
    assert rates[35:] == pytest.approx([0.08] * 35, rel=1e-15)


def test_a_scaled_rate_below_the_unscaled_one_needs_no_rise() -> None:
    settings = ["workers=1", "data.batch_per_worker=64", "optimizer.learning_rate=0.1", "optimizer.base_batch=256"]
    schedule = Schedule.of_job(load_job_spec(settings=[*settings, "schedule.warmup=0.5"]), 10)
    assert [schedule.learning_rate(round_) for round_ in range(6)] == pytest.approx([0.025] * 6, rel=1e-15)
