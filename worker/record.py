"""What a worker leaves behind: events, and in its run folder rounds.jsonl, checkpoints and result.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from common.config import JobSpec
from common.errors import SpecError, StorageError, refusal
from common.events import Emitter
from worker.checkpoint import Checkpoint, forget_after, save_checkpoint
from worker.data import Dataset
from worker.evaluation import Evaluation
from worker.overfitting import OverfittingCheck
from worker.replica import Replica
from worker.residuals import Residuals
from worker.trainer import RoundReport

JOB, ROUNDS, RESULT, CHECKPOINTS = "job.yaml", "rounds.jsonl", "result.json", "checkpoints"
_SUMS = ("attack_s", "compute_s", "communication_s", "evaluation_s", "round_s", "pushed_bytes", "pulled_bytes")


class RunFolder:
    """The files of one worker's run."""

    def __init__(self, path: Path, *, resumed: Checkpoint | None, anew: bool = False) -> None:
        """Changes nothing yet.

        Args:
            path: the run folder; created by `begin` if absent.
            resumed: the checkpoint that the run goes on from; None for a new run.
            anew: a run that ended here before its first checkpoint may be started anew.

        Raises:
            SpecError: the folder holds rounds of another run.
        """
        self.path = path
        self._rounds = path / ROUNDS
        self._resumed_round = resumed.round if resumed else 0
        own = resumed is not None and resumed.path.resolve().parent == (path / CHECKPOINTS).resolve()
        lines = self._lines()
        if lines and not own and not (anew and resumed is None):
            rule = "a folder without rounds of another run (or --resume)"
            raise SpecError(refusal(rule, "out", path, f"{ROUNDS} has {len(lines)}"))
        self._kept = [line for line in lines if line["round"] <= self._resumed_round]
        self.seconds_before = sum(line["round_s"] for line in self._kept)

    def begin(self, spec: JobSpec) -> None:
        """Makes the folder, and job.yaml if there is none; forgets what came after the checkpoint that is resumed.

        Raises:
            StorageError: the folder cannot be written.
        """
        with _storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / JOB).exists():
                self._replace(self.path / JOB, spec.to_yaml())
            self._replace(self._rounds, "".join(json.dumps(line) + "\n" for line in self._kept))
            forget_after(self.path / CHECKPOINTS, self._resumed_round)

    def append(self, line: dict[str, Any]) -> None:
        """Adds one line to rounds.jsonl.

        Raises:
            StorageError: the disk is full.
        """
        with _storing(self._rounds), self._rounds.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def sums(self) -> dict[str, float]:
        """Sums over all rounds in the folder, also those before a resume in the same one, and their number."""
        lines = self._lines()
        return {"rounds": len(lines), **{name: sum(line[name] for line in lines) for name in _SUMS}}

    def write_result(self, result: dict[str, Any]) -> None:
        """Writes result.json.

        Raises:
            StorageError: the disk is full.
        """
        with _storing(self.path):
            self._replace(self.path / RESULT, json.dumps(result, indent=1) + "\n")

    def _replace(self, file: Path, text: str) -> None:
        """Writes under a temporary name, then renames: the file is whole, the old one or the new one."""
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(file)

    def _lines(self) -> list[dict[str, Any]]:
        if not self._rounds.exists():
            return []
        return list(_whole_lines(self._rounds.read_text().splitlines()))


