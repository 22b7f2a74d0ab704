"""Some classes of a data set, some labels of it, and two sets of samples as one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import DataSpec
from common.errors import DataError, SpecError
from worker.data import Dataset, TensorSamples
from worker.datasets import load_dataset, load_held_back
from worker.subsets import Joined, Subset, balanced_order, of_classes


def spec(**keys: object) -> DataSpec:
    return DataSpec.model_validate(keys)


def bare_order(labels: list[int], order: list[int]) -> list[int]:
    """How many of each class every beginning holds, counted without tensors."""
    counts = dict.fromkeys(sorted(set(labels)), 0)
    spreads = []
    for index in order:
        counts[labels[index]] += 1
        open_classes = [c for c in counts if counts[c] < labels.count(c)]
        spreads.append(max(counts.values()) - min((counts[c] for c in open_classes), default=max(counts.values())))
    return spreads


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_every_beginning_of_the_order_is_as_even_over_the_classes_as_can_be(labels: list[int], seed: int) -> None:
    order = balanced_order(torch.tensor(labels), seed).tolist()
    assert sorted(order) == list(range(len(labels)))
    assert max(bare_order(labels, order)) <= 1


def test_labels_are_kept_evenly_and_the_rest_is_held_back(digits: Dataset) -> None:
    kept = load_dataset(spec(labeled=100), root=None)
    held_back = load_held_back(spec(labeled=100), root=None)

    assert torch.bincount(kept.train.labels).tolist() == [10] * 10
    assert len(held_back.labels) == 1437 - 100
    everything = torch.cat([kept.train.images(torch.arange(100)), held_back.images(torch.arange(1337))])
    labels = torch.cat([kept.train.labels, held_back.labels])
    whole = digits.train.images(torch.arange(1437))
    ours, theirs = (
        sorted(zip(x.flatten(1).tolist(), y.tolist(), strict=True))
        for x, y in ((everything, labels), (whole, digits.train.labels))
    )
    assert ours == theirs
    assert torch.equal(kept.test.labels, digits.test.labels)


def test_validation_samples_are_neither_labeled_nor_held_back(digits: Dataset) -> None:
    wanted = spec(labeled=100, validation=37)
    dataset, held_back = load_dataset(wanted, root=None), load_held_back(wanted, root=None)
    assert dataset.validation is not None
    parts = (dataset.train, held_back, dataset.validation)
    assert [len(part.labels) for part in parts] == [100, 1300, 37]
    everything = torch.cat([part.images(torch.arange(len(part.labels))) for part in parts])
    whole = digits.train.images(torch.arange(1437))
    assert sorted(everything.flatten(1).tolist()) == sorted(whole.flatten(1).tolist())


def test_more_labels_include_the_fewer_and_another_seed_chooses_others() -> None:
    def chosen(**keys: object) -> set[tuple[float, ...]]:
        train = load_dataset(spec(**keys), root=None).train
        return {tuple(image) for image in train.images(torch.arange(len(train.labels))).flatten(1).tolist()}

    assert chosen(labeled=50) < chosen(labeled=200)
    assert chosen(labeled=50) == chosen(labeled=50)
    assert len(chosen(labeled=50) & chosen(labeled=50, labeled_seed=1)) < 25


@pytest.mark.parametrize(("labeled", "count"), [(1, 1), (7, 7), (0.5, 719), (0.1, 144), (1436, 1436)])
def test_labels_are_kept_by_number_or_by_fraction(labeled: int | float, count: int) -> None:
    assert len(load_dataset(spec(labeled=labeled), root=None).train.labels) == count


@pytest.mark.parametrize("labeled", [1437, 5000, 1e-5])
def test_a_choice_that_leaves_nothing_on_one_side_is_refused(labeled: float) -> None:
    with pytest.raises(SpecError, match=r"fewer than all 1437 training images .* got data.labeled="):
        load_dataset(spec(labeled=labeled), root=None)


def test_nothing_is_held_back_of_a_data_set_with_all_its_labels() -> None:
    with pytest.raises(SpecError, match=r"expected data.labeled, .* got data.labeled=None \(no labels are held back"):
        load_held_back(spec(), root=None)


def test_classes_that_are_kept_are_numbered_anew_in_the_order_of_the_data_set(digits: Dataset) -> None:
    subset = load_dataset(spec(classes=[9, 5, 7]), root=None)

    assert subset.classes == ("5", "7", "9")
    for ours, theirs in ((subset.train, digits.train), (subset.test, digits.test)):
        chosen = [index for index, label in enumerate(theirs.labels.tolist()) if label in (5, 7, 9)]
        assert ours.labels.tolist() == [{5: 0, 7: 1, 9: 2}[int(theirs.labels[index])] for index in chosen]
        expected = theirs.images(torch.tensor(chosen))
        assert torch.equal(ours.images(torch.arange(len(chosen))), expected)


def test_labels_are_held_back_of_the_classes_that_are_kept() -> None:
    keys = {"classes": [0, 1, 2], "labeled": 30}
    kept, held_back = load_dataset(spec(**keys), root=None), load_held_back(spec(**keys), root=None)
    assert torch.bincount(kept.train.labels).tolist() == [10, 10, 10]
    assert set(held_back.labels.tolist()) == {0, 1, 2}


def test_classes_that_the_data_set_has_not_are_refused() -> None:
    with pytest.raises(SpecError, match=r"expected classes of the data set \(0, 1, .*\), got data.classes=ten"):
        load_dataset(spec(classes=["1", "ten"]), root=None)


def test_classes_without_a_test_image_are_refused(digits: Dataset) -> None:
    only_ones = Subset(digits.test, (digits.test.labels == 1).nonzero().squeeze(1))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least one image of these classes, got images=0"):
        of_classes(replace(digits, test=only_ones), spec(classes=[5, 6]))


def test_the_constants_of_the_normalization_may_be_those_of_another_data_set() -> None:
    dataset = load_dataset(spec(mean=[0.5], std=[0.25]), root=None)
    assert (dataset.mean, dataset.std) == ((0.5,), (0.25,))
    with pytest.raises(SpecError, match=r"one number for each of 1 channels, got data.mean=\[0.5, 0.5, 0.5\]"):
        load_dataset(spec(mean=[0.5, 0.5, 0.5]), root=None)


def test_two_sets_are_one_whatever_the_order_in_which_they_are_asked() -> None:
    first = TensorSamples(torch.arange(12, dtype=torch.uint8).view(3, 1, 2, 2), torch.tensor([4, 5, 6]), maximum=16)
    second = TensorSamples(torch.arange(8, dtype=torch.uint8).view(2, 1, 2, 2), torch.tensor([7, 8]))
    joined = Joined(first, second)

    assert joined.labels.tolist() == [4, 5, 6, 7, 8]
    indices = torch.tensor([4, 0, 3, 2, 2])
    parts = [second, first, second, first, first]
    expected = torch.cat([p.images(torch.tensor([i])) for p, i in zip(parts, [1, 0, 0, 2, 2], strict=True)])
    assert torch.equal(joined.images(indices), expected)
    for only in (torch.tensor([1]), torch.tensor([3, 4])):
        assert joined.images(only).shape == (len(only), 1, 2, 2)
