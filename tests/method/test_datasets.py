"""Reading data sets, and what is said when they cannot be read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.config import DatasetName, DataSpec, Split
from common.errors import DataError, SpecError
from worker import datasets
from worker.data import Dataset
from worker.datasets import load_dataset

FOLDER = DataSpec(name=DatasetName.IMAGEFOLDER)
FOLDER_OF_8 = DataSpec(name=DatasetName.IMAGEFOLDER, image_size=8)


def write_image(path: Path, *, size: tuple[int, int] = (8, 8), value: int = 0, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, three training images and one test image each; the pixels tell which is which."""
    for number, name in enumerate(("cat", "dog")):
        for image in range(3):
            write_image(tmp_path / "train" / name / f"{image}.png", value=100 * number + image)
        write_image(tmp_path / "test" / name / "0.png", value=100 * number + 50)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


# The digits


def test_digits_are_split_into_1437_and_360_disjoint_samples(digits: Dataset) -> None:
    assert (len(digits.train.labels), len(digits.test.labels)) == (1437, 360)
    assert digits.classes == tuple("0123456789")
    assert (digits.in_channels, digits.image_size) == (1, 8)
    train, test = (part.images(torch.arange(len(part.labels))) for part in (digits.train, digits.test))
    together = torch.cat([train, test]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 1797, "all digits differ, so none is in both"
    assert (together.min().item(), together.max().item()) == (0, 1)


def test_digits_are_split_evenly_over_the_classes_and_always_alike(digits: Dataset) -> None:
    assert torch.bincount(digits.test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert digits.test.labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    again = load_dataset(DataSpec(), root=None)
    assert torch.equal(again.train.labels, digits.train.labels)


def test_constants_of_the_digits_are_mean_and_deviation_of_their_training_pixels(digits: Dataset) -> None:
    pixels = digits.train.images(torch.arange(1437))
    assert digits.mean == pytest.approx([pixels.mean().item()], abs=1e-3)
    assert digits.std == pytest.approx([pixels.std().item()], abs=1e-3)


# Folders of images


def test_folder_is_read_in_order_of_class_and_file_name(folder: Path) -> None:
    dataset = load_dataset(FOLDER, root=folder)
    assert dataset.classes == ("cat", "dog")
    assert (dataset.in_channels, dataset.image_size) == (3, 8)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    images = dataset.train.images(torch.tensor([5, 0]))
    assert images.shape == (2, 3, 8, 8)
    assert images.dtype is torch.float32
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [102, 0]
    assert (dataset.test.images(torch.tensor([1]))[0, 0, 0, 0] * 255).round() == 150


def test_large_folder_is_decoded_batch_by_batch_with_the_same_pixels(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = load_dataset(FOLDER, root=folder).train
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    lazy = load_dataset(FOLDER, root=folder).train
    assert isinstance(lazy, datasets.ImageFiles)
    indices = torch.tensor([4, 0, 4])
    assert torch.equal(lazy.images(indices), in_memory.images(indices))
    assert torch.equal(lazy.labels, in_memory.labels)


def test_val_stands_for_test_where_there_is_no_test(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load_dataset(FOLDER, root=folder).test.labels) == 2


def test_images_of_any_size_and_mode_become_centre_squares_in_colour(folder: Path) -> None:
    striped = np.zeros((20, 60), dtype=np.uint8)
    striped[:, 20:40] = 200
    Image.fromarray(striped).save(folder / "train" / "cat" / "0.png")
    write_image(folder / "train" / "cat" / "1.png", size=(9, 30), mode="RGBA", value=80)
    train = load_dataset(FOLDER_OF_8, root=folder).train
    images = train.images(torch.tensor([0, 1])) * 255
    assert images.shape == (2, 3, 8, 8)
    assert bool((images[0, :, :, 1:-1] == 200).all()), "the middle third is all that is left"
    assert images[0].min() > 150, "but for the edges, where resizing mixes in a little of the rest"
    assert bool((images[1] == 80).all())


def test_image_of_another_size_is_named_where_none_is_asked_for(folder: Path) -> None:
    write_image(folder / "train" / "dog" / "1.png", size=(8, 9))
    with pytest.raises(DataError, match=r"images of 8x8 pixels .*data.image_size.*, got size=8x9 \(.*dog/1.png\)"):
        load_dataset(FOLDER, root=folder)
    write_image(folder / "train" / "cat" / "0.png", size=(8, 9))
    with pytest.raises(DataError, match=r"expected square images, or data.image_size .*size=8x9 \(.*cat/0.png\)"):
        load_dataset(FOLDER, root=folder)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("content", [b"", b"not an image", None], ids=["empty", "text", "truncated"])
def test_unreadable_image_is_named(
    folder: Path, content: bytes | None, lazy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "train" / "dog" / "2.png"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-60] if content is None else content)
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0 if lazy else 1 << 20)
    with pytest.raises(DataError, match=r"expected a readable image, got file=.*train/dog/2.png"):
        load_dataset(FOLDER, root=folder).train.images(torch.tensor([5]))


def test_missing_folders_are_named_with_the_layout(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected a folder \(train/<class>/\*.* got path=.*/nowhere/train \(m"):
        load_dataset(FOLDER, root=tmp_path / "nowhere")
    (folder / "test").rename(folder / "tests")
    with pytest.raises(DataError, match=r"got path=.*/test \(missing\)"):
        load_dataset(FOLDER, root=folder)
    with pytest.raises(DataError, match=r"expected a data folder \(--data FOLDER\), got data folder=none"):
        load_dataset(FOLDER, root=None)


def test_missing_empty_and_differing_classes_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "test" / "eel").mkdir()
    with pytest.raises(DataError, match=r"expected the same classes in train/, got classes=\['eel'\] \(.*/test\)"):
        load_dataset(FOLDER, root=folder)
    (folder / "train" / "eel").mkdir()
    with pytest.raises(DataError, match=r"expected at least one image in each class, got images=0 \(.*train/eel\)"):
        load_dataset(FOLDER, root=folder)
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"expected at least two class folders, got classes=\[\] \(.*/train\)"):
        load_dataset(FOLDER, root=tmp_path / "bare")


# CIFAR


def write_cifar10(root: Path) -> None:
    """The layout of the original archive, with two images a batch."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = np.full((2, 3072), number, dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [number, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))


def test_cifar10_is_read_from_the_original_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar10(tmp_path)
    dataset = load_dataset(DataSpec(name=DatasetName.CIFAR10), root=tmp_path)
    assert dataset.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert dataset.test.labels.tolist() == [5, 9]
    images = dataset.train.images(torch.tensor([2, 8]))
    assert images.shape == (2, 3, 32, 32)
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [1, 4]
    assert len(dataset.classes) == 10


@pytest.mark.parametrize("name", [DatasetName.CIFAR10, DatasetName.CIFAR100])
def test_missing_cifar_is_named_with_the_way_to_get_it(name: DatasetName, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"expected {name} under .* \(--download .* got data folder={tmp_path}"):
        load_dataset(DataSpec(name=name), root=tmp_path)


# What does not go together


def test_own_data_for_each_worker_needs_a_folder_for_each() -> None:
    with pytest.raises(SpecError, match=r"expected data.name=imagefolder, .*got data.name=digits \(split=own\)"):
        load_dataset(DataSpec(split=Split.OWN), root=None)


def test_image_size_is_refused_where_it_would_be_ignored() -> None:
    with pytest.raises(SpecError, match=r"expected no image_size but for imagefolder, got data.image_size=16"):
        load_dataset(DataSpec(image_size=16), root=None)