class RunRecorder:
    """Tells a trainer's progress as events, and keeps it if there is a run folder."""

    def __init__(
        self,
        *,
        emit: Emitter,
        spec: JobSpec,
        replica: Replica,
        dataset: Dataset,
        rounds: int,
        folder: RunFolder | None,
        device: str = "",
        residuals: Residuals | None = None,
    ) -> None:
        """`device`: what the result names; if empty, where the parameters are. `residuals`: what each worker saves."""
        self._residuals = residuals
        self._device = device or str(replica.parameters.theta.device)
        self._emit = emit
        self._spec = spec
        self._replica = replica
        self._dataset = dataset
        self._rounds = rounds
        self._folder = folder
        self._seconds = folder.seconds_before if folder else 0.0
        self._round, self._overfitted = 0, ""

    def round_closed(self, report: RoundReport) -> None:
        """See `worker.trainer.Recorder`."""
        self._seconds += report.round_s
        self._round = report.round
        line = {**dataclasses.asdict(report), "seconds": self._seconds}
        line = {name: round(v, 6) if isinstance(v, float) else v for name, v in line.items()}
        if self._folder:
            self._folder.append(line)
        self._emit("round", **line)

    def evaluated(self, round_: int, evaluation: Evaluation) -> None:
        """See `worker.trainer.Recorder`."""
        self._emit("evaluation", round=round_, samples=evaluation.samples, **accuracies(evaluation))

    def checked(self, round_: int, check: OverfittingCheck, *, overfits: bool, ends: bool) -> None:
        """See `worker.trainer.Recorder`."""
        accuracies = {"attacked_accuracy": check.attacked_accuracy, "pgd_accuracy": check.pgd_accuracy}
        self._emit("overfitting_check", round=round_, samples=check.samples, **accuracies)
        if not overfits:
            return
        found = f"catastrophic overfitting, {check.in_words(self._spec.overfitting.steps)}"
        self._overfitted = self._overfitted or (found if ends else "")
        end = "; the training ends here" if ends else ""
        self._emit("overfitting", round=round_, text=f"round {round_}: {found}{end}")

    def save(self, round_: int) -> None:
        """See `worker.trainer.Recorder`; without a run folder nothing but this worker's residual is saved."""
        if self._residuals:
            self._residuals.save(round_, self._replica.parameter_digest())
        if not self._folder:
            return
        description = {
            "round": round_,
            "rounds": self._rounds,
            "spec": self._spec.model_dump(mode="json"),
            "data": describe_data(self._dataset),
            "classes": len(self._dataset.classes),
            "in_channels": self._dataset.in_channels,
            "image_size": self._dataset.image_size,
            "mean": self._dataset.mean,
            "std": self._dataset.std,
            "parameter_digest": self._replica.parameter_digest().hex(),
            "versions": versions(),
        }
        tensors, keep = self._replica.state_tensors(), self._spec.checkpoint.keep
        path = save_checkpoint(self._folder.path / CHECKPOINTS, tensors, description, keep=keep)
        self._emit("checkpoint", round=round_, path=str(path))

    def finish(self, evaluation: Evaluation) -> None:
        """Writes and tells the result of a complete training."""
        if not self._folder:
            return
        sums = self._folder.sums()
        recorded = max(sums["rounds"], 1)
        ended = f"ended after round {self._round} of {self._rounds}: {self._overfitted}"
        result = {
            "job_id": self._spec.job_id,
            **accuracies(evaluation),
            "samples": evaluation.samples,
            "rounds": self._round if self._overfitted else self._rounds,
            **({"ended": ended} if self._overfitted else {}),
            "workers": self._spec.workers,
            "servers": self._spec.servers,
            "parameters": self._replica.parameters.theta.numel(),
            "pushed_bytes_per_round": sums["pushed_bytes"] / recorded,
            "pulled_bytes_per_round": sums["pulled_bytes"] / recorded,
            "seconds": round(sums["round_s"], 3),
            "attack_seconds": round(sums["attack_s"], 3),
            "compute_seconds": round(sums["compute_s"], 3),
            "communication_seconds": round(sums["communication_s"], 3),
            "evaluation_seconds": round(sums["evaluation_s"], 3),
            "parameter_digest": self._replica.parameter_digest().hex(),
            "device": self._device,
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        self._folder.write_result(result)
        self._emit("result", **result)


def accuracies(evaluation: Evaluation) -> dict[str, float]:
    """TA and RA as fractions."""
    return {"clean_accuracy": evaluation.clean_accuracy, "robust_accuracy": evaluation.robust_accuracy}


def describe_data(dataset: Dataset) -> str:
    """What the workers of a job, or a model and its data, must agree on: size of the images, and the classes' names."""
    digest = hashlib.sha256("\n".join(dataset.classes).encode()).hexdigest()[:16]
    size = f"{dataset.in_channels}x{dataset.image_size}x{dataset.image_size}"
    return f"{size} pixels, {len(dataset.classes)} classes with sha256 {digest}"


def versions() -> dict[str, str]:
    """Versions of what determines the numbers."""
    names = ("datps", "torch", "torchvision", "numpy", "grpcio", "protobuf")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """What the operating system refuses is told as an error of the storage."""
    try:
        yield
    except OSError as error:
        raise StorageError(refusal("a folder with room to write", "path", path, str(error))) from None


def _whole_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Lines up to the first that is not a round's, or was cut off by the end of its process."""
    for line in lines:
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            return
        if not isinstance(content, dict) or not {"round", *_SUMS} <= set(content):
            return
        yield content
