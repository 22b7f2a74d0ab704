"""Residuals of error feedback on disk: each worker's own, for the same rounds as the run's checkpoints.

    FOLDER/round-000150/residual-3.safetensors      after 150 rounds, of the worker with index 3

Workers may share the folder, or each have its own. A file is written under a temporary name, flushed and renamed, so it
is whole or absent. Workers write theirs independently of each other and of the checkpoint: after a crash in the middle
of saving, the newest round that has them all is the one to go on from (`newest_whole`). So one round more of them is
kept than of checkpoints, and a file names the parameters that it belongs to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from common.errors import CheckpointError, SpecError, StorageError, refusal
from common.layout import Layout
from worker.checkpoint import checkpoint_name
from worker.exchange.feedback import ErrorFeedback, Float64

FORMAT = "1"
_TENSOR = "residual"


class Residuals:
    """One worker's residual: what it has in memory, and its files."""

    def __init__(self, folder: Path, feedback: ErrorFeedback, *, layout: Layout, worker_index: int, keep: int) -> None:
        """
        Args:
            folder: where they are kept.
            feedback: whose residual it is.
            layout: of the gradient vector.
            worker_index: of this worker.
            keep: how many checkpoints the run keeps, at least 1.
        """
        self._folder = folder
        self._feedback = feedback
        self._vector = vector_digest(layout)
        self._worker_index = worker_index
        self._keep = keep + 1  # the checkpoint of a round is saved after the residuals, if no crash comes between

    def begin(self, round_: int, parameter_digest: bytes, *, anew: bool) -> None:
        """Goes on with the residual after `round_` rounds, and forgets those of later rounds.

        Args:
            round_: 0: training begins, there is none.
            parameter_digest: of the parameters after `round_` rounds.
            anew: a run that ended here before its first checkpoint may be started anew.

        Raises:
            SpecError: training begins, and the folder has residuals of another run.
            CheckpointError: the file is missing, damaged, of another vector, or of another run.
        """
        own = dict(self._own())
        if round_ == 0 and own and not anew:
            rule = "a folder without residuals of another run (or --resume)"
            raise SpecError(refusal(rule, "state", self._folder, f"{own[max(own)]} is there"))
        if round_ > 0:
            self._feedback.load(self._read(self._path(round_), self._described(round_, parameter_digest)))
        for later in own:
            if later > round_:
                self._remove(own[later])

    def save(self, round_: int, parameter_digest: bytes) -> None:
        """Saves the residual after `round_` rounds, and removes all but the newest.

        Args:
            round_: how many rounds have closed.
            parameter_digest: of the parameters after them.

        Raises:
            StorageError: the disk is full, or the folder cannot be written.
        """
        path = self._path(round_)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")
        residual = self._feedback.residual
        metadata = {**self._described(round_, parameter_digest), "residual_xxh3_128": _digest(residual)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for abandoned in self._folder.glob(f"round-*/.{path.stem}.*"):
                abandoned.unlink(missing_ok=True)
            save_file({_TENSOR: residual}, temporary, metadata)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            raise StorageError(refusal("a folder with room to write", "path", path, str(error))) from None
        own = dict(self._own())
        for round_before in sorted(own)[: -self._keep]:
            self._remove(own[round_before])

    def _path(self, round_: int) -> Path:
        return residual_file(self._folder, round_, self._worker_index)

    def _own(self) -> Iterator[tuple[int, Path]]:
        """Rounds and files of this worker."""
        for path in self._folder.glob(f"round-*/residual-{self._worker_index}.safetensors"):
            with contextlib.suppress(ValueError):
                yield int(path.parent.name.removeprefix("round-")), path

    def _described(self, round_: int, parameter_digest: bytes) -> dict[str, str]:
        """What a file says of itself, beside the digest of its content."""
        return {
            "format": FORMAT,
            "round": str(round_),
            "worker_index": str(self._worker_index),
            "vector_sha256": self._vector,
            "parameter_digest": parameter_digest.hex(),
        }

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others still have theirs there
            path.parent.rmdir()

    def _read(self, path: Path, described: dict[str, str]) -> Float64:
        if not path.exists():
            rule = f"this worker's residual after round {described['round']}"
            raise CheckpointError(refusal(rule, "file", path, "missing"))
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, residual = file.metadata() or {}, np.asarray(file.get_tensor(_TENSOR))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(refusal("a whole residual", "file", path, str(error))) from None
        for name, value in {**described, "residual_xxh3_128": _digest(residual)}.items():
            if metadata.get(name) != value:
                raise CheckpointError(refusal(f"{name}={value}", name, metadata.get(name), str(path)))
        return residual


def residual_file(folder: Path, round_: int, worker_index: int) -> Path:
    """Where a worker's residual is."""
    return folder / checkpoint_name(round_) / f"residual-{worker_index}.safetensors"


def newest_whole(folder: Path, checkpoints: Path, workers: int) -> Path | None:
    """The newest checkpoint for which all workers' residuals are in `folder`; None if there is none."""
    for checkpoint in sorted(checkpoints.glob("round-*"), key=lambda path: (len(path.name), path.name), reverse=True):
        beside = folder / checkpoint.name
        if all((beside / f"residual-{index}.safetensors").exists() for index in range(workers)):
            return checkpoint
    return None


def _digest(residual: Float64) -> str:
    return xxhash.xxh3_128_hexdigest(residual.data)


def vector_digest(layout: Layout) -> str:
    """SHA-256 of what lies where in the gradient vector; cuts into buckets and shards may change."""
    parameters = [[tensor.name, list(tensor.shape)] for tensor in layout.tensors if not tensor.buffer]
    return hashlib.sha256(json.dumps(parameters, separators=(",", ":")).encode()).hexdigest()
