"""Which samples a worker draws, random streams, and augmentation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from common.config import Split
from common.errors import DataError
from tests.method.support import generator
from worker.data import BatchPlan, TensorSamples, augment
from worker.randomness import Purpose, round_generator, stream_seed


def shared(samples: int, workers: int, batch: int, seed: int = 0) -> BatchPlan:
    return BatchPlan(
        samples_by_worker=(samples,) * workers,
        split=Split.SHARED,
        batch_per_worker=batch,
        seed=seed,
        workers=workers,
    )


def own(samples: tuple[int, ...], batch: int, seed: int = 0) -> BatchPlan:
    return BatchPlan(
        samples_by_worker=samples, split=Split.OWN, batch_per_worker=batch, seed=seed, workers=len(samples)
    )


def drawn(plan: BatchPlan, rounds: range) -> list[int]:
    """Everything that all workers draw, in order of round and worker."""
    return [i for round_ in rounds for worker in range(plan.workers) for i in plan.indices(round_, worker).tolist()]


# The shared split


@settings(max_examples=60, deadline=None)
@given(workers=st.integers(1, 5), batch=st.integers(1, 7), extra=st.integers(0, 80), seed=st.integers(0, 99))
def test_batches_of_an_epoch_are_disjoint_and_cover_all_but_the_leftover(
    workers: int, batch: int, extra: int, seed: int
) -> None:
    samples = workers * batch + extra
    plan = shared(samples, workers, batch, seed)
    for epoch in range(2):
        indices = drawn(plan, range(epoch * plan.rounds_per_epoch, (epoch + 1) * plan.rounds_per_epoch))
        assert len(indices) == samples - samples % (workers * batch)
        assert len(set(indices)) == len(indices)
        assert set(indices) <= set(range(samples))


def test_leftover_of_an_epoch_gets_its_turn_in_others() -> None:
    plan = shared(11, 2, 2)
    assert plan.rounds_per_epoch == 2
    left_out = [set(range(11)) - set(drawn(plan, range(2 * epoch, 2 * epoch + 2))) for epoch in range(12)]
    assert all(len(samples) == 3 for samples in left_out)
    assert set.intersection(*left_out) == set()


def test_digits_of_four_workers_take_five_rounds_an_epoch() -> None:
    assert shared(1437, 4, 64).rounds_per_epoch == 5


def test_any_round_is_drawn_without_replay_and_does_not_change_what_was_drawn() -> None:
    plan = shared(100, 3, 5)
    forward = {round_: plan.indices(round_, 1).tolist() for round_ in range(40)}
    plan.indices(7, 1).zero_()
    assert plan.indices(7, 1).tolist() == forward[7]
    fresh = shared(100, 3, 5)
    assert {round_: fresh.indices(round_, 1).tolist() for round_ in reversed(range(40))} == forward


def test_another_seed_or_epoch_shuffles_differently() -> None:
    plan = shared(100, 1, 100)
    orders = [plan.indices(0, 0).tolist(), plan.indices(1, 0).tolist(), shared(100, 1, 100, 1).indices(0, 0).tolist()]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


# The split into own samples


@settings(max_examples=60, deadline=None)
@given(samples=st.lists(st.integers(1, 20), min_size=1, max_size=4), batch=st.integers(1, 25))
def test_every_worker_cycles_through_all_its_own_samples(samples: list[int], batch: int) -> None:
    plan = own(tuple(samples), batch)
    for worker, count in enumerate(samples):
        rounds = -(-2 * count // batch)
        sequence = [i for round_ in range(rounds) for i in plan.indices(round_, worker).tolist()]
        assert len(sequence) == rounds * batch
        assert sorted(sequence[:count]) == sorted(sequence[count : 2 * count]) == list(range(count))


def test_epoch_of_own_samples_is_as_long_as_all_samples_together() -> None:
    assert own((100, 50, 10), 10).rounds_per_epoch == 5
    assert own((3, 2), 10).rounds_per_epoch == 1


def test_workers_of_equal_size_shuffle_differently() -> None:
    plan = own((50, 50), 50)
    assert plan.indices(0, 0).tolist() != plan.indices(0, 1).tolist()


# Refusals


def test_fewer_samples_than_one_round_needs_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected at least 12 samples, .* got samples=11 \(workers=4, batch_per"):
        shared(11, 4, 3)
    assert shared(12, 4, 3).rounds_per_epoch == 1


def test_data_sets_of_different_size_are_refused_where_they_should_be_one() -> None:
    with pytest.raises(DataError, match=r"expected the same data set on each worker, got samples_by_worker=\(8, 9\)"):
        BatchPlan(samples_by_worker=(8, 9), split=Split.SHARED, batch_per_worker=1, seed=0, workers=2)


def test_worker_without_samples_and_a_missing_count_are_refused() -> None:
    with pytest.raises(DataError, match=r"expected at least one sample on each worker, got samples_by_worker=\(8, 0\)"):
        own((8, 0), 1)
    with pytest.raises(DataError, match=r"expected one count for each of 2 workers"):
        BatchPlan(samples_by_worker=(8,), split=Split.OWN, batch_per_worker=1, seed=0, workers=2)


# Random streams


def test_streams_differ_in_each_of_their_keys_and_are_stable() -> None:
    keys = [
        (seed, round_, worker, purpose)
        for seed in (0, 1)
        for round_ in (0, 1, 11)
        for worker in (0, 1, 11)
        for purpose in (Purpose.ATTACK, Purpose.AUGMENTATION)
    ]
    draws = [round_generator(*key).initial_seed() for key in keys]
    assert len(set(draws)) == len(keys)
    assert stream_seed(0, Purpose.ATTACK, 1, 11) != stream_seed(0, Purpose.ATTACK, 11, 1)
    assert stream_seed(0, Purpose.ATTACK, 3, 2) == 8138427721730513872, "runs of older versions must be reproducible"


# Samples and augmentation


def test_samples_are_scaled_to_the_unit_interval_and_are_the_caller_s() -> None:
    pixels = torch.tensor([0, 8, 16, 4], dtype=torch.uint8).view(2, 1, 1, 2)
    samples = TensorSamples(pixels, torch.tensor([3, 1], dtype=torch.int32), maximum=16)
    images = samples.images(torch.tensor([1, 0]))
    assert images.flatten().tolist() == [1.0, 0.25, 0.0, 0.5]
    assert images.dtype is torch.float32
    assert samples.labels.dtype is torch.int64
    images.zero_()
    assert samples.images(torch.tensor([1])).flatten().tolist() == [1.0, 0.25]


def crops_of(image: Tensor) -> list[Tensor]:
    """All 162 results that augmentation may have."""
    padded = torch.nn.functional.pad(image, [4, 4, 4, 4])
    height, width = image.shape[-2:]
    crops = [padded[:, y : y + height, x : x + width] for y in range(9) for x in range(9)]
    return crops + [crop.flip(-1) for crop in crops]


def test_augmented_image_is_a_padded_crop_perhaps_flipped_each_on_its_own() -> None:
    images = torch.rand(1, 3, 6, 8, generator=generator()).expand(400, -1, -1, -1)
    copy = images.clone()
    augmented = augment(images, generator(1))
    assert torch.equal(images, copy)
    crops = torch.stack(crops_of(images[0]))
    distances = (augmented[:, None] - crops[None]).abs().flatten(2).amax(2)
    assert bool((distances.amin(1) == 0).all())
    which = distances.argmin(1)
    assert len(which.unique()) > 130, "400 draws of 162"
    assert 150 < int((which >= 81).sum()) < 250, "half of them are flipped"


def test_augmentation_is_a_function_of_its_generator() -> None:
    images = torch.rand(8, 3, 6, 6, generator=generator())
    assert torch.equal(augment(images, generator(1)), augment(images, generator(1)))
    assert not torch.equal(augment(images, generator(1)), augment(images, generator(2)))
