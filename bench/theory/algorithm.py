"""Algorithm A1 on the problem of `problem.py`, in one process, with the project's own codecs, reducer and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from bench.theory.problem import Float64, Indices, Problem
from common.codecs import SERVER, Float32, RandomKey
from common.config import CodecSpec, JobSpec, OptimizerSpec
from common.layout import TensorSpec, plan_layout, pull_codec, push_codec
from ps.reduce import ShardReducer
from worker.optimizers import Lamb, Layer
from worker.randomness import Purpose, stream_generator

START_DISTANCE = 1.5
"""Of a far start from b, in every element."""


class Start(StrEnum):
    """Where training begins."""

    FAR = "far"
    STATIONARY = "stationary"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        rounds: T.
        workers: M; each has an equal run of the samples.
        batch: B, drawn with replacement; None: all samples of the worker, every time.
        codec: Q of Algorithm A1, lines 7 and, with `two_sided`, 10.
        attack_steps: of the inner ascent; None: its exact maximum.
        optimizer: of `Lamb`; its learning rate is eta of all rounds.
        start: where theta_1 is.
        seed: of the start, the batches and the codec.
    """

    rounds: int
    workers: int
    batch: int | None
    codec: CodecSpec
    attack_steps: int | None
    optimizer: OptimizerSpec
    start: Start
    seed: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one training gave.

    Attributes:
        mean_squared_gradient: (1 / T) sum_t |grad Psi(theta_t)|^2, the left-hand side of (A25).
        descent_left: Psi(theta_1) minus a lower bound of Psi, which is at least Delta_Psi.
        inner_error: the largest |grad phi(delta) - grad phi(delta*)|^2 over rounds and samples, epsilon of (A22).
        certified_inner_error: the largest L_phi^2 / mu times the gap of Definition 1, which Lemma 1 says is no less.
    """

    mean_squared_gradient: float
    descent_left: float
    inner_error: float
    certified_inner_error: float


class Averaging:
    """Lines 7-10: every worker's gradient is encoded, added at one server, divided, encoded and decoded again."""

    def __init__(self, lengths: list[int], run: Run) -> None:
        spec = JobSpec(seed=run.seed, workers=run.workers, codec=run.codec)
        tensors = [TensorSpec(name=f"layer{i}", shape=(n,), buffer=False) for i, n in enumerate(lengths)]
        layout = plan_layout(tensors, spec)
        self._seed = run.seed
        self._buckets = layout.buckets
        self._push, self._pull = push_codec(layout, spec), pull_codec(layout, spec, 0)
        self._reducer = ShardReducer(layout, spec, 0)
        self._average = np.empty(layout.d, np.float32)

    def average(self, gradients: Float32, round_: int) -> Float32:
        """The average (A3) as all workers decode it, valid until the next call.

        Args:
            gradients: float32 of shape (M, d).
            round_: from 0.
        """
        for worker, gradient in enumerate(gradients):
            key = RandomKey(seed=self._seed, round=round_, source=worker)
            measured = self._push.measure(gradient, 0)
            for bucket in self._buckets:
                values = gradient[bucket.start : bucket.stop]
                encoded = self._push.encode(values, bucket.start, key, measured)
                self._reducer.add(bucket.number, encoded, worker=worker, round_=round_, first=worker == 0)
        key = RandomKey(seed=self._seed, round=round_, source=SERVER)
        averages = dict(self._reducer.publish(round_, tuple(bucket.number for bucket in self._buckets)))
        for bucket in self._buckets:
            out = self._average[bucket.start : bucket.stop]
            self._pull.decode(averages[bucket.number], bucket.start, out, add=False, key=key)
        return self._average


class Workers:
    """Lines 3-6: all workers' batches, perturbations and gradients."""

    def __init__(self, problem: Problem, run: Run) -> None:
        self._problem, self._run = problem, run
        self._own = problem.shares(run.workers)
        self._whole_tilts = problem.tilts[self._own].mean(axis=1)
        self._whole_shifts = problem.shifts[self._own]
        self._batches = self._draw() if run.batch is not None else None
        self.inner_error = 0.0
        self.largest_gap = 0.0

    def gradients(self, theta: Float64, round_: int) -> Float64:
        """g_t^(i) of (A2) for all workers, shape (M, d)."""
        problem = self._problem
        if self._batches is None:
            tilts, shifts = self._whole_tilts, self._whole_shifts
        else:
            samples = self._own[np.arange(self._run.workers)[:, None], self._batches[:, round_]]
            tilts, shifts = problem.tilts[samples].mean(axis=1), problem.shifts[samples]
        return problem.gradient(theta, tilts, self._perturbations(theta, shifts).mean(axis=1))

    def _perturbations(self, theta: Float64, shifts: Float64) -> Float64:
        problem = self._problem
        slopes = problem.slopes(theta)
        if self._run.attack_steps is None:
            return problem.maximizers(slopes, shifts)
        deltas = problem.ascend(slopes, shifts, self._run.attack_steps)
        errors = ((deltas - problem.maximizers(slopes, shifts)) @ problem.mixing) * np.cos(theta)
        self.inner_error = max(self.inner_error, float((errors**2).sum(axis=-1).max()))
        self.largest_gap = max(self.largest_gap, float(problem.gaps(slopes, shifts, deltas).max()))
        return deltas

    def _draw(self) -> Indices:
        """Places within each worker's samples: shape (M, T, B); a longer training begins with the same ones."""
        run = self._run
        streams = (stream_generator(run.seed, Purpose.PERMUTATION, worker) for worker in range(run.workers))
        shape = (run.rounds, run.batch or 1)
        draws = [torch.randint(self._own.shape[1], shape, generator=generator) for generator in streams]
        return torch.stack(draws).numpy()


def start_of(problem: Problem, start: Start, seed: int) -> Float64:
    """theta_1: a stationary point, or at distance START_DISTANCE from b in every element, up or down by the seed."""
    if start is Start.STATIONARY:
        return problem.stationary_point()
    generator = stream_generator(seed, Purpose.PARAMETERS, 1)
    signs = torch.randint(2, (problem.spec.d,), generator=generator) * 2 - 1
    return problem.centre + START_DISTANCE * signs.numpy()


def train(problem: Problem, run: Run) -> Outcome:
    """Algorithm A1; the exact gradient of Psi is measured before every update."""
    lengths = [problem.spec.width] * problem.spec.layers
    offsets = [problem.spec.width * index for index in range(problem.spec.layers)]
    layers = [
        Layer(name=f"layer{index}", shape=(length,), offset=offset)
        for index, (length, offset) in enumerate(zip(lengths, offsets, strict=True))
    ]
    parameters = torch.from_numpy(start_of(problem, run.start, run.seed)).float()
    optimizer, averaging, workers = Lamb(run.optimizer, layers), Averaging(lengths, run), Workers(problem, run)
    descent_left = problem.value(parameters.numpy().astype(np.float64)) - problem.lower_bound()
    total = 0.0
    for round_ in range(run.rounds):
        theta = parameters.numpy().astype(np.float64)
        exact = problem.full_gradient(theta)
        total += float(exact @ exact)
        gradients = workers.gradients(theta, round_).astype(np.float32)
        average = averaging.average(gradients, round_)
        optimizer.update(parameters, torch.from_numpy(average), run.optimizer.learning_rate)
    mixing_norm = np.linalg.norm(problem.mixing, 2)
    return Outcome(
        mean_squared_gradient=total / run.rounds,
        descent_left=descent_left,
        inner_error=workers.inner_error,
        certified_inner_error=float(mixing_norm**2 / problem.concavities.min() * workers.largest_gap),
    )
