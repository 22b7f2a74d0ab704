"""Batches of labeled and pseudo-labeled samples: how many of each, which, and in what order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, hypergeom

from common.config import Split
from common.errors import DataError
from worker.data import BatchPlan


def mixed(
    labeled: int,
    unlabeled: int,
    *,
    workers: int = 2,
    batch: int = 8,
    per_batch: int = 4,
    seed: int = 0,
    own: bool = False,
) -> BatchPlan:
    return BatchPlan(
        samples_by_worker=(labeled,) * workers,
        split=Split.OWN if own else Split.SHARED,
        batch_per_worker=batch,
        seed=seed,
        workers=workers,
        unlabeled=unlabeled,
        unlabeled_per_batch=per_batch,
    )


@settings(max_examples=60, deadline=None)
@given(
    workers=st.integers(1, 4),
    batch=st.integers(2, 9),
    data=st.data(),
    extra=st.integers(0, 40),
    unlabeled=st.integers(1, 60),
    own=st.booleans(),
)
def test_every_batch_has_exactly_its_number_of_unlabeled_samples(
    workers: int, batch: int, data: st.DataObject, extra: int, unlabeled: int, own: bool
) -> None:
    per_batch = data.draw(st.integers(1, batch - 1))
    labeled = workers * (batch - per_batch) + extra
    plan = mixed(labeled, unlabeled, workers=workers, batch=batch, per_batch=per_batch, own=own)
    for round_ in range(7):
        for worker in range(workers):
            indices = plan.indices(round_, worker)
            assert len(indices) == batch
            assert int((indices >= labeled).sum()) == per_batch
            assert 0 <= int(indices.min()) <= int(indices.max()) < labeled + unlabeled


@settings(max_examples=40, deadline=None)
@given(workers=st.integers(1, 4), rounds=st.integers(1, 5), rest=st.integers(0, 5), unlabeled=st.integers(1, 50))
def test_an_epoch_divides_the_labeled_samples_among_rounds_and_workers(
    workers: int, rounds: int, rest: int, unlabeled: int
) -> None:
    per_round = workers * 3
    labeled = rounds * per_round + min(rest, per_round - 1)
    plan = mixed(labeled, unlabeled, workers=workers, batch=5, per_batch=2)
    assert plan.rounds_per_epoch == rounds
    for epoch in range(2):
        drawn = Counter(
            index
            for round_ in range(epoch * rounds, (epoch + 1) * rounds)
            for worker in range(workers)
            for index in plan.indices(round_, worker).tolist()
            if index < labeled
        )
        assert set(drawn.values()) == {1}
        assert len(drawn) == rounds * per_round


def test_unlabeled_samples_are_passed_over_evenly_and_divided_among_the_workers() -> None:
    plan = mixed(labeled=64, unlabeled=24, workers=2, batch=8, per_batch=4)  # 8 a round: 3 rounds are a pass
    for cycle in range(3):
        drawn: Counter[int] = Counter()
        for round_ in range(3 * cycle, 3 * cycle + 3):
            for worker in range(2):
                drawn.update(index for index in plan.indices(round_, worker).tolist() if index >= 64)
        assert drawn == {64 + sample: 1 for sample in range(24)}


def test_with_data_of_their_own_workers_pass_over_their_own_unlabeled_samples() -> None:
    plan = mixed(labeled=40, unlabeled=12, workers=2, batch=8, per_batch=4, own=True)
    for worker in range(2):
        drawn = Counter(i for round_ in range(3) for i in plan.indices(round_, worker).tolist() if i >= 40)
        assert drawn == {40 + sample: 1 for sample in range(12)}


def test_labeled_and_unlabeled_draws_have_streams_of_their_own() -> None:
    """The labeled samples come in the order of a plan without unlabeled ones, and the other way round."""
    with_few, with_many = (mixed(labeled=32, unlabeled=count) for count in (9, 50))
    plain = BatchPlan(samples_by_worker=(32, 32), split=Split.SHARED, batch_per_worker=4, seed=0, workers=2)
    for round_ in range(6):
        for worker in range(2):
            kept = [{i for i in plan.indices(round_, worker).tolist() if i < 32} for plan in (with_few, with_many)]
            assert kept[0] == kept[1] == set(plain.indices(round_, worker).tolist())


def test_any_round_is_drawn_without_replay_and_another_seed_draws_others() -> None:
    forward = {round_: mixed(64, 100).indices(round_, 1).tolist() for round_ in range(20)}
    plan = mixed(64, 100)
    plan.indices(7, 1).zero_()
    assert {round_: plan.indices(round_, 1).tolist() for round_ in reversed(range(20))} == forward
    assert mixed(64, 100, seed=1).indices(0, 1).tolist() != forward[0]


@pytest.mark.parametrize("devices", [2, 4])
def test_every_part_of_a_batch_holds_both_kinds_as_if_drawn_by_lot(devices: int) -> None:
    """Which part a sample goes to is independent of its kind: counts of a part are hypergeometric."""
    batch, unlabeled = 16, 8
    plan = mixed(labeled=160, unlabeled=500, workers=2, batch=batch, per_batch=unlabeled)
    cuts = [batch * part // devices for part in range(devices + 1)]
    for part in range(devices):
        counts: Counter[int] = Counter()
        for round_ in range(600):
            own = plan.indices(round_, 1)[cuts[part] : cuts[part + 1]]
            counts[int((own >= 160).sum())] += 1
        size = cuts[part + 1] - cuts[part]
        expected = [600 * hypergeom.pmf(count, batch, unlabeled, size) for count in range(size + 1)]
        likely = [count for count in range(size + 1) if expected[count] >= 5]
        seen = torch.tensor([counts[count] for count in likely]).double()
        share = torch.tensor([expected[count] for count in likely]).double()
        assert chisquare(seen, share * seen.sum() / share.sum()).pvalue > 1e-4


def test_a_plan_without_enough_labeled_or_without_unlabeled_samples_is_refused() -> None:
    with pytest.raises(DataError, match=r"at least 8 labeled samples, for one round, got samples=7"):
        mixed(labeled=7, unlabeled=100)
    with pytest.raises(DataError, match=r"at least one unlabeled sample, got unlabeled=0"):
        mixed(labeled=100, unlabeled=0)
