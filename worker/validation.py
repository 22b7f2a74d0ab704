"""Validation data: samples that are taken out of the training data, and never test data."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from common.errors import DataError, refusal
from worker.data import Dataset, Samples
from worker.randomness import Purpose, stream_generator

_SEED = 0
"""Not the job's: the same samples are held out whatever seed a model is trained with, so that none of them has been
trained on when a run goes on from another one's model."""


class SomeSamples:
    """Some of other samples, numbered anew."""

    def __init__(self, samples: Samples, indices: Tensor) -> None:
        """`indices`: int64 [n], of `samples`."""
        self._samples = samples
        self._indices = indices
        self._labels = samples.labels[indices]

    @property
    def labels(self) -> Tensor:
        """See `worker.data.Samples`."""
        return self._labels

    def images(self, indices: Tensor) -> Tensor:
        """See `worker.data.Samples`."""
        return self._samples.images(self._indices[indices])


def hold_out(dataset: Dataset, amount: float) -> Dataset:
    """Moves training samples to validation: the first of a fixed permutation, in their old order.

    A greater amount holds out the same samples and more.

    Args:
        dataset: as it was read.
        amount: a fraction of the training samples below 1, rounded to the nearest count; or a count; 0: none.

    Raises:
        DataError: nothing would be held out, or nothing left.
    """
    if amount == 0:
        return dataset
    total = len(dataset.train.labels)
    count = round(amount * total) if amount < 1 else round(amount)
    if not 0 < count < total:
        rule = f"to hold out 1 to {total - 1} of {total} training samples"
        raise DataError(refusal(rule, "data.validation", f"{amount:g}", f"{count} samples"))
    order = torch.randperm(total, generator=stream_generator(_SEED, Purpose.VALIDATION))
    held_out, kept = order[:count].sort().values, order[count:].sort().values
    return replace(dataset, train=SomeSamples(dataset.train, kept), validation=SomeSamples(dataset.train, held_out))
