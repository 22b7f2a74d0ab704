"""What a run takes from another run: initial parameters, pseudo-labels. Whether it still is what the other one has."""

from __future__ import annotations

from pathlib import Path

from common.config import JobSpec
from common.errors import SpecError, refusal
from deploy import runs
from worker.checkpoint import find_checkpoint, load_checkpoint
from worker.data import Unlabeled
from worker.local_files import sha256_of
from worker.pretrained import weights_file
from worker.pseudo_labels import load_pseudo_labels


def refuse_other_init(folder: Path, job: JobSpec, source: Path) -> None:
    """Refuses a run that has started from other parameters than `source` has now.

    Args:
        folder: of the run.
        job: as its job.yaml has it, with the digest of what it has started from.
        source: folder of the other run. One without checkpoints is not asked any more.

    Raises:
        SpecError: so it is.
    """
    theirs = job.transfer.sha256
    if theirs is None or not runs.has_checkpoint(source):
        return
    sha256 = sha256_of(weights_file(source))
    if sha256 != theirs:
        rule = f"a run from the parameters that {source} has now, sha256 {sha256} (or remove the folder)"
        raise SpecError(refusal(rule, "transfer.sha256", theirs, str(folder)))


def are_labels_of(labels: Path, teacher: Path) -> bool:
    """Whether a file of pseudo-labels has been made by the model that the teacher's folder has now.

    Raises:
        DataError: another file.
    """
    digest = (runs.read_result(teacher) or {}).get("parameter_digest")
    return load_pseudo_labels(labels).made_by.get("parameter_digest") == digest


def refuse_other_labels(folder: Path, labels: Path) -> None:
    """Refuses a run that has been trained with other pseudo-labels than a file's.

    Args:
        folder: of the run; told by its checkpoint, or without one by its job, if that names them.
        labels: the file.

    Raises:
        SpecError: so it is.
        CheckpointError, DataError: a file is damaged.
    """
    theirs = _labels_of(folder)
    if not theirs:
        return
    content = load_pseudo_labels(labels)
    ours = str(Unlabeled(samples=len(content.labels), digest=content.digest()))
    if not ours.endswith(theirs):
        rule = f"a run with the pseudo-labels in {labels}, {ours} (or remove the folder)"
        raise SpecError(refusal(rule, "unlabeled", theirs, str(folder)))


def _labels_of(folder: Path) -> str:
    """What a run says of its pseudo-labels, their digest at the end; empty where nobody knows."""
    if runs.has_checkpoint(folder):
        return load_checkpoint(find_checkpoint(folder)).unlabeled
    if runs.read_result(folder) is None:
        return ""
    return runs.read_job(folder)[0].data.unlabeled_digest or ""
