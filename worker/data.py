"""Samples, which of them a worker draws in a round, and their augmentation. Reading data sets is in `datasets.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from common.config import Split
from common.errors import DataError, refusal
from worker.randomness import Purpose, stream_generator

CROP_PADDING = 4


class Samples(Protocol):
    """Labelled images, numbered 0 to N - 1."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], class numbers."""

    def images(self, indices: Tensor) -> Tensor:
        """float32 [len(indices), C, H, W] in [0, 1], on the CPU; the caller may change them."""


class TensorSamples:
    """Images held in memory as integers 0 to `maximum`."""

    def __init__(self, pixels_NCHW: Tensor, labels: Tensor, *, maximum: int = 255) -> None:
        self._pixels = pixels_NCHW
        self._labels = labels.to(torch.int64)
        self._maximum = maximum

    @property
    def labels(self) -> Tensor:
        return self._labels

    def images(self, indices: Tensor) -> Tensor:
        return self._pixels[indices].to(torch.float32).div_(self._maximum)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test samples with what a model must know about them; `validation` is taken out of `train`."""

    name: str
    train: Samples
    test: Samples
    classes: tuple[str, ...]
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, for the model's normalization: constants of the data set, so that all workers have the same."""
    validation: Samples | None = None
    """Neither trained on nor tested on; None if nothing is held out."""


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which samples each worker draws in each round: a pure function of the seed, without replay.

    `shared`: every epoch is one permutation of all N samples, cut into rounds and workers; its last N mod (M * B)
    samples are left out, others each epoch. `own`: every worker goes through permutations of its own N_i samples
    one after the other, without a gap; an epoch is as many rounds as all samples together would fill, so that
    workers with less data repeat theirs more often.
    """

    samples_by_worker: tuple[int, ...]
    """N for each worker (`shared`: the same everywhere), or N_i (`own`)."""
    split: Split
    batch_per_worker: int
    """B."""
    seed: int
    workers: int
    """M."""

    def __post_init__(self) -> None:
        counts, drawn = self.samples_by_worker, self.workers * self.batch_per_worker
        if len(counts) != self.workers:
            raise DataError(refusal(f"one count for each of {self.workers} workers", "samples_by_worker", counts))
        if min(counts) < 1:
            raise DataError(refusal("at least one sample on each worker", "samples_by_worker", counts))
        if self.split is Split.SHARED and len(set(counts)) > 1:
            raise DataError(refusal("the same data set on each worker", "samples_by_worker", counts, "split=shared"))
        if self.split is Split.SHARED and counts[0] < drawn:
            context = f"workers={self.workers}, batch_per_worker={self.batch_per_worker}"
            raise DataError(refusal(f"at least {drawn} samples, for one round", "samples", counts[0], context))

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in which the samples are passed over once."""
        samples = self.samples_by_worker[0] if self.split is Split.SHARED else sum(self.samples_by_worker)
        return max(1, samples // (self.workers * self.batch_per_worker))

    def indices(self, round_: int, worker_index: int) -> Tensor:
        """int64 [B]: the samples that one worker draws in one round, counted from 0."""
        if self.split is Split.OWN:
            return self._own_indices(round_, worker_index)
        epoch, round_in_epoch = divmod(round_, self.rounds_per_epoch)
        order = _permutation(self.samples_by_worker[0], self.seed, epoch)
        start = (round_in_epoch * self.workers + worker_index) * self.batch_per_worker
        return order[start : start + self.batch_per_worker].clone()

    def _own_indices(self, round_: int, worker_index: int) -> Tensor:
        samples = self.samples_by_worker[worker_index]
        start, stop = round_ * self.batch_per_worker, (round_ + 1) * self.batch_per_worker
        runs = []
        for cycle in range(start // samples, (stop - 1) // samples + 1):
            order = _permutation(samples, self.seed, cycle, worker_index)
            runs.append(order[max(start - cycle * samples, 0) : stop - cycle * samples])
        return torch.cat(runs)


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, *counters: int) -> Tensor:
    """The permutation of one stream; the cache spares a round the shuffling of the whole epoch."""
    return torch.randperm(samples, generator=stream_generator(seed, Purpose.PERMUTATION, *counters))


def part_of_images(samples: Samples, indices: Tensor, part: slice) -> Tensor:
    """A batch of which only one part is read: float32 [len(indices), C, H, W], the rest of it zeros."""
    own = samples.images(indices[part])
    if len(own) == len(indices):
        return own
    images = own.new_zeros(len(indices), *own.shape[1:])
    images[part] = own
    return images


def augment(images_NCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Random crop after 4 pixels of zero padding, and horizontal flip, each sample on its own.

    Args:
        images_NCHW: float32 in [0, 1], on the generator's device; left as they were.
        generator: the draws; `round_generator(seed, round, worker_index, Purpose.AUGMENTATION)`.

    Returns:
        New images of the same shape.
    """
    count, channels, height, width = images_NCHW.shape
    device = images_NCHW.device
    shifts = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator, device=device)
    flips = torch.randint(2, (count, 1), generator=generator, device=device).bool()
    rows = torch.arange(height, device=device) + shifts[0]
    columns = torch.arange(width, device=device).expand(count, -1)
    columns = torch.where(flips, width - 1 - columns, columns) + shifts[1]
    padded = F.pad(images_NCHW, [CROP_PADDING] * 4)
    sample = torch.arange(count, device=device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return padded[sample, channel, rows.view(count, 1, height, 1), columns.view(count, 1, 1, width)]
