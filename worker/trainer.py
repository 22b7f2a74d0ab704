"""The training loop of one worker: Algorithm A1, lines 3 to 13."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from common.config import JobSpec, Split
from common.layout import Layout
from common.timeline import OFF, Timeline
from worker.attacks import Attack, make_attack
from worker.computing import computing
from worker.curriculum import Curriculum
from worker.data import BatchPlan, Dataset, augment
from worker.evaluation import Evaluation, evaluate
from worker.exchange.base import Exchange, Traffic
from worker.exchange.gradients import gradient_memory
from worker.feeding import Feed
from worker.local.team import Alone, Team
from worker.metrics import RoundMetrics
from worker.objectives import LocalCost, local_cost
from worker.overfitting import OverfittingCheck, check_attack, check_overfitting
from worker.randomness import Purpose, round_generator
from worker.readiness import BucketReadiness, watch_layers
from worker.replays import Replays
from worker.replica import Replica
from worker.schedules import Schedule
from worker.smoothing import draw_noise, noise_generators, smoothed


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One closed round; losses and counts are over all workers, times are this worker's, in seconds.

    `round` counts closed rounds, from 1; `parameter_digest` is that of the parameters after it. `communication_s` is
    what the worker waited for averages, `exchange_s` how long the exchange took, which backward may have hidden.
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
    exchange_s: float
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
        """After an evaluation by all workers, of the model after `round_` rounds, on validation or test data."""

    def checked(self, round_: int, check: OverfittingCheck, *, overfits: bool, ends: bool) -> None:
        """After a check for overfitting in the last of `round_` rounds, by all workers; `ends`: the training does."""

    def save(self, round_: int) -> None:
        """Asks for a checkpoint of the state after `round_` rounds."""

    def save_best(self, round_: int) -> None:
        """Asks for a checkpoint of the state after `round_` rounds, the best so far on validation data."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """This process's part of what a worker draws in a round."""

    images: torch.Tensor
    labels: torch.Tensor
    start: torch.Tensor
    """Where the attack starts."""
    noise: torch.Tensor | None
    """Of the noisy copies, if the training is smoothed."""


