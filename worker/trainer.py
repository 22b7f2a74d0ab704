"""The training loop of one worker: Algorithm A1, lines 3 to 13."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from common.config import JobSpec, Split
from worker.attacks import make_attack
from worker.data import BatchPlan, Dataset, augment
from worker.evaluation import Evaluation, evaluate
from worker.exchange.base import Exchange, Traffic
from worker.metrics import RoundMetrics
from worker.objectives import LocalCost, local_cost
from worker.randomness import Purpose, round_generator
from worker.replica import Replica
from worker.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One closed round; losses and counts are over all workers, times are this worker's, in seconds.

    `round` counts closed rounds, from 1; `parameter_digest` is that of the parameters after it.
    """

    round: int
    rounds: int
    epoch: float
    loss: float
    train_accuracy: float
    learning_rate: float
    attack_s: float
    compute_s: float
    communication_s: float
    evaluation_s: float
    round_s: float
    pushed_bytes: int
    pulled_bytes: int
    parameter_digest: str


class Recorder(Protocol):
    """What the trainer tells of its progress."""

    def round_closed(self, report: RoundReport) -> None:
        """After every round."""

    def evaluated(self, round_: int, evaluation: Evaluation) -> None:
        """After an evaluation by all workers, of the parameters after `round_` rounds."""

    def save(self, round_: int) -> None:
        """Asks for a checkpoint of the state after `round_` rounds."""


@dataclass(kw_only=True)
class _Stopwatch:
    """Seconds by phase; on a GPU a phase ends when its work has."""

    device: torch.device
    last_s: float = 0.0

    def __post_init__(self) -> None:
        self.last_s = time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now_s = time.perf_counter()
        lap_s, self.last_s = now_s - self.last_s, now_s
        return lap_s


