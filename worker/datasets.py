"""Reading data sets: the digits that come with scikit-learn, CIFAR through torchvision, and any folder of images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.config import DatasetName, DataSpec, Split
from common.errors import DataError, SpecError, refusal
from worker.data import Dataset, PixelSamples, TensorSamples
from worker.subsets import labeled_part, of_classes
from worker.validation import hold_out

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
IN_MEMORY_BYTES = 256 << 20
"""Folders whose decoded images take no more are read at once; larger ones are decoded batch by batch."""

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CIFAR_MEAN_STD = {
    DatasetName.CIFAR10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    DatasetName.CIFAR100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_DIGITS_TEST = 360
_DIGITS_SPLIT_SEED = 0


def load_dataset(spec: DataSpec, *, root: Path | None, download: bool = False) -> Dataset:
    """The data set that `spec` names, with validation samples taken out of its training samples if it says so.

    Args:
        spec: name, for `imagefolder` the image size, and what is left of the data set: classes and labels.
        root: this worker's data folder; not needed for the digits. With `split=own` each worker has its own.
        download: fetch CIFAR into `root` if it is not there.

    Raises:
        DataError: missing, unreadable or inconsistent data; the message names the path.
        SpecError: `spec` asks for what the data set cannot give.
    """
    return labeled_part(_all_labeled(spec, root, download), spec)[0]


def load_held_back(spec: DataSpec, *, root: Path | None) -> PixelSamples:
    """The training samples whose labels `data.labeled` holds back; their labels are the true ones.

    Raises:
        DataError, SpecError: as `load_dataset`, or no labels are held back.
    """
    held_back = labeled_part(_all_labeled(spec, root, download=False), spec)[1]
    if held_back is None:
        rule = "data.labeled, a number or fraction of the training images that keep their label"
        raise SpecError(refusal(rule, "data.labeled", None, "no labels are held back"))
    return held_back


def _all_labeled(spec: DataSpec, root: Path | None, download: bool) -> Dataset:
    """With validation samples taken out, which neither labels nor unlabeled images come from."""
    return hold_out(of_classes(_read(spec, root, download), spec), spec.validation)


def _read(spec: DataSpec, root: Path | None, download: bool) -> Dataset:
    if spec.split is Split.OWN and spec.name is not DatasetName.IMAGEFOLDER:
        raise SpecError(refusal("data.name=imagefolder, a folder per worker", "data.name", spec.name, "split=own"))
    if spec.image_size is not None and spec.name is not DatasetName.IMAGEFOLDER:
        raise SpecError(refusal("no image_size but for imagefolder", "data.image_size", spec.image_size, spec.name))
    if spec.name is DatasetName.DIGITS:
        return _digits()
    if root is None:
        raise DataError(refusal("a data folder (--data FOLDER)", "data folder", "none", f"data.name={spec.name}"))
    if spec.name is DatasetName.IMAGEFOLDER:
        return _imagefolder(root, spec.image_size)
    return _cifar(spec.name, root, download)


def _digits() -> Dataset:
    """1,797 digits of 8x8 pixels with 17 grey levels; a fixed stratified split into 1,437 and 360."""
    # scikit-learn takes a second to import and only this data set needs it
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    numbers = np.arange(len(bunch.target))
    train, test = train_test_split(
        numbers, test_size=_DIGITS_TEST, stratify=bunch.target, random_state=_DIGITS_SPLIT_SEED
    )
    pixels = torch.from_numpy(bunch.images.astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target)
    return Dataset(
        name=DatasetName.DIGITS,
        train=TensorSamples(pixels[train], labels[train], maximum=16),
        test=TensorSamples(pixels[test], labels[test], maximum=16),
        classes=tuple(str(name) for name in bunch.target_names),
        in_channels=1,
        image_size=8,
        mean=(0.3053,),
        std=(0.3760,),
    )


def _cifar(name: DatasetName, root: Path, download: bool) -> Dataset:
    from torchvision import datasets

    reader = {DatasetName.CIFAR10: datasets.CIFAR10, DatasetName.CIFAR100: datasets.CIFAR100}[name]
    try:
        # torchvision checks the files' MD5 before it unpickles them
        train, test = (reader(root=str(root), train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError) as error:
        rule = f"{name} under the data folder (--download fetches it)"
        raise DataError(refusal(rule, "data folder", root, str(error).split("\n", maxsplit=1)[0])) from None
    mean, std = _CIFAR_MEAN_STD[name]
    return Dataset(
        name=name,
        train=_from_torchvision(train.data, train.targets),
        test=_from_torchvision(test.data, test.targets),
        classes=tuple(train.classes),
        in_channels=3,
        image_size=32,
        mean=mean,
        std=std,
    )


def _from_torchvision(data_NHWC: np.ndarray, targets: Sequence[int]) -> TensorSamples:
    return TensorSamples(torch.from_numpy(data_NHWC).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets))


def _imagefolder(root: Path, image_size: int | None) -> Dataset:
    """`train/<class>/*` and `test/<class>/*` (or `val/`), files with an image suffix, as RGB."""
    train_folder = root / "train"
    test_folder = root / "test" if (root / "test").is_dir() or not (root / "val").is_dir() else root / "val"
    classes = _classes(train_folder)
    test_classes = _classes(test_folder)
    if classes != test_classes:
        difference = sorted(set(classes) ^ set(test_classes))
        raise DataError(refusal(f"the same classes in {train_folder.name}/", "classes", difference, str(test_folder)))
    train_files, test_files = (_files(folder, classes) for folder in (train_folder, test_folder))
    size = image_size if image_size is not None else _common_size(train_files[0][0])
    crop = image_size is not None
    return Dataset(
        name=DatasetName.IMAGEFOLDER,
        train=_samples(*train_files, size=size, crop=crop),
        test=_samples(*test_files, size=size, crop=crop),
        classes=classes,
        in_channels=3,
        image_size=size,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    )


def _classes(folder: Path) -> tuple[str, ...]:
    if not folder.is_dir():
        layout = "train/<class>/* and test/<class>/* under the data folder"
        raise DataError(refusal(f"a folder ({layout})", "path", folder, "missing"))
    classes = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if len(classes) < 2:
        raise DataError(refusal("at least two class folders", "classes", list(classes), str(folder)))
    return classes


def _files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """All image files in order of class and name, and their class numbers."""
    files: list[Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        of_class = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        if not of_class:
            raise DataError(refusal("at least one image in each class", "images", 0, str(folder / name)))
        files += of_class
        labels += [number] * len(of_class)
    return files, torch.tensor(labels, dtype=torch.int64)


def _common_size(file: Path) -> int:
    """The side of a folder's first image, which all others must share."""
    height, width, _ = _decode(file, None).shape
    if height != width:
        rule = "square images, or data.image_size to crop them to"
        raise DataError(refusal(rule, "size", f"{width}x{height}", str(file)))
    return int(height)


