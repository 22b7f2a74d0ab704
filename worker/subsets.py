"""Parts of a data set: some of its classes, or the labels of some of its samples; and two sets of samples as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.config import DataSpec
from common.errors import DataError, SpecError, refusal
from worker.data import Dataset, PixelSamples, Samples
from worker.randomness import Purpose, stream_generator


class Subset:
    """Some of the samples of another set, in a given order, under labels of their own if need be."""

    def __init__(self, samples: PixelSamples, indices: Tensor, labels: Tensor | None = None) -> None:
        """`indices`: int64 [N], of the samples; `labels`: int64 [N], theirs where absent."""
        self._samples = samples
        self._indices = indices
        self._labels = samples.labels[indices] if labels is None else labels

    @property
    def labels(self) -> Tensor:
        return self._labels

    @property
    def maximum(self) -> int:
        return self._samples.maximum

    @property
    def nbytes(self) -> int | None:
        return self._samples.nbytes

    def on(self, device: torch.device) -> Subset:
        return Subset(with_pixels(self._samples.on(device)), self._indices, self._labels)

    def images(self, indices: Tensor) -> Tensor:
        return self._samples.images(self._indices[indices])

    def pixels(self, indices: Tensor) -> Tensor:
        return self._samples.pixels(self._indices[indices])


class Joined:
    """Two sets of samples of one shape, the second numbered after the first."""

    def __init__(self, first: Samples, second: Samples) -> None:
        self._first, self._second = first, second
        self._start = len(first.labels)
        self._labels = torch.cat([first.labels, second.labels])

    @property
    def labels(self) -> Tensor:
        return self._labels

    @property
    def nbytes(self) -> int | None:
        first, second = self._first.nbytes, self._second.nbytes
        return None if first is None or second is None else first + second

    def on(self, device: torch.device) -> Joined:
        return Joined(self._first.on(device), self._second.on(device))

    def images(self, indices: Tensor) -> Tensor:
        of_second = indices >= self._start
        first = self._first.images(indices[~of_second])
        second = self._second.images(indices[of_second] - self._start)
        order = torch.cat([(~of_second).nonzero(), of_second.nonzero()]).squeeze(1)  # where each of them belongs
        return torch.cat([first, second])[order.argsort().to(first.device)]


def of_classes(dataset: Dataset, spec: DataSpec) -> Dataset:
    """The classes of a data set that `spec` keeps, and the constants that it normalizes with.

    Raises:
        SpecError: classes that the data set has not, or constants of other channels.
    """
    dataset = _normalized(dataset, spec)
    return dataset if spec.classes is None else _of_classes(dataset, spec.classes)


def labeled_part(dataset: Dataset, spec: DataSpec) -> tuple[Dataset, PixelSamples | None]:
    """A data set whose training samples are those that keep their label, and the others, if any are held back.

    Raises:
        SpecError: more labels than there are.
    """
    if spec.labeled is None:
        return dataset, None
    train = with_pixels(dataset.train)
    count = _count(spec.labeled, len(train.labels))
    order = balanced_order(train.labels, spec.labeled_seed)
    kept, held_back = order[:count].sort().values, order[count:].sort().values
    return replace(dataset, train=Subset(train, kept)), Subset(train, held_back)


def balanced_order(labels_N: Tensor, seed: int) -> Tensor:
    """int64 [N]: all samples in an order whose every beginning holds as many of each class as can be.

    One sample of each class, then another of each, and so on; classes that have no more are passed over. Within a class
    the order is drawn from the seed alone.
    """
    turns = torch.empty_like(labels_N)
    for label in labels_N.unique().tolist():
        of_class = (labels_N == label).nonzero().squeeze(1)
        generator = stream_generator(seed, Purpose.LABELED, label)
        turns[of_class[torch.randperm(len(of_class), generator=generator)]] = torch.arange(len(of_class))
    return torch.argsort(turns, stable=True)


def _count(labeled: int | float, samples: int) -> int:
    count = labeled if isinstance(labeled, int) else int(labeled * samples + 0.5)
    if not 1 <= count < samples:
        rule = f"at least 1 and fewer than all {samples} training images to keep their label"
        raise SpecError(refusal(rule, "data.labeled", labeled))
    return count


def _normalized(dataset: Dataset, spec: DataSpec) -> Dataset:
    for name in ("mean", "std"):
        given: tuple[float, ...] | None = getattr(spec, name)
        if given is not None and len(given) != dataset.in_channels:
            rule = f"one number for each of {dataset.in_channels} channels"
            raise SpecError(refusal(rule, f"data.{name}", list(given), f"data.name={spec.name}"))
    return replace(
        dataset,
        mean=dataset.mean if spec.mean is None else spec.mean,
        std=dataset.std if spec.std is None else spec.std,
    )


def _of_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    unknown = [name for name in names if name not in dataset.classes]
    if unknown:
        rule = f"classes of the data set ({', '.join(dataset.classes)})"
        raise SpecError(refusal(rule, "data.classes", ", ".join(unknown), f"data.name={dataset.name}"))
    kept = tuple(number for number, name in enumerate(dataset.classes) if name in names)
    numbers = torch.full((len(dataset.classes),), -1, dtype=torch.int64)
    numbers[list(kept)] = torch.arange(len(kept))

    def of(samples: Samples) -> Subset:
        indices = (numbers[samples.labels] >= 0).nonzero().squeeze(1)
        if not len(indices):
            raise DataError(refusal("at least one image of these classes", "images", 0, ", ".join(names)))
        return Subset(with_pixels(samples), indices, numbers[samples.labels[indices]])

    classes = tuple(dataset.classes[number] for number in kept)
    return replace(dataset, train=of(dataset.train), test=of(dataset.test), classes=classes)


def with_pixels(samples: Samples) -> PixelSamples:
    """The samples of a data set, before any are joined."""
    assert isinstance(samples, PixelSamples)  # all that are read from files are
    return samples
