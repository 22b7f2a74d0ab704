"""Files of pseudo-labeled images: how they are made, read, refused, and mixed with labeled data."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.config import DataSpec, JobSpec
from common.errors import DataError, SpecError, StorageError
from worker.data import Dataset
from worker.datasets import load_dataset, load_held_back
from worker.labeling import HELD_BACK, convert_unlabeled, images_in, predict, pseudo_label
from worker.pseudo_labels import (
    PseudoLabels,
    load_pseudo_labels,
    load_training_data,
    save_pseudo_labels,
    with_pseudo_labels,
)
from worker.record import describe_training_data, describe_unlabeled
from worker.trained import TrainedModel

CPU = torch.device("cpu")


def spec(**keys: object) -> DataSpec:
    return DataSpec.model_validate({"labeled": 100, "unlabeled_fraction": 0.5, **keys})


def content(**changes: Any) -> PseudoLabels:
    pixels = (torch.arange(6 * 64) % 17).to(torch.uint8).view(6, 1, 8, 8)
    values: dict[str, Any] = {"images": pixels, "labels": torch.arange(6), "maximum": 16}
    return PseudoLabels(**{**values, **changes})


def saved(path: Path, **changes: Any) -> Path:
    save_pseudo_labels(path, content(**changes))
    return path


class Darkest(nn.Module):
    """Logits of ten classes: the first ten pixels, made dark."""

    def forward(self, images: Tensor) -> Tensor:
        return -3 * images.flatten(1)[:, :10]


def opened(dataset: Dataset, module: nn.Module, data: DataSpec, batch: int = 50) -> TrainedModel:
    job = JobSpec.model_validate({"data": data.model_dump(), "evaluation": {"batch": batch}})
    return TrainedModel(name="darkest", module=module, spec=job, dataset=dataset, device=CPU, checkpoint=None)


# The file


def test_a_file_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    changes = {
        "confidence": torch.rand(6),
        "classes": ("a", "b"),
        "held_back": {"name": "digits", "labeled": 5},
        "made_by": {"parameter_digest": "00ff"},
    }
    before = content(**changes)
    after = load_pseudo_labels(saved(tmp_path / "file", **changes))
    for name in ("images", "labels", "confidence"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert (after.layout, after.maximum, after.classes) == ("NCHW", 16, ("a", "b"))
    assert (after.held_back, after.made_by) == (changes["held_back"], changes["made_by"])
    assert after.digest() == before.digest()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_others_may_read_a_file_as_any_other_file(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    assert saved(tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_the_digest_is_that_of_the_content_whatever_layout_and_header() -> None:
    images = torch.randint(256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    first = content(images=images)
    other_layout = content(images=images.permute(0, 2, 3, 1).contiguous(), layout="NHWC", made_by={"by": "me"})
    assert first.digest() == other_layout.digest()
    assert torch.equal(other_layout.channels_first, images)
    changed = images.clone()
    changed[4, 2, 3, 3] ^= 1
    assert content(images=changed).digest() != first.digest()
    assert content(images=images, labels=torch.tensor([0, 1, 2, 3, 4, 6])).digest() != first.digest()


def test_the_digest_tells_by_what_the_same_pixels_are_divided() -> None:
    """Where a pixel is as bright as the maximum, files of earlier versions keep the digest that runs name."""
    dark = content().images.clamp(max=7)
    assert content(images=dark).digest() != content(images=dark, maximum=255).digest()
    assert content().digest() != content(maximum=255).digest()
    state = xxhash.xxh3_128(content().images.numpy().tobytes())
    state.update(torch.arange(6).numpy().tobytes())
    assert content().digest() == state.hexdigest()


def test_a_file_of_somebody_else_needs_images_labels_and_a_layout(tmp_path: Path) -> None:
    images, labels = torch.zeros(2, 8, 8, 1, dtype=torch.uint8), torch.tensor([0, 1])
    save_file({"images": images, "labels": labels}, tmp_path / "theirs", {"layout": "NHWC"})
    theirs = load_pseudo_labels(tmp_path / "theirs")
    assert (theirs.channels_first.shape, theirs.maximum, theirs.classes) == ((2, 1, 8, 8), 255, None)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"images": torch.zeros(6, 1, 8, 8)}, "uint8 of four dimensions, got images=float32"),
        ({"images": torch.zeros(6, 8, 8, dtype=torch.uint8)}, "four dimensions, got images=uint8 [6, 8, 8]"),
        ({"labels": torch.zeros(6)}, "int64 of one dimension, got labels=float32 [6]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "one label for each of 6 images, got labels=int64 [5]"),
        ({"layout": "CHWN"}, "NCHW or NHWC, got layout=CHWN"),
        ({"maximum": 0}, "maximum from 1 to 255, got maximum=0"),
        ({"maximum": 300}, "maximum from 1 to 255, got maximum=300"),
        ({"maximum": 15}, "pixels up to maximum=15, got brightest=16"),
        ({"held_back": {"labeled": 5}}, "the name of a data set, got held_back="),
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8), "labels": torch.arange(0)}, "got labels=int64 [0]"),
    ],
)
def test_a_file_with_other_content_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        load_pseudo_labels(saved(tmp_path / "file", **change))
    assert text in str(caught.value)
    assert str(tmp_path / "file") in str(caught.value)


def headless(path: Path) -> None:
    save_file({"images": torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "labels": torch.tensor([0])}, path)


def cut(path: Path) -> None:
    saved(path)
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_bytes(b"no tensors"), "SafetensorError"),
        (cut, "SafetensorError"),
        (headless, "KeyError: 'layout'"),
        (lambda path: save_file({"x": torch.zeros(1)}, path, {"layout": "NCHW"}), "KeyError: 'images'"),
        (lambda _: None, "FileNotFoundError"),
    ],
    ids=["no tensors", "cut off", "no header", "other tensors", "missing"],
)
def test_what_is_no_such_file_is_refused(tmp_path: Path, make: Any, reason: str) -> None:
    make(tmp_path / "file")
    with pytest.raises(DataError, match=r"expected a file of pseudo-labeled images .* got unlabeled=") as caught:
        load_pseudo_labels(tmp_path / "file")
    assert reason in str(caught.value)


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="a folder with room to write"):
        saved(tmp_path / "nowhere" / "file")


# Beside labeled data


def test_a_job_that_names_its_images_takes_no_others(tmp_path: Path) -> None:
    named, other = content().digest(), content(labels=torch.tensor([0, 1, 2, 3, 4, 6]))
    copy = saved(tmp_path / "copy", confidence=torch.ones(6), made_by={"who": "else"})
    assert load_training_data(spec(unlabeled_digest=named), root=None, unlabeled=copy).unlabeled is not None
    save_pseudo_labels(tmp_path / "other", other)
    rule = rf"a file with digest {named} \(data.unlabeled_digest\), got digest={other.digest()} \(.*other\)"
    with pytest.raises(SpecError, match=rule) as caught:
        load_training_data(spec(unlabeled_digest=named), root=None, unlabeled=tmp_path / "other")
    assert caught.value.exit_code == 2


def test_pseudo_labeled_images_come_after_the_labeled_ones(tmp_path: Path) -> None:
    mixed = load_training_data(spec(), root=None, unlabeled=saved(tmp_path / "file"))
    assert mixed.labeled_samples == 100
    assert mixed.unlabeled is not None
    assert mixed.unlabeled.samples == 6
    assert mixed.train.labels[100:].tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.equal(mixed.train.images(torch.arange(100, 106)), content().images.float() / 16)
    assert torch.bincount(mixed.train.labels[:100]).tolist() == [10] * 10


def test_workers_that_divide_unlabeled_images_describe_them_and_others_do_not(tmp_path: Path) -> None:
    path = saved(tmp_path / "file")
    mixed = load_training_data(spec(), root=None, unlabeled=path)
    said = describe_training_data(mixed, spec())
    assert said.endswith(f", 6 unlabeled images with xxh3_128 {content().digest()}")
    assert describe_training_data(mixed, spec(split="own")) + f", {describe_unlabeled(mixed, spec())}" == said
    plain = load_training_data(spec(unlabeled_fraction=0), root=None)
    assert describe_unlabeled(plain, spec(unlabeled_fraction=0)) == ""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"images": torch.zeros(6, 3, 8, 8, dtype=torch.uint8)},
            "images of 1x8x8 pixels like the labeled ones, got size=3x8x8",
        ),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 10])}, "labels from 0 to 9, got labels=0 to 10"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, -1])}, "labels from 0 to 9, got labels=-1 to 4"),
        ({"classes": ("cat", "dog")}, "got classes=cat, dog"),
        (
            {"held_back": {"name": "digits", "classes": None, "labeled": 100, "labeled_seed": 1}},
            "images whose labels this job does not keep",
        ),
        (
            {"held_back": {"name": "digits", "classes": None, "labeled": 50, "labeled_seed": 0}},
            "images whose labels this job does not keep",
        ),
    ],
    ids=["size", "label too high", "label below 0", "classes", "another choice of labels", "fewer labels kept"],
)
def test_a_file_for_other_data_is_refused(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError) as caught:
        load_training_data(spec(), root=None, unlabeled=saved(tmp_path / "file", **change))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        ({}, {}, True),
        ({}, {"validation": 0.2}, False),  # made without: among its images are those that this job validates on
        ({"validation": 0.2}, {}, False),
        ({"validation": 0.2}, {"validation": 0.2}, True),
        ({"split": "own"}, {}, False),
        ({"name": "cifar10"}, {"validation": 0.2}, True),
    ],
)
def test_images_held_back_fit_a_job_that_holds_back_the_same(
    tmp_path: Path, theirs: dict[str, Any], ours: dict[str, Any], fits: bool
) -> None:
    """A file of an earlier version says nothing of keys that it did not know."""
    said = {"name": "digits", "classes": None, "labeled": 100, "labeled_seed": 0, **theirs}
    path = saved(tmp_path / "file", held_back=said)
    if fits:
        assert load_training_data(spec(**ours), root=None, unlabeled=path).unlabeled is not None
        return
    with pytest.raises(DataError, match="expected images whose labels this job does not keep"):
        load_training_data(spec(**ours), root=None, unlabeled=path)


def test_a_file_and_its_fraction_go_together(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"\(--unlabeled FILE\), got unlabeled=None \(data.unlabeled_fraction=0.5\)"):
        load_training_data(spec(), root=None)
    with pytest.raises(SpecError, match=r"unlabeled_fraction above 0 with --unlabeled, got data.unlabeled_fraction=0"):
        load_training_data(spec(unlabeled_fraction=0), root=None, unlabeled=saved(tmp_path / "file"))
    with pytest.raises(SpecError, match="expected a file that exists, got unlabeled="):
        load_training_data(spec(), root=None, unlabeled=tmp_path / "nowhere")


# Labeling


def test_a_model_gives_its_most_probable_classes_with_their_probability(digits: Dataset) -> None:
    held_back = load_held_back(spec(), root=None)
    told: list[tuple[int, int]] = []
    found = predict(opened(digits, Darkest(), spec()), held_back, lambda done, of: told.append((done, of)))

    images = held_back.images(torch.arange(1337))
    probabilities = torch.exp(-3 * images.flatten(1)[:, :10].double())
    probabilities /= probabilities.sum(1, keepdim=True)
    assert torch.equal(found.labels, probabilities.argmax(1))
    assert found.confidence.double() == pytest.approx(probabilities.amax(1), rel=1e-5)
    assert torch.equal(found.pixels.float() / 16, images)
    assert told == [(min(done, 1337), 1337) for done in range(50, 1400, 50)]


def test_a_model_of_other_classes_labels_nothing(digits: Dataset) -> None:
    held_back = load_held_back(spec(), root=None)
    with pytest.raises(SpecError, match=r"expected logits of 10 classes, got logits=\[50, 64\]"):
        predict(opened(digits, nn.Flatten(), spec()), held_back, lambda *_: None)


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module of the user's with models in it, of a name that no other test has imported."""
    name = "their_labeler_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class First(nn.Module):\n    def forward(self, images):\n        return images.flatten(1)[:, :10]\n"
        "class Colour(nn.Module):\n    def forward(self, images):\n        return images.mean((2, 3))[:, :2]\n"
        "first, colour = First(), Colour()\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_held_back_images_are_labeled_and_train_the_same_job(tmp_path: Path, module_name: str) -> None:
    out = tmp_path / "made"
    result = pseudo_label(f"{module_name}:first", HELD_BACK, out, settings=["data.labeled=100"])

    held_back = load_held_back(spec(), root=None)
    labels = held_back.images(torch.arange(1337)).flatten(1)[:, :10].argmax(1)
    made = load_pseudo_labels(out)
    assert torch.equal(made.labels, labels)
    assert (made.maximum, made.classes) == (16, tuple("0123456789"))
    assert (result["images"], sum(result["by_class"].values())) == (1337, 1337)
    assert result["pseudo_label_accuracy"] == (labels == held_back.labels).double().mean().item()
    assert result["state_digest"] == made.made_by["state_digest"]
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["held_back"]) == {
            "name": "digits",
            "split": "shared",
            "classes": None,
            "validation": 0.0,
            "labeled": 100,
            "labeled_seed": 0,
        }
    mixed = load_training_data(spec(), root=None, unlabeled=out)
    assert len(mixed.train.labels) == 1437
    with pytest.raises(DataError, match="does not keep"):
        load_training_data(spec(labeled=101), root=None, unlabeled=out)