def _samples(files: list[Path], labels: Tensor, *, size: int, crop: bool) -> PixelSamples:
    lazy = ImageFiles(files, labels, size=size, crop=crop)
    if len(files) * 3 * size * size > IN_MEMORY_BYTES:
        return lazy
    return TensorSamples(lazy.pixels(torch.arange(len(files))), labels)


class ImageFiles:
    """Images that stay in their files and are decoded batch by batch, by several threads."""

    def __init__(self, files: Sequence[Path], labels: Tensor, *, size: int, crop: bool) -> None:
        """With `crop` images are resized and cut to the centre square of `size`; otherwise all must be of that size."""
        self._files = files
        self._labels = labels
        self._size = size
        self._crop = crop

    @property
    def labels(self) -> Tensor:
        return self._labels

    @property
    def maximum(self) -> int:
        return 255

    @property
    def nbytes(self) -> int | None:
        return None

    def on(self, device: torch.device) -> ImageFiles:
        raise AssertionError(f"images in files cannot be held on {device}")

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels(indices).to(torch.float32).div_(255)

    def pixels(self, indices: Tensor) -> Tensor:
        """uint8 [len(indices), 3, size, size].

        Raises:
            DataError: a file that cannot be read as an image, or has another size.
        """
        pixels = np.empty((len(indices), 3, self._size, self._size), dtype=np.uint8)
        numbers = indices.tolist()
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for position, image in enumerate(pool.map(self._read, numbers)):
                pixels[position] = image.transpose(2, 0, 1)
        return torch.from_numpy(pixels)

    def _read(self, number: int) -> np.ndarray:
        file = self._files[number]
        image = _decode(file, self._size if self._crop else None)
        if image.shape[:2] != (self._size, self._size):
            rule = f"images of {self._size}x{self._size} pixels like the first, or data.image_size to crop them to"
            raise DataError(refusal(rule, "size", f"{image.shape[1]}x{image.shape[0]}", str(file)))
        return image


def _decode(file: Path, size: int | None) -> np.ndarray:
    """uint8 [H, W, 3]; with `size` the largest centred square, resized to it."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except Exception as error:  # a broken file makes Pillow's decoders raise almost anything
        raise DataError(refusal("a readable image", "file", file, f"{type(error).__name__}: {error}")) from None
    if size is not None:
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image)
