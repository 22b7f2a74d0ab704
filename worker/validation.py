"""Validation data: samples that are taken out of the training data, and never test data."""

from __future__ import annotations

from dataclasses import replace

import torch

from common.errors import DataError, refusal
from worker.data import Dataset
from worker.randomness import Purpose, stream_generator
from worker.subsets import Subset, with_pixels

_SEED = 0
"""Not the job's: the same samples are held out whatever seed a model is trained with, so that none of them has been
trained on when a run goes on from another one's model."""


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
    train = with_pixels(dataset.train)
    total = len(train.labels)
    count = round(amount * total) if amount < 1 else round(amount)
    if not 0 < count < total:
        rule = f"to hold out 1 to {total - 1} of {total} training samples"
        raise DataError(refusal(rule, "data.validation", f"{amount:g}", f"{count} samples"))
    order = torch.randperm(total, generator=stream_generator(_SEED, Purpose.VALIDATION))
    held_out, kept = order[:count].sort().values, order[count:].sort().values
    return replace(dataset, train=Subset(train, kept), validation=Subset(train, held_out))