@dataclass(kw_only=True)
class _Stopwatch:
    """Seconds by phase; on a GPU a phase ends when its work has.

    Its work is that of the current stream. What the exchange does beside it goes on, and the threads that do it are not
    waited for.
    """

    device: torch.device
    timeline: Timeline
    round: int
    last_s: float = 0.0

    def __post_init__(self) -> None:
        self.last_s = time.perf_counter()
        self._last_ns = self.timeline.now_ns()

    def lap(self, phase: str) -> float:
        """Ends a phase and begins the next; returns its seconds."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        self.timeline.add(phase, self._last_ns, "rounds", round=self.round)
        now_s, self._last_ns = time.perf_counter(), self.timeline.now_ns()
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
        layout: Layout,
        device: torch.device,
        recorder: Recorder,
        stop_requested: Callable[[], bool],
        first_round: int = 0,
        timeline: Timeline = OFF,
        team: Team | None = None,
    ) -> None:
        self._timeline = timeline
        self._team = team or Alone()
        self.spec = spec
        self.replica = replica
        self.rounds = spec.schedule.epochs * plan.rounds_per_epoch
        self.round = first_round
        self._dataset = dataset
        self._plan = plan
        self._feed = Feed(
            dataset.train,
            lambda number: plan.indices(number, worker_index),
            part=self._team.part,
            device=device,
            batches=-(-self.rounds // spec.attack.replays),
        )
        self._worker_index = worker_index
        self._exchange = exchange
        self._device = device
        self._recorder = recorder
        self._stop_requested = stop_requested
        self._model = computing(spec.compute, replica.model)
        self._curriculum = Curriculum(spec.attack, rounds=self.rounds)
        self._replays = Replays(spec.attack.replays)
        self._stopping = self._overfitted = False
        self._digest = replica.parameter_digest()
        self._gradient = gradient_memory(replica.parameters.gradient, layout, spec, self._team.exchanged)
        self._readiness = BucketReadiness(layout, exchange.ready)
        self._overlaps = self._team.size == 1  # a part's gradient is not the worker's
        if self._overlaps:
            watch_layers(replica.parameters.parameters, self._readiness.layer_done)
        self._schedule = Schedule.of_job(spec, self.rounds)

    def run(self) -> bool:
        """Trains to the end, or until a worker or server is asked to stop; True if the training is complete.

        With replays it stops after the last round of a batch: what is kept between the others is in no checkpoint.
        """
        self.replica.model.train()
        try:
            return self._run()
        finally:
            self._feed.close()

    def _run(self) -> bool:
        while not self.is_complete:
            metrics = self._one_round(self.round)
            self.round += 1
            if metrics.evaluation:
                self._recorder.evaluated(self.round - 1, metrics.evaluation)
            if metrics.check:
                self._heed(metrics.check)
            self._stopping = self._stopping or metrics.stop > 0
            complete = self.is_complete
            stop = self._stopping and self._replays.between_batches(self.round) and not complete
            if stop or complete or self._checkpoint_is_due():
                self._recorder.save(self.round)
            if stop or complete:
                return complete
        return True

    @property
    def is_complete(self) -> bool:
        """All rounds are over, or early stopping or overfitting has ended the training."""
        ended = self._overfitted or self.replica.selection.is_over(self.spec.evaluation.patience)
        return self.round >= self.rounds or (ended and self._replays.between_batches(self.round))

    def _one_round(self, round_: int) -> RoundMetrics:
        """Iteration t = round_ + 1 of Algorithm A1."""
        watch = _Stopwatch(device=self._device, timeline=self._timeline, round=round_)
        started_s = watch.last_s
        evaluation = self._evaluate_share(round_)
        evaluation_s = watch.lap("evaluate")
        attack = make_attack(self._curriculum.attack(round_))
        batch = self._draw(round_, attack)  # line 4
        attacked = smoothed(self._model, batch.noise)
        perturbed = self._replays.perturb(attack, attacked, batch.images, batch.labels, batch.start)  # line 5, (A1)
        attack_s = watch.lap("attack")
        check = self._check(round_, attack, attacked, batch, perturbed)
        evaluation_s += watch.lap("check")
        cost = self._compute_gradient(round_, batch, perturbed)  # line 6, (A2), and line 7 as it goes on
        self._replays.after_backward(attack, round_, batch.images, perturbed)
        compute_s = watch.lap("forward and backward")
        traffic, metrics = self._average(cost, evaluation, check)  # lines 8 to 10, (A3)
        communication_s = watch.lap("wait for averages")
        if metrics.evaluation and self._dataset.validation:
            self._select(round_, metrics.evaluation)
            evaluation_s += watch.lap("keep the best")
        learning_rate = self._schedule.learning_rate(round_)
        self.replica.update(learning_rate)  # line 12, (A4)
        self._team.share_parameters(self.replica.parameters.theta)
        self._digest = self.replica.parameter_digest()
        compute_s += watch.lap("update")
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

    def _draw(self, round_: int, attack: Attack) -> _Batch:
        """This process's part of the worker's batch.

        Random numbers are drawn for the whole batch, or for each sample, so that a sample meets the same ones whoever
        has it.
        """
        number, part = self._replays.batch(round_), self._team.part
        fed = self._feed.batch(number)
        images = fed.images
        if self.spec.data.augment:
            images = augment(images, self._generator(number, Purpose.AUGMENTATION))
        start = attack.start(images, self._generator(number, Purpose.ATTACK))
        owner = None if self.spec.data.split is Split.SHARED else self._worker_index
        generators = noise_generators(self.spec.seed, number, fed.indices[part].tolist(), owner, self._device)
        noise = draw_noise(self.spec.smoothing, images[part], generators)
        return _Batch(images=images[part], labels=fed.labels, start=start[part], noise=noise)

    def _compute_gradient(self, round_: int, batch: _Batch, perturbed: torch.Tensor) -> LocalCost:
        """Forward and backward; a process that is alone pushes each bucket as soon as backward has finished it."""
        self.replica.parameters.zero_gradient()
        objective = self.spec.objective
        cost = local_cost(objective, self._model, batch.images, perturbed, batch.labels, noise_NSCHW=batch.noise)
        self._readiness.begin()
        if self._overlaps:
            self._exchange.begin(round_, self._gradient, self._digest)
            cost.loss.backward()
        else:
            cost.loss.backward()
            self._team.average_gradient(self.replica.parameters.gradient)
            self._exchange.begin(round_, self._gradient, self._digest)
        self._readiness.finish()
        return cost

    def _average(
        self, cost: LocalCost, evaluation: Evaluation | None, check: OverfittingCheck | None
    ) -> tuple[Traffic, RoundMetrics]:
        own = RoundMetrics(
            loss=float(cost.loss.detach()),
            train_samples=cost.samples,
            train_correct=int(cost.perturbed_correct),
            evaluation_samples=evaluation.samples if evaluation else 0,
            clean_correct=evaluation.clean_correct if evaluation else 0,
            robust_correct=evaluation.robust_correct if evaluation else 0,
            stop=self._stop_requested() or self._exchange.stop_requested is not None,
            checked_samples=check.samples if check else 0,
            attacked_correct=check.attacked_correct if check else 0,
            pgd_correct=check.pgd_correct if check else 0,
        )
        state = self._team.average_state(self.replica.state_vector(own.to_vector()))
        traffic = self._team.conclude(state, self._exchange.finish(state))
        average = self.replica.take_state(state)
        return traffic, RoundMetrics.from_average(average, self.spec.workers)

    def _evaluate_share(self, round_: int) -> Evaluation | None:
        """This process's share of the evaluation of the parameters before this round, if one is due."""
        if round_ == 0 or not self._is_due(self.spec.evaluation.every_epochs, round_):
            return None
        # With data of its own, a worker has test and validation data of its own, all of it its share.
        shared = self.spec.data.split is Split.SHARED
        index, workers = (self._worker_index, self.spec.workers) if shared else (0, 1)
        samples = self._dataset.test
        if self._dataset.validation:
            samples = self._dataset.validation
            self.replica.mark_judged()
        with self.replica.judged() as model:
            return evaluate(
                model,
                samples,
                self.spec.evaluation_attack,
                batch=self.spec.evaluation.batch,
                seed=self.spec.seed,
                worker_index=index + workers * self._team.local_rank,
                workers=workers * self._team.size,
                device=self._device,
            )

    def _select(self, round_: int, evaluation: Evaluation) -> None:
        """Keeps the model that was judged in this round, which is yet to be updated, if it is the best so far."""
        self.replica.selection = self.replica.selection.after(round_, evaluation)
        if self.replica.selection.round == round_:
            with self.replica.as_judged():
                self._recorder.save_best(round_)

    def _check(
        self, round_: int, attack: Attack, model: torch.nn.Module, batch: _Batch, perturbed: torch.Tensor
    ) -> OverfittingCheck | None:
        """This process's share of the check for overfitting, if this round is the last of an epoch that has one."""
        if not self._is_due(self.spec.overfitting_check_epochs, round_ + 1):
            return None
        if self.spec.attack.replays > 1:  # what a replay trains on has not been attacked with these parameters
            perturbed = attack.perturb(model, batch.images, batch.labels, batch.start)
        pgd = make_attack(check_attack(self.spec, self._curriculum.attack(round_)))
        whole = batch.images.new_zeros((self.spec.data.batch_per_worker, *batch.images.shape[1:]))
        whole[self._team.part] = batch.images
        start = pgd.start(whole, self._generator(round_, Purpose.OVERFITTING))[self._team.part]
        return check_overfitting(model, batch.images, perturbed, batch.labels, pgd, start)

    def _heed(self, check: OverfittingCheck) -> None:
        """Tells the outcome of a check, and remembers it if the training is to end."""
        overfits = check.overfits(self.spec.overfitting.least_ratio)
        ends = overfits and self.spec.overfitting.stop
        self._overfitted = self._overfitted or ends
        self._recorder.checked(self.round, check, overfits=overfits, ends=ends)

    def _checkpoint_is_due(self) -> bool:
        """Whether an epoch that asks for a checkpoint has ended with, or in, the batch that has just ended."""
        rounds = range(self.round, self.round - self.spec.attack.replays, -1)
        due = any(self._is_due(self.spec.checkpoint.every_epochs, round_) for round_ in rounds)
        return due and self._replays.between_batches(self.round)

    def _is_due(self, every_epochs: int, round_: int) -> bool:
        """Whether so many epochs have ended with `round_` rounds, again."""
        return every_epochs > 0 and round_ % (every_epochs * self._plan.rounds_per_epoch) == 0

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
            exchange_s=traffic.seconds,
            parameter_digest=self._digest.hex(),
            **numbers,
        )
