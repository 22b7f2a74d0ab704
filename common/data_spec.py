"""The job spec's section `data`: the data set, which of its samples are used, and what a batch is made of."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from typing import Self

from pydantic import Field, field_validator, model_validator

from common.errors import refusal
from common.section import Number, Section, number

_DIGEST = re.compile(r"[0-9a-f]{32}")


class DatasetName(StrEnum):
    DIGITS = "digits"
    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"
    IMAGEFOLDER = "imagefolder"


class Split(StrEnum):
    SHARED = "shared"
    OWN = "own"


class DataSpec(Section):
    """The data set and how its samples are divided among the workers."""

    name: DatasetName = DatasetName.DIGITS
    """Data set."""
    split: Split = Split.SHARED
    """`shared`: one data set, reshuffled and divided anew each epoch; `own`: each worker has its own folder."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side of the square images in pixels after resizing; needed by `imagefolder` unless all images are of one size."""
    classes: tuple[str, ...] | None = None
    """Names of the classes that are kept, for training and test; numbered in the data set's order. All where absent."""
    mean: tuple[Number, ...] | None = None
    """Per channel, for the normalization inside the model; the data set's own where absent."""
    std: tuple[Number, ...] | None = None
    """As `mean`: a fine-tuned model may keep both from its pre-training."""
    labeled: int | Number | None = None
    """How many training images keep their label, as evenly over the classes as can be: a number, or a fraction below 1.
    The others are left out; `datps pseudo-label MODEL held-back` makes unlabeled data of them. All where absent."""
    labeled_seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Which images keep it: a choice of its own, so that runs of several seeds and a pseudo-labeler can share it."""
    unlabeled_fraction: Number = Field(default=0.0, ge=0, lt=1)
    """Part of each worker's batch that is drawn from pseudo-labeled images (`--unlabeled FILE`), in whole images,
    halves rounded up. An epoch is a pass over the labeled images."""
    unlabeled_digest: str | None = None
    """XXH3-128 of that file's pixels and pseudo-labels in hex, whatever else the file says; `datps train` fills it in.
    Any file where absent. With `split=own` each worker has a file of its own, and none is named."""
    augment: bool = False
    """Training images: random crop after 4 pixels of zero padding, and horizontal flip."""
    batch_per_worker: int = Field(default=64, ge=1)
    """Samples that each worker draws per round (B of the paper)."""
    validation: Number = Field(default=0.0, ge=0)
    """Training samples that are held out, a fraction or from 1 on a count (`split=own`: of each worker): evaluations
    during training judge on them instead of the test data."""

    @property
    def unlabeled_per_batch(self) -> int:
        """How many of the B samples of a batch are pseudo-labeled ones."""
        return math.floor(self.unlabeled_fraction * self.batch_per_worker + 0.5)

    @field_validator("classes", mode="before")
    @classmethod
    def _classes_are_names(cls, value: object) -> object:
        if value is None:
            return None
        # The digits' classes are called "0" to "9", and YAML reads those as numbers.
        names = [str(name) if type(name) is int else name for name in value] if isinstance(value, (list, tuple)) else []
        if len(names) < 2 or len(set(map(str, names))) < len(names) or not all(isinstance(name, str) for name in names):
            raise ValueError(refusal("at least two names, each once", "classes", value))
        return tuple(names)

    @field_validator("std")
    @classmethod
    def _std_is_positive(cls, std: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if std is not None and min(std, default=0) <= 0:
            raise ValueError(refusal("numbers above 0, one for each channel", "std", list(std)))
        return std

    @field_validator("labeled", mode="before")
    @classmethod
    def _labeled_is_a_number_or_a_fraction(cls, value: object) -> object:
        labeled = number(value)
        if labeled is None or (type(labeled) is int and labeled >= 1):
            return labeled
        if not (isinstance(labeled, float) and 0 < labeled < 1):
            raise ValueError(refusal("a whole number of at least 1, or a fraction below 1", "labeled", value))
        return labeled

    @field_validator("unlabeled_digest", mode="before")
    @classmethod
    def _unlabeled_digest_is_hex(cls, value: object) -> object:
        if value is not None and not (isinstance(value, str) and _DIGEST.fullmatch(value)):
            raise ValueError(refusal("32 digits of 0-9 and a-f", "unlabeled_digest", value))
        return value

    @field_validator("validation")
    @classmethod
    def _validation_is_a_fraction_or_a_count(cls, amount: float) -> float:
        if amount >= 1 and amount != int(amount):
            raise ValueError(refusal("a fraction below 1, or a whole number", "validation", amount))
        return amount

    @model_validator(mode="after")
    def _batches_hold_both_kinds(self) -> Self:
        batch, unlabeled = self.batch_per_worker, self.unlabeled_per_batch
        if self.unlabeled_fraction > 0 and not 0 < unlabeled < batch:
            rule = f"at least one labeled and one unlabeled image in a batch of batch_per_worker={batch}"
            context = f"{unlabeled} unlabeled images"
            raise ValueError(refusal(rule, "unlabeled_fraction", self.unlabeled_fraction, context))
        return self

    @model_validator(mode="after")
    def _one_file_is_named_where_all_workers_have_one(self) -> Self:
        if self.unlabeled_digest is None:
            return self
        if not self.unlabeled_fraction:
            rule = "unlabeled_fraction above 0 with unlabeled_digest"
            raise ValueError(refusal(rule, "unlabeled_fraction", self.unlabeled_fraction))
        if self.split is not Split.SHARED:
            rule = "split=shared with unlabeled_digest"
            raise ValueError(refusal(rule, "split", self.split, "with `own` each worker has a file of its own"))
        return self
