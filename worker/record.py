"""What a worker leaves behind: events, and in its run folder rounds.jsonl, checkpoints and result.json."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from common.config import DataSpec, JobSpec, Split
from common.errors import SpecError, StorageError, refusal
from common.events import Emitter
from worker.checkpoint import BEST, Checkpoint, best_checkpoint, copy_best, forget_after, save_checkpoint
from worker.data import Dataset
from worker.evaluation import Evaluation
from worker.overfitting import OverfittingCheck
from worker.replica import Replica
from worker.residuals import Residuals
from worker.selection import Best, Conclusion
from worker.trainer import RoundReport

JOB, ROUNDS, EVALUATIONS = "job.yaml", "rounds.jsonl", "evaluations.jsonl"
RESULT, CHECKPOINTS = "result.json", "checkpoints"
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
        self._resumed = resumed
        self._resumed_round = resumed.round if resumed else 0
        own = resumed is not None and resumed.path.resolve().parent == (path / CHECKPOINTS).resolve()
        lines = self._lines()
        evaluated = _json_lines(path / EVALUATIONS) if own else []
        # those of the checkpoint's own state are made anew: a round begins with the evaluation of what came before it
        self._kept_evaluations = [line for line in evaluated if line.get("round", 0) < self._resumed_round]
        if lines and not own and not (anew and resumed is None):
            rule = "a folder without rounds of another run (or --resume)"
            raise SpecError(refusal(rule, "out", path, f"{ROUNDS} has {len(lines)}"))
        self._kept = [line for line in lines if line["round"] <= self._resumed_round]
        self.seconds_before = sum(line["round_s"] for line in self._kept)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / CHECKPOINTS

    def begin(self, spec: JobSpec) -> None:
        """Makes the folder, and job.yaml if there is none; forgets what came after the checkpoint that is resumed.

        Raises:
            StorageError: the folder cannot be written.
        """
        with _storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / JOB).exists():
                self._replace(self.path / JOB, spec.to_yaml())
            for file, kept in ((ROUNDS, self._kept), (EVALUATIONS, self._kept_evaluations)):
                self._replace(self.path / file, "".join(json.dumps(line) + "\n" for line in kept))
            forget_after(self.path / CHECKPOINTS, self._resumed_round)
        self._take_over_best()

    def _take_over_best(self) -> None:
        """Copies the best model so far from the folder of the checkpoint that is resumed, if that is another one."""
        if self._resumed and best_checkpoint(self.checkpoints, self._resumed.selection.round) is None:
            best = best_checkpoint(self._resumed.path.parent, self._resumed.selection.round)
            if best:
                copy_best(best, self.checkpoints)

    def append(self, line: dict[str, Any], file: str = ROUNDS) -> None:
        """Adds one line to rounds.jsonl, or to evaluations.jsonl.

        Raises:
            StorageError: the disk is full.
        """
        with _storing(self.path / file), (self.path / file).open("a") as stream:
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
        return list(takewhile(lambda line: {"round", *_SUMS} <= set(line), _json_lines(self._rounds)))


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
        data = "validation" if self._dataset.validation else "test"
        line = {"round": round_, "data": data, "samples": evaluation.samples, **accuracies(evaluation)}
        if self._folder:
            epoch = round(round_ * self._spec.schedule.epochs / self._rounds, 4)
            self._folder.append({"epoch": epoch, **line}, EVALUATIONS)
        self._emit("evaluation", **line)

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
        self._save(round_)

    def save_best(self, round_: int) -> None:
        """See `worker.trainer.Recorder`."""
        self._save(round_, best=True)

    def _save(self, round_: int, *, best: bool = False) -> None:
        if not self._folder:
            return
        description = {
            "round": round_,
            "rounds": self._rounds,
            "spec": self._spec.model_dump(mode="json"),
            "data": describe_data(self._dataset),
            "unlabeled": describe_unlabeled(self._dataset, self._spec.data),
            "classes": len(self._dataset.classes),
            "in_channels": self._dataset.in_channels,
            "image_size": self._dataset.image_size,
            "mean": self._dataset.mean,
            "std": self._dataset.std,
            "selection": self._replica.selection.to_json(),
            "parameter_digest": self._replica.parameter_digest().hex(),
            "versions": versions(),
        }
        tensors, keep = self._replica.state_tensors(), self._spec.checkpoint.keep
        path = save_checkpoint(self._folder.checkpoints, tensors, description, keep=keep, best=best)
        self._emit("checkpoint", round=round_, path=str(path))

    def finish(self, conclusion: Conclusion) -> None:
        """Writes and tells the result of a complete training."""
        if not self._folder:
            return
        sums = self._folder.sums()
        recorded = max(sums["rounds"], 1)
        ended = f"ended after round {self._round} of {self._rounds}: {self._overfitted}"
        result = {
            "job_id": self._spec.job_id,
            **accuracies(conclusion.test),
            "samples": conclusion.test.samples,
            **(on_validation_data(conclusion.validation) if conclusion.validation else {}),
            "weights": "ema" if self._replica.average else "raw",
            **({"best": described(conclusion.best)} if conclusion.best else {}),
            **({"stopped_early": conclusion.round < self._rounds} if self._spec.evaluation.patience else {}),
            "rounds": conclusion.round,
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


def on_validation_data(evaluation: Evaluation) -> dict[str, float]:
    """TA and RA on validation data, as fractions."""
    return {f"validation_{name}": value for name, value in accuracies(evaluation).items()}


def described(best: Best) -> dict[str, Any]:
    """The best model on validation data; its accuracies are on the test data, as those of the last one."""
    return {
        "round": best.round,
        **on_validation_data(best.validation),
        "validation_samples": best.validation.samples,
        **(accuracies(best.test) if best.test else {}),
        "checkpoint": f"{CHECKPOINTS}/{BEST}" if best.test else None,
    }


def describe_data(dataset: Dataset) -> str:
    """What the workers of a job, or a model and its data, must agree on: size of the images, and the classes' names."""
    size = f"{dataset.in_channels}x{dataset.image_size}x{dataset.image_size}"
    return f"{size} pixels, {describe_classes(dataset)}"


def describe_classes(dataset: Dataset) -> str:
    """Number of the classes, and a digest of their names."""
    digest = hashlib.sha256("\n".join(dataset.classes).encode()).hexdigest()[:16]
    return f"{len(dataset.classes)} classes with sha256 {digest}"


def describe_training_data(dataset: Dataset, spec: DataSpec) -> str:
    """What the workers of a job must agree on: `describe_data`, and the unlabeled images if they divide them."""
    unlabeled = describe_unlabeled(dataset, spec)
    return describe_data(dataset) + (f", {unlabeled}" if unlabeled else "")


def describe_unlabeled(dataset: Dataset, spec: DataSpec) -> str:
    """Number and digest of the unlabeled images; empty if there are none, or each worker has its own."""
    return str(dataset.unlabeled) if dataset.unlabeled and spec.split is Split.SHARED else ""


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


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a file up to the first that is no object, or was cut off by the end of its process."""
    lines: list[dict[str, Any]] = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(content, dict):
            break
        lines.append(content)
    return lines
