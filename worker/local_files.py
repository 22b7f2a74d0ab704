"""Files that a process is given beside the job spec: whether the job asks for them. Needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from common.config import DataSpec, TransferSpec
from common.errors import SpecError, refusal

_PART_BYTES = 1 << 20


def refuse_unfit_unlabeled(spec: DataSpec, path: Path | None) -> None:
    """Refuses a file of unlabeled data that the job has no use for, and a job that lacks one.

    Raises:
        SpecError: the one or the other.
    """
    if path is None and spec.unlabeled_per_batch:
        rule = "a file of pseudo-labeled images (--unlabeled FILE)"
        raise SpecError(refusal(rule, "unlabeled", None, f"data.unlabeled_fraction={spec.unlabeled_fraction:g}"))
    if path is not None and not spec.unlabeled_per_batch:
        rule = "data.unlabeled_fraction above 0 with --unlabeled"
        raise SpecError(refusal(rule, "data.unlabeled_fraction", spec.unlabeled_fraction, str(path)))
    if path is not None and not path.is_file():
        raise SpecError(refusal("a file that exists", "unlabeled", path))


def held_back_of(spec: DataSpec) -> dict[str, Any]:
    """What says of which images' labels have been held back: validation samples are taken out before that."""
    keys = {"name", "classes", "split", "validation", "labeled", "labeled_seed"}
    return spec.model_dump(mode="json", include=keys)


def refuse_unfit_init(spec: TransferSpec, path: Path | None) -> None:
    """Refuses initial parameters that the job has no use for, and a job that lacks them.

    Raises:
        SpecError: the one or the other.
    """
    if path is None and spec.init:
        raise SpecError(refusal("a file of initial parameters (--init FILE)", "init", None, "transfer.init=true"))
    if path is not None and not spec.init:
        raise SpecError(refusal("transfer.init=true with --init", "transfer.init", False, str(path)))


def sha256_of(path: Path) -> str:
    """Of a file, in hex.

    Raises:
        SpecError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while part := stream.read(_PART_BYTES):
                digest.update(part)
    except OSError as error:
        raise SpecError(refusal("a file that can be read", "file", path, error.strerror or "")) from None
    return digest.hexdigest()
