"""`datps train --smoke`: a job of any recipe, small enough for a minute on two cores, on the handwritten digits.

What makes the method stays: attack, objective, smoothing, optimizer, the shape of the schedule, codec, topology,
transfer and unlabeled images. Data, network, workers, batches, steps and epochs shrink. A job that starts from another
training's parameters, or from pseudo-labels, first gets a training of its own for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.config import AttackNorm, JobSpec, Split

FIRST = "first"
"""Folder, in the run folder, of the training that comes before."""
LABELS = "pseudo-labels.safetensors"
_LABELED, _VALIDATION, _WORKERS, _BATCH, _STEPS, _COPIES, _EPOCHS = 160, 100, 2, 16, 2, 2, 2
_EPSILON = {AttackNorm.LINF: 0.2, AttackNorm.L2: 1.0}
_SOURCE, _TARGET = [str(digit) for digit in range(5)], [str(digit) for digit in range(5, 10)]


@dataclass(frozen=True, kw_only=True)
class Smoke:
    """A shrunk job.

    Attributes:
        spec: the job; of transfer and unlabeled images, without the files.
        first: the job that makes what it starts from; None if it needs nothing.
    """

    spec: JobSpec
    first: JobSpec | None


def shrunk(spec: JobSpec) -> Smoke:
    """The smoke form of a job."""
    sections = spec.model_dump(mode="json")
    sections |= {"workers": min(spec.workers, _WORKERS), "servers": 1}
    sections["model"] = {"name": "small_cnn", "width": 8, "input_size": 16 if spec.model.input_size else None}
    sections["data"] |= {"name": "digits", "split": Split.SHARED.value, "labeled": _LABELED}
    sections["data"] |= dict.fromkeys(("image_size", "classes", "mean", "std", "unlabeled_digest"))
    sections["data"]["validation"] = _VALIDATION if spec.data.validation else 0.0
    sections["data"]["batch_per_worker"] = min(spec.data.batch_per_worker, _BATCH)
    sections["attack"] |= {"epsilon": _EPSILON[spec.attack.norm], "steps": min(spec.attack.steps, _STEPS)}
    sections["attack"]["step_size"] = None
    sections["smoothing"]["samples"] = min(spec.smoothing.samples, _COPIES)
    sections["schedule"]["epochs"] = _EPOCHS
    sections["evaluation"] |= {"every_epochs": 1, "batch": 256}
    sections["evaluation"]["attack"] |= {"steps": _STEPS, "epsilon": None, "step_size": None}
    first = None
    if spec.transfer.init or spec.data.unlabeled_fraction:
        before = {**sections, "transfer": {}, "data": {**sections["data"], "unlabeled_fraction": 0.0}}
        if spec.transfer.init:
            sections["transfer"]["sha256"] = None
            sections["data"]["classes"], before["data"]["classes"] = _TARGET, _SOURCE
        first = JobSpec.model_validate(before)
    return Smoke(spec=JobSpec.model_validate(sections), first=first)


def files_for(spec: JobSpec, folder: Path, train_first: Callable[[Path], None]) -> tuple[Path | None, Path | None]:
    """What a shrunk job starts from: (unlabeled, init), made by the training in `folder`/first.

    `train_first`: trains the job that comes first in the folder that it is given.

    Raises:
        DatpsError: it could not be made.
    """
    first = folder / FIRST
    if not spec.transfer.init and not spec.data.unlabeled_fraction:
        return None, None
    train_first(first)
    labels = None
    if spec.data.unlabeled_fraction:
        from worker.labeling import pseudo_label

        labels = folder / LABELS
        pseudo_label(str(first), "held-back", labels)
    return labels, first if spec.transfer.init else None