class Trainer:
    """Runs the rounds of one worker."""

    def __init__(
        self,
        *,
        spec: JobSpec,
        replica: Replica,
        dataset: Dataset,
        plan: BatchPlan,
        worker_index: int,
        exchange: Exchange,
        device: torch.device,
        recorder: Recorder,
        stop_requested: Callable[[], bool],
        first_round: int = 0,
    ) -> None:
        self.spec = spec
        self.replica = replica
        self.rounds = spec.schedule.epochs * plan.rounds_per_epoch
        self.round = first_round
        self._dataset = dataset
        self._plan = plan
        self._worker_index = worker_index
        self._exchange = exchange
        self._device = device
        self._recorder = recorder
        self._stop_requested = stop_requested
        self._attack = make_attack(spec.attack)
        self._digest = replica.parameter_digest()
        self._schedule = Schedule(spec.schedule, learning_rate=spec.optimizer.learning_rate, rounds=self.rounds)

    def run(self) -> bool:
        """Trains to the end, or until a worker or server is asked to stop; True if the training is complete."""
        self.replica.model.train()
        while self.round < self.rounds:
            metrics = self._one_round(self.round)
            self.round += 1
            if metrics.evaluation:
                self._recorder.evaluated(self.round - 1, metrics.evaluation)
            stop = metrics.stop > 0 and self.round < self.rounds
            if stop or self._is_due(self.spec.checkpoint.every_epochs) or self.round == self.rounds:
                self._recorder.save(self.round)
            if stop:
                return False
        return True

    def _one_round(self, round_: int) -> RoundMetrics:
        """Iteration t = round_ + 1 of Algorithm A1."""
        watch = _Stopwatch(device=self._device)
        started_s = watch.last_s
        evaluation = self._evaluate_share(round_)
        evaluation_s = watch.lap()
        images, labels = self._draw(round_)  # line 4
        perturbed = self._attack(  # line 5, (A1)
            self.replica.model, images, labels, self._generator(round_, Purpose.ATTACK)
        )
        attack_s = watch.lap()
        cost = self._compute_gradient(images, perturbed, labels)  # line 6, (A2)
        compute_s = watch.lap()
        traffic, metrics = self._average(round_, cost, evaluation)  # lines 7 to 10, (A3)
        communication_s = watch.lap()
        learning_rate = self._schedule.learning_rate(round_)
        parameters = self.replica.parameters
        self.replica.optimizer.update(parameters.theta, parameters.gradient, learning_rate)  # line 12, (A4)
        self._digest = self.replica.parameter_digest()
        compute_s += watch.lap()
        self._recorder.round_closed(
            self._report(
                round_,
                metrics,
                traffic,
                learning_rate=learning_rate,
                attack_s=attack_s,
                compute_s=compute_s,
                communication_s=communication_s,
                evaluation_s=evaluation_s,
                round_s=watch.last_s - started_s,
            )
        )
        return metrics

    def _draw(self, round_: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices = self._plan.indices(round_, self._worker_index)
        images = self._dataset.train.images(indices).to(self._device)
        labels = self._dataset.train.labels[indices].to(self._device)
        if self.spec.data.augment:
            images = augment(images, self._generator(round_, Purpose.AUGMENTATION))
        return images, labels

    def _compute_gradient(self, images: torch.Tensor, perturbed: torch.Tensor, labels: torch.Tensor) -> LocalCost:
        self.replica.parameters.zero_gradient()
        cost = local_cost(self.spec.objective, self.replica.model, images, perturbed, labels)
        cost.loss.backward()
        return cost

    def _average(self, round_: int, cost: LocalCost, evaluation: Evaluation | None) -> tuple[Traffic, RoundMetrics]:
        own = RoundMetrics(
            loss=float(cost.loss.detach()),
            train_samples=cost.samples,
            train_correct=int(cost.perturbed_correct),
            evaluation_samples=evaluation.samples if evaluation else 0,
            clean_correct=evaluation.clean_correct if evaluation else 0,
            robust_correct=evaluation.robust_correct if evaluation else 0,
            stop=self._stop_requested() or self._exchange.stop_requested is not None,
        )
        gradient, state = self.replica.gradient_vector(), self.replica.state_vector(own.to_vector())
        traffic = self._exchange.average(round_, gradient, state, self._digest)
        self.replica.take_gradient(gradient)
        average = self.replica.take_state(state)
        return traffic, RoundMetrics.from_average(average, self.spec.workers)

    def _evaluate_share(self, round_: int) -> Evaluation | None:
        """This worker's share of the evaluation of the parameters before this round, if one is due."""
        if round_ == 0 or not self._is_due(self.spec.evaluation.every_epochs):
            return None
        shared = (
            self.spec.data.split is Split.SHARED
        )  # otherwise everyone has test data of its own, all of it its share
        return evaluate(
            self.replica.model,
            self._dataset.test,
            self.spec.evaluation_attack,
            batch=self.spec.evaluation.batch,
            seed=self.spec.seed,
            worker_index=self._worker_index if shared else 0,
            workers=self.spec.workers if shared else 1,
            device=self._device,
        )

    def _is_due(self, every_epochs: int) -> bool:
        return every_epochs > 0 and self.round % (every_epochs * self._plan.rounds_per_epoch) == 0

    def _generator(self, round_: int, purpose: Purpose) -> torch.Generator:
        return round_generator(self.spec.seed, round_, self._worker_index, purpose, self._device)

    def _report(self, round_: int, metrics: RoundMetrics, traffic: Traffic, **numbers: float) -> RoundReport:
        return RoundReport(
            round=round_ + 1,
            rounds=self.rounds,
            epoch=round((round_ + 1) / self._plan.rounds_per_epoch, 4),
            loss=metrics.loss / self.spec.workers,
            train_accuracy=metrics.train_correct / max(metrics.train_samples, 1),
            pushed_bytes=traffic.pushed_bytes,
            pulled_bytes=traffic.pulled_bytes,
            parameter_digest=self._digest.hex(),
            **numbers,
        )