def photos(folder: Path, colours: list[int], size: tuple[int, int] = (20, 16)) -> None:
    folder.mkdir(parents=True)
    for number, red in enumerate(colours):
        Image.new("RGB", size, (red, 100, 0)).save(folder / f"{number}.png")


def image_folder(root: Path) -> Path:
    for part in ("train", "test"):
        for name in ("green", "red"):
            photos(root / part / name, [10, 200], (16, 16))
    return root


def test_a_folder_of_images_without_classes_is_labeled_at_the_size_of_the_models_data(
    tmp_path: Path, module_name: str
) -> None:
    photos(tmp_path / "photos" / "deep", [250, 0])
    photos(tmp_path / "photos" / "also", [90])
    (tmp_path / "photos" / "note.txt").write_text("no image")
    settings = ["data.name=imagefolder"]
    result = pseudo_label(
        f"{module_name}:colour", "photos", tmp_path / "out", root=image_folder(tmp_path / "data"), settings=settings
    )

    made = load_pseudo_labels(tmp_path / "out")
    assert made.labels.tolist() == [1, 0, 1]  # also/0, deep/0, deep/1: channel 0 above channel 1 is class 0
    assert made.images.shape == (3, 3, 16, 16)
    assert made.images[:, 0, 0, 0].tolist() == [90, 250, 0]
    assert made.held_back is None
    assert "pseudo_label_accuracy" not in result
    data = DataSpec.model_validate({"name": "imagefolder", "unlabeled_fraction": 0.5})
    assert load_training_data(data, root=tmp_path / "data", unlabeled=tmp_path / "out").labeled_samples == 4


