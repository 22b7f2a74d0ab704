"""Validation data: which samples are held out, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.config import DatasetName, DataSpec
from common.errors import DataError
from tests.processes.test_worker_in_thread import image_folder
from worker.data import Dataset, Samples
from worker.datasets import load_dataset


def held_out(amount: float) -> Dataset:
    return load_dataset(DataSpec(validation=amount), root=None)


def images_of(samples: Samples) -> list[bytes]:
    """Image and label of each sample."""
    count = len(samples.labels)
    images, labels = samples.images(torch.arange(count)), samples.labels.tolist()
    return [image.numpy().tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)]


def validation_of(dataset: Dataset) -> Samples:
    assert dataset.validation is not None
    return dataset.validation


@pytest.mark.parametrize(("amount", "count"), [(0.1, 144), (200, 200), (1, 1), (1436, 1436)])
def test_every_training_sample_is_either_held_out_or_trained_on(amount: float, count: int) -> None:
    whole, dataset = held_out(0), held_out(amount)
    validation, train = images_of(validation_of(dataset)), images_of(dataset.train)
    assert len(validation) == count
    assert sorted(validation + train) == sorted(images_of(whole.train))
    assert images_of(dataset.test) == images_of(whole.test)


def test_the_choice_is_fixed_and_a_greater_one_has_the_samples_of_a_smaller_one() -> None:
    first, second, greater = (validation_of(held_out(count)) for count in (100, 100, 200))
    assert images_of(first) == images_of(second)
    assert set(images_of(first)) < set(images_of(greater))


def test_samples_are_drawn_from_all_over_the_data_and_keep_their_order() -> None:
    whole, validation = images_of(held_out(0).train), images_of(validation_of(held_out(200)))
    places = [whole.index(sample) for sample in validation]
    assert places == sorted(places)
    assert len(validation_of(held_out(200)).labels.unique()) == 10
    assert places[0] < 50
    assert places[-1] > 1387


def test_nothing_is_held_out_by_default() -> None:
    assert held_out(0).validation is None
    assert len(held_out(0).train.labels) == 1437


@pytest.mark.parametrize(("amount", "shown"), [(1437, "1437"), (5000, "5000"), (1e-4, "0.0001"), (0.9999, "0.9999")])
def test_to_hold_out_nothing_or_everything_is_refused(amount: float, shown: str) -> None:
    with pytest.raises(DataError, match=rf"hold out 1 to 1436 of 1437 training samples, got data.validation={shown} "):
        held_out(amount)


def test_each_folder_of_images_holds_out_its_own_part(tmp_path: Path) -> None:
    spec = DataSpec(name=DatasetName.IMAGEFOLDER, validation=0.25)
    counts = []
    for number, images in enumerate((12, 20)):
        dataset = load_dataset(spec, root=image_folder(tmp_path / str(number), images))
        counts.append((len(validation_of(dataset).labels), len(dataset.train.labels), len(dataset.test.labels)))
    assert counts == [(6, 18, 24), (10, 30, 40)]
