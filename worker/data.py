"""Samples, which of them a worker draws in a round, and their augmentation. Reading data sets is in `datasets.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, runtime_checkable

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

    @property
    def nbytes(self) -> int | None:
        """What the pixels take where they are held in memory; None where they stay in files."""

    def on(self, device: torch.device) -> Samples:
        """These samples, if held in memory, with their pixels on a device; their `images` are there too."""

    def images(self, indices: Tensor) -> Tensor:
        """float32 [len(indices), C, H, W] in [0, 1], on the CPU unless it says otherwise; the caller may change them.

        `indices` are int64 on the CPU, like the labels.
        """


@runtime_checkable
class PixelSamples(Samples, Protocol):
    """Samples whose images are kept as integers 0 to `maximum`."""

    @property
    def maximum(self) -> int:
        """What 1.0 is as an integer."""

    def pixels(self, indices: Tensor) -> Tensor:
        """uint8 [len(indices), C, H, W]."""


class TensorSamples:
    """Images held in memory as integers 0 to `maximum`."""

    def __init__(self, pixels_NCHW: Tensor, labels: Tensor, *, maximum: int = 255) -> None:
        self._pixels = pixels_NCHW
        self._labels = labels.to(torch.int64)
        self._maximum = maximum
        # A number on the CPU would make a GPU multiply by its reciprocal, which rounds otherwise.
        self._divisor = torch.tensor(maximum, dtype=torch.float32, device=pixels_NCHW.device)

    @property
    def labels(self) -> Tensor:
        return self._labels

    @property
    def maximum(self) -> int:
        return self._maximum

    @property
    def nbytes(self) -> int | None:
        return self._pixels.nbytes

    def on(self, device: torch.device) -> TensorSamples:
        return TensorSamples(self._pixels.to(device), self._labels, maximum=self._maximum)

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels(indices).to(torch.float32).div_(self._divisor)

    def pixels(self, indices: Tensor) -> Tensor:
        return self._pixels[indices.to(self._pixels.device)]


@dataclass(frozen=True, kw_only=True)
class Unlabeled:
    """The pseudo-labeled ones among a data set's training samples."""

    samples: int
    digest: str
    """Of their pixels and pseudo-labels, in hex."""

    def __str__(self) -> str:
        return f"{self.samples} unlabeled images with xxh3_128 {self.digest}"


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Training and test samples with what a model must know about them; `validation` is taken out of `train`."""

    name: str
    train: Samples
    """The labeled samples, then the pseudo-labeled ones."""
    test: Samples
    classes: tuple[str, ...]
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Per channel, for the model's normalization: constants of the data set, so that all workers have the same."""
    validation: Samples | None = None
    """Neither trained on nor tested on; None if nothing is held out."""
    unlabeled: Unlabeled | None = None

    @property
    def labeled_samples(self) -> int:
        """How many of the training samples come with their label."""
        return len(self.train.labels) - (self.unlabeled.samples if self.unlabeled else 0)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which samples each worker draws in each round: a pure function of the seed, without replay.

    `shared`: every epoch is one permutation of all N samples, cut into rounds and workers; its last N mod (M * B)
    samples are left out, others each epoch. `own`: every worker goes through permutations of its own N_i samples
    one after the other, without a gap; an epoch is as many rounds as all samples together would fill, so that
    workers with less data repeat theirs more often.

    With pseudo-labeled samples this is said of the labeled ones, of which a batch has B - B_u. The other B_u come from
    permutations of the pseudo-labeled samples, one after the other without a gap: divided among the workers (`shared`),
    or each worker's own (`own`). Both kinds are shuffled together within the batch, so that every part of it that
    goes to a device holds both.
    """

    samples_by_worker: tuple[int, ...]
    """N for each worker (`shared`: the same everywhere), or N_i (`own`)."""
    split: Split
    batch_per_worker: int
    """B."""
    seed: int
    workers: int
    """M."""
    unlabeled: int = 0
    """N_u: pseudo-labeled samples, numbered after the labeled ones (`own`: of this worker)."""
    unlabeled_per_batch: int = 0
    """B_u, below B."""

    def __post_init__(self) -> None:
        counts, drawn = self.samples_by_worker, self.workers * self.labeled_per_batch
        if len(counts) != self.workers:
            raise DataError(refusal(f"one count for each of {self.workers} workers", "samples_by_worker", counts))
        if min(counts) < 1:
            raise DataError(refusal("at least one sample on each worker", "samples_by_worker", counts))
        if self.split is Split.SHARED and len(set(counts)) > 1:
            raise DataError(refusal("the same data set on each worker", "samples_by_worker", counts, "split=shared"))
        if self.split is Split.SHARED and counts[0] < drawn:
            context = f"workers={self.workers}, batch_per_worker={self.batch_per_worker}"
            kind = "labeled samples" if self.unlabeled_per_batch else "samples"
            raise DataError(refusal(f"at least {drawn} {kind}, for one round", "samples", counts[0], context))
        if self.unlabeled_per_batch and self.unlabeled < 1:
            raise DataError(refusal("at least one unlabeled sample", "unlabeled", self.unlabeled))

    @property
    def labeled_per_batch(self) -> int:
        """B - B_u: all of B without pseudo-labeled samples."""
        return self.batch_per_worker - self.unlabeled_per_batch

    @property
    def rounds_per_epoch(self) -> int:
        """Rounds in which the samples are passed over once."""
        samples = self.samples_by_worker[0] if self.split is Split.SHARED else sum(self.samples_by_worker)
        return max(1, samples // (self.workers * self.labeled_per_batch))

    def indices(self, round_: int, worker_index: int) -> Tensor:
        """int64 [B]: the samples that one worker draws in one round, counted from 0."""
        labeled = self._labeled_indices(round_, worker_index)
        if not self.unlabeled_per_batch:
            return labeled
        own = self.split is Split.OWN
        unlabeled = self._consecutive(
            self.unlabeled,
            start=(round_ if own else round_ * self.workers + worker_index) * self.unlabeled_per_batch,
            count=self.unlabeled_per_batch,
            purpose=Purpose.UNLABELED,
            counters=(worker_index,) if own else (),
        )
        together = torch.cat([labeled, unlabeled + self.samples_by_worker[worker_index]])
        generator = stream_generator(self.seed, Purpose.MIXTURE, round_, worker_index)
        return together[torch.randperm(len(together), generator=generator)]

    def _labeled_indices(self, round_: int, worker_index: int) -> Tensor:
        samples, batch = self.samples_by_worker[worker_index], self.labeled_per_batch
        if self.split is Split.OWN:
            return self._consecutive(
                samples, start=round_ * batch, count=batch, purpose=Purpose.PERMUTATION, counters=(worker_index,)
            )
        epoch, round_in_epoch = divmod(round_, self.rounds_per_epoch)
        order = _permutation(samples, self.seed, Purpose.PERMUTATION, epoch)
        start = (round_in_epoch * self.workers + worker_index) * batch
        return order[start : start + batch].clone()

    def _consecutive(
        self, samples: int, *, start: int, count: int, purpose: Purpose, counters: tuple[int, ...]
    ) -> Tensor:
        """A run of the endless sequence of permutations of `samples`, one for each cycle through them."""
        stop, runs = start + count, []
        for cycle in range(start // samples, (stop - 1) // samples + 1):
            order = _permutation(samples, self.seed, purpose, cycle, *counters)
            runs.append(order[max(start - cycle * samples, 0) : stop - cycle * samples])
        return torch.cat(runs)


@lru_cache(maxsize=4)
def _permutation(samples: int, seed: int, purpose: Purpose, *counters: int) -> Tensor:
    """The permutation of one stream; the cache spares a round the shuffling of the whole epoch."""
    return torch.randperm(samples, generator=stream_generator(seed, purpose, *counters))


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
