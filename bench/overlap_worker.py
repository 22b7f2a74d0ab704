"""A worker that measures overlap: the exchange alone, backward alone, and both at once, in turn.

`python -m bench.overlap_worker SERVER HOST WORKER_NUMBER ORDERS`. Model, gradient and hooks are real, the images are
noise; the forward pass is not timed, since nothing can be exchanged during it.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.gate import Gate
from bench.member import Member
from bench.workload import OrdersFile, worker_main
from common.codecs import Float32
from common.config import JobSpec
from common.events import Emitter
from common.layout import BucketKind, Layout, plan_layout
from common.timeline import Timeline
from worker.exchange.base import Exchange, Traffic
from worker.exchange.gradients import HostGradient
from worker.metrics import RoundMetrics
from worker.models import build_model
from worker.readiness import BucketReadiness, backward_order, watch_layers
from worker.replica import Replica

PHASES = ("exchange", "backward", "both")
"""Of a cycle, in order."""
IMAGE_SIZE, CLASSES = 32, 10
_DIGEST = bytes(16)


@dataclass(frozen=True, kw_only=True)
class OverlapOrders(OrdersFile):
    """What the worker is to do.

    Attributes:
        cycles: how often all phases are run, the first `warmup_cycles` of them untimed.
        batch: images of a backward pass.
        threads: of the CPU, for backward.
        gate: path of the starting line.
        deadline_s: for joining, and for any one phase.
        traces: folder for timelines; None: there are none.
    """

    cycles: int
    warmup_cycles: int
    batch: int
    threads: int
    gate: str
    deadline_s: float
    traces: str | None = None


class Phases:
    """The three phases on one worker; times are in seconds from the common start."""

    def __init__(
        self, replica: Replica, exchange: Exchange, layout: Layout, batch: tuple[Tensor, Tensor], gate: Gate
    ) -> None:
        self._replica, self._exchange, self._gate = replica, exchange, gate
        self._gradient = HostGradient(replica.parameters.gradient.numpy())
        self._images, self._labels = batch
        self._buckets = [bucket.number for bucket in layout.of_kind(BucketKind.GRADIENT)]
        self._readiness = BucketReadiness(layout, exchange.ready)
        self._hooked = False
        self._round = 0
        watch_layers(replica.parameters.parameters, self._layer_done)

    def exchange(self) -> dict[str, float]:
        """A gradient that is complete, and nothing to do beside."""
        self._gate.wait()
        started_s = time.perf_counter()
        self._begin()
        self._exchange.ready(self._buckets)
        traffic = self._finish()
        return {"exchange_s": time.perf_counter() - started_s, "waited_s": traffic.waited_s}

    def backward(self) -> dict[str, float]:
        """Backward, and nothing to exchange."""
        loss = self._forward()
        self._gate.wait()
        started_s = time.perf_counter()
        loss.backward()
        return {"backward_s": time.perf_counter() - started_s}

    def both(self) -> dict[str, float]:
        """As the trainer does it: each bucket is exchanged as soon as backward has finished it."""
        loss = self._forward()
        self._gate.wait()
        started_s = time.perf_counter()
        self._begin()
        self._readiness.begin()
        self._hooked = True
        loss.backward()
        self._hooked = False
        self._readiness.finish()
        backward_s = time.perf_counter() - started_s
        traffic = self._finish()
        return {
            "backward_s": backward_s,
            "waited_s": traffic.waited_s,
            "exchange_s": traffic.seconds,
            "both_s": time.perf_counter() - started_s,
        }

    def _forward(self) -> Tensor:
        self._replica.parameters.zero_gradient()
        return F.cross_entropy(self._replica.model(self._images), self._labels)

    def _begin(self) -> None:
        self._exchange.begin(self._round, self._gradient, _DIGEST)
        self._round += 1

    def _finish(self) -> Traffic:
        return self._exchange.finish(self._state())

    def _state(self) -> Float32:
        return self._replica.state_vector(RoundMetrics().to_vector())

    def _layer_done(self, layer: int) -> None:
        if self._hooked:
            self._readiness.layer_done(layer)


def synthetic_batch(batch: int) -> tuple[Tensor, Tensor]:
    """Noise and labels, always the same."""
    generator = np.random.default_rng(0)
    images = generator.random((batch, 3, IMAGE_SIZE, IMAGE_SIZE), np.float32)
    return torch.from_numpy(images), torch.from_numpy(generator.integers(0, CLASSES, batch))


def build_replica(spec: JobSpec, images: Tensor) -> Replica:
    """The job's model on images of the laboratory's kind."""
    model = build_model(
        spec.model,
        in_channels=3,
        image_size=IMAGE_SIZE,
        classes=CLASSES,
        mean=(0.5,) * 3,
        std=(0.3,) * 3,
        seed=spec.seed,
    )
    return Replica(model, spec.optimizer, backward_order(model, images[:2]))


def run(server: str, host: str, _number: int, orders: OverlapOrders, emit: Emitter) -> None:
    """Joins, runs all cycles, leaves.

    Raises:
        DatpsError: a server or another worker is gone, or refuses us.
    """
    torch.set_num_threads(orders.threads)
    with Member(server, host, emit, orders.deadline_s, orders.traces) as member:
        images, labels = synthetic_batch(orders.batch)
        replica = build_replica(member.spec, images)
        layout = plan_layout(replica.tensors, member.spec)
        exchange = member.join(layout, replica.replica_digest())
        gate = Gate(orders.gate, orders.deadline_s)
        phases = Phases(replica, exchange, layout, (images, labels), gate)
        replica.model.train()
        emit("overlap_ready", parameters=layout.d, buckets=len(layout.buckets))
        for cycle in range(orders.cycles):
            for phase in PHASES:
                said = _timed(phases, phase, member.timeline)
                emit("overlap_phase", cycle=cycle, phase=phase, **said)
        gate.wait()


def _timed(phases: Phases, phase: str, timeline: Timeline) -> dict[str, float]:
    start_ns = timeline.now_ns()
    said = {"exchange": phases.exchange, "backward": phases.backward, "both": phases.both}[phase]()
    timeline.add(phase, start_ns, "phases")
    return said


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], OverlapOrders, run))
