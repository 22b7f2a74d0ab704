"""One evaluation from its first batch to its result: what is to be done, what has come out, and who is told."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from worker.judging import autoattack
from worker.judging.folder import Folder, Part
from worker.judging.judge import Begins, Order, Unit
from worker.judging.requests import Name, Plan, Request, Sweep
from worker.judging.verdicts import Verdict, alike, fraction, robust_counts, summary, table, worst_case
from worker.record import describe_data, versions
from worker.trained import TrainedModel

CLEAN_LABEL = "clean images"


class Watcher(Protocol):
    """Is told how an evaluation goes on."""

    def begins(self, label: str, batches: int, done: int) -> None:
        """An attack, of which some batches may have been done before."""

    def stage(self, label: str, stage: str) -> None:
        """A stage of an attack begins, on one batch."""

    def judged(self, label: str, samples: int, right: int) -> None:
        """One more batch is done; samples so far, and how many of them resist."""

    def ends(self, label: str, accuracy: float, seconds: float) -> None:
        """An attack is done on all samples."""


class Unwatched:
    """Nobody is told."""

    def begins(self, label: str, batches: int, done: int) -> None:
        """See `Watcher`."""

    def stage(self, label: str, stage: str) -> None:
        """See `Watcher`."""

    def judged(self, label: str, samples: int, right: int) -> None:
        """See `Watcher`."""

    def ends(self, label: str, accuracy: float, seconds: float) -> None:
        """See `Watcher`."""


Judging = Callable[[Sequence[Unit], Begins], Iterator[tuple[Unit, Verdict]]]


@dataclass(kw_only=True)
class Run:
    """One evaluation: what is to be done, and what has come out."""

    opened: TrainedModel
    order: Order
    plan: Plan
    watcher: Watcher
    folder: Folder | None = None
    clean: Verdict = field(default_factory=lambda: Verdict.joined([]))
    verdicts: dict[Request, Verdict] = field(default_factory=dict)
    started_s: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.labels: list[int] = self.opened.dataset.test.labels[list(self.order.indices)].tolist()

    @property
    def right(self) -> list[bool]:
        """Which samples are right on the clean image."""
        return self.clean.right(self.labels)

    def judge(self, judging: Judging) -> None:
        """The clean images, always: their classes say whether what is kept is of this very model. Then the attacks."""
        self.clean = self._finish(judging, {None: self._part(None)})[None]
        done = self._finish(judging, {number: self._part(number) for number in range(len(self.order.requests))})
        self.verdicts = {request: done[number] for number, request in enumerate(self.order.requests)}

    def table(self) -> Iterator[str]:
        """samples.tsv."""
        attacks = {request.label: verdict for request, verdict in self.verdicts.items()}
        worst = None if self.plan.sweeps else self._worst(self.plan.attacks)
        return table(self.order.indices, self.labels, self.clean, attacks, worst=worst)

    def conclude(self, devices: tuple[str, ...]) -> dict[str, Any]:
        """The result, JSON-able; it is kept if there is a folder."""
        result = self.result(devices)
        if self.folder:
            self.folder.write(result, self.table())
        return result

    def result(self, devices: tuple[str, ...]) -> dict[str, Any]:
        """The result, JSON-able."""
        spec, checkpoint, attacks = self.opened.spec, self.opened.checkpoint, self.plan.attacks
        samples, right = len(self.labels), sum(self.right)
        uses_autoattack = any(request.name is Name.AUTOATTACK for request in self.order.requests)
        return {
            "model": self.opened.name,
            **({"round": checkpoint.round, "rounds": checkpoint.rounds} if checkpoint else {}),
            **({"architecture": spec.model.name.value, "weights": self.opened.weights.value} if checkpoint else {}),
            "data": spec.data.name.value,
            "samples": samples,
            "clean_accuracy": fraction(right, samples),
            **(robust_counts(self._worst(attacks), self.right) if attacks else {}),
            **({"attack": attacks[0].parameters()} if len(attacks) == 1 else {}),
            "clean_correct": right,
            "test_samples": len(self.opened.dataset.test.labels),
            "attacks": [self._summary(request) for request in attacks],
            "sweeps": [self._swept(sweep) for sweep in self.plan.sweeps],
            "seed": spec.seed,
            "batch": self.order.batch,
            "devices": list(devices),
            "threads": self.order.threads or torch.get_num_threads(),
            "model_digest": self.order.model_digest,
            **({"parameter_digest": checkpoint.parameter_digest} if checkpoint and checkpoint.parameter_digest else {}),
            "versions": {**versions(), **({autoattack.PACKAGE: autoattack.version()} if uses_autoattack else {})},
            "seconds": round(time.perf_counter() - self.started_s, 3),
        }

    def _worst(self, requests: Sequence[Request]) -> list[bool]:
        return worst_case([self.verdicts[request].right(self.labels) for request in requests])

    def _summary(self, request: Request) -> dict[str, Any]:
        verdict = self.verdicts[request]
        counts = summary(verdict, self.labels, self.right, request.stages)
        warnings = alike(verdict.warnings)
        if request.name is Name.AUTOATTACK and request.epsilon > 0:
            clean = fraction(sum(self.right), len(self.labels))
            warnings += autoattack.warnings_of_the_whole({"clean": clean, **counts["after"]})
        return {"attack": request.label, "parameters": request.parameters(), **counts, "warnings": warnings}

    def _swept(self, sweep: Sweep) -> dict[str, Any]:
        rows = [
            {
                sweep.key: getattr(row[0], sweep.key),
                "robust_accuracy": fraction(sum(self._worst(row)), len(self.labels)),
                "attacks": [{**self._summary(request), "attack": name}
                            for name, request in zip(sweep.attacks, row, strict=True)],
            }
            for row in sweep.rows
        ]  # fmt: skip
        return {"key": sweep.key, "values": list(sweep.values), "attacks": list(sweep.attacks), "rows": rows}

    def _part(self, attack: int | None) -> _Progress:
        """What is to be done of an attack, or of the clean images."""
        request = None if attack is None else self.order.requests[attack]
        part = None
        if self.folder and request:
            part = self.folder.part(request.name.value, self._identity(request))
        label = request.label if request else CLEAN_LABEL
        return _Progress(label=label, batches=self.order.batches, part=part)

    def _identity(self, request: Request) -> dict[str, Any]:
        """All that the verdicts of an attack depend on."""
        kind = type(self.opened.module)
        samples = json.dumps([self.order.indices, self.labels, self.clean.predicted])
        return {
            "model_digest": self.order.model_digest,
            "model": f"{kind.__module__}.{kind.__qualname__}",
            "data": describe_data(self.opened.dataset),
            "samples": hashlib.sha256(samples.encode()).hexdigest(),
            "batch": self.order.batch,
            "seed": self.opened.spec.seed,
            "attack": request.parameters(),
            **({autoattack.PACKAGE: autoattack.version()} if request.name is Name.AUTOATTACK else {}),
        }

    def _finish(self, judging: Judging, parts: Mapping[int | None, _Progress]) -> dict[int | None, Verdict]:
        """Does what is left to do of each; several may be under way at once."""
        for part in parts.values():
            self.watcher.begins(part.label, part.batches, len(part.verdicts))
        for part in parts.values():
            self._end_if_done(part)
        units = [Unit(key, batch) for key, part in parts.items() for batch in part.missing]
        for unit, verdict in judging(units, lambda unit, stage: self.watcher.stage(parts[unit.attack].label, stage)):
            part = parts[unit.attack]
            part.add(unit.batch, verdict)
            samples = sum(len(each.predicted) for each in part.verdicts.values())
            self.watcher.judged(part.label, samples, sum(each.found_by.count(None) for each in part.verdicts.values()))
            self._end_if_done(part)
        return {key: part.joined for key, part in parts.items()}

    def _end_if_done(self, part: _Progress) -> None:
        if not part.missing:
            verdict = part.joined
            accuracy = fraction(verdict.found_by.count(None), len(verdict.predicted))
            self.watcher.ends(part.label, accuracy, verdict.seconds)


@dataclass(kw_only=True)
class _Progress:
    """The batches of one attack, or of the clean images."""

    label: str
    batches: int
    part: Part | None
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.part:
            self.verdicts = self.part.verdicts

    @property
    def missing(self) -> list[int]:
        return [batch for batch in range(self.batches) if batch not in self.verdicts]

    @property
    def joined(self) -> Verdict:
        return Verdict.joined([self.verdicts[batch] for batch in range(self.batches)])

    def add(self, batch: int, verdict: Verdict) -> None:
        self.verdicts[batch] = verdict
        if self.part:
            self.part.add(batch, verdict)