def test_of_a_data_folder_only_the_training_images_are_labeled(digits: Dataset, tmp_path: Path) -> None:
    data = DataSpec.model_validate({"name": "imagefolder"})
    dataset = load_dataset(data, root=image_folder(tmp_path))
    assert len(images_in(tmp_path, opened(dataset, nn.Identity(), data)).labels) == 4
    with pytest.raises(SpecError, match=r"images of 3 channels, as images in files are, got channels=1"):
        images_in(tmp_path, opened(digits, nn.Identity(), spec()))


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_folder_without_images_is_refused(tmp_path: Path, module_name: str, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected held-back, or a folder with images .* got data="):
        pseudo_label(f"{module_name}:first", folder, tmp_path / "out")


def test_a_file_that_is_there_is_kept(tmp_path: Path, module_name: str) -> None:
    (tmp_path / "out").write_text("mine")
    for make in (
        lambda: pseudo_label(f"{module_name}:first", HELD_BACK, tmp_path / "out"),
        lambda: convert_unlabeled(tmp_path / "in", tmp_path / "out"),
    ):
        with pytest.raises(SpecError, match="a file that is not there yet"):
            make()
    assert (tmp_path / "out").read_text() == "mine"


# The published file


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_published_pickle_is_converted(tmp_path: Path, protocol: int) -> None:
    images = np.random.default_rng(1).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    published = {"data": images, "extrapolated_targets": np.array([1, 0, 1, 1, 0, 0, 1], np.int32)}
    (tmp_path / "in").write_bytes(pickle.dumps(published, protocol=protocol))

    result = convert_unlabeled(tmp_path / "in", tmp_path / "out")

    made = load_pseudo_labels(tmp_path / "out")
    assert torch.equal(made.images, torch.from_numpy(images))
    assert made.layout == "NHWC"
    assert made.labels.tolist() == [1, 0, 1, 1, 0, 0, 1]
    assert (result["images"], result["by_class"]) == (7, {"0": 3, "1": 4})


def test_a_converted_file_is_mixed_in(tmp_path: Path) -> None:
    images = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
    (tmp_path / "in").write_bytes(pickle.dumps({"data": images, "extrapolated_targets": np.array([1, 0])}))
    convert_unlabeled(tmp_path / "in", tmp_path / "out")
    data = DataSpec.model_validate({"name": "imagefolder", "unlabeled_fraction": 0.5})
    mixed = with_pseudo_labels(load_dataset(data, root=image_folder(tmp_path / "data")), data, tmp_path / "out")
    expected = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    assert torch.equal(mixed.train.images(torch.tensor([4, 5])), expected)


@pytest.mark.parametrize(
    ("published", "text"),
    [
        ({"data": np.zeros((2, 8, 8, 3), np.uint8)}, "arrays data and extrapolated_targets, got keys=data"),
        ({"data": [1], "extrapolated_targets": np.zeros(1, int)}, "got keys=data, extrapolated_targets"),
        ({"data": np.zeros((2, 8, 8, 3)), "extrapolated_targets": np.zeros(2, int)}, "got data=float64 [2, 8, 8, 3]"),
        ({"data": np.zeros((2, 3, 8, 8), np.uint8), "extrapolated_targets": np.zeros(2, int)}, "1 or 3 channels"),
        ({"data": np.zeros((2, 8, 8, 3), np.uint8), "extrapolated_targets": np.zeros(2)}, "got extrapolated_targets"),
        ({"data": np.zeros((2, 8, 8, 3), np.uint8), "extrapolated_targets": np.zeros(3, int)}, "one integer for each"),
        ({"data": np.zeros((1, 8, 8, 3), np.uint8), "extrapolated_targets": np.array([-1])}, "class numbers from 0"),
    ],
)
def test_another_pickle_is_not_converted(tmp_path: Path, published: dict[str, Any], text: str) -> None:
    (tmp_path / "in").write_bytes(pickle.dumps(published))
    with pytest.raises(DataError) as caught:
        convert_unlabeled(tmp_path / "in", tmp_path / "out")
    assert text in str(caught.value)
    assert not (tmp_path / "out").exists()
