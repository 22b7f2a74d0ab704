"""A worker that trains with the real trainer and exchange, and in turn with a plain PyTorch loop.

`python -m bench.throughput_worker SERVER HOST WORKER_NUMBER ORDERS`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from bench.gate import Gate
from bench.member import Member
from bench.plain_loop import PlainLoop
from bench.workload import OrdersFile, worker_main
from common.config import JobSpec
from common.events import Emitter
from common.layout import plan_layout
from worker.data import BatchPlan, Dataset, TensorSamples
from worker.datasets import load_dataset
from worker.evaluation import Evaluation
from worker.models import build_model
from worker.readiness import backward_order
from worker.replica import Replica
from worker.trainer import RoundReport, Trainer

KINDS = ("ours", "plain")
"""Of a block of rounds, in order; the next pair of blocks is the other way round."""
SYNTHETIC = "synthetic"
_CLASSES, _ROUNDS_PER_EPOCH = 10, 16


@dataclass(frozen=True, kw_only=True)
class ThroughputOrders(OrdersFile):
    """What the worker is to do.

    Attributes:
        blocks: of each kind, the first `warmup_blocks` of them untimed.
        block_rounds: rounds of one block.
        data: `synthetic` (images of 3 x 32 x 32) or `digits`.
        threads: of the CPU, for both kinds.
        gate, deadline_s: as in `Workload`.
    """

    blocks: int
    warmup_blocks: int
    block_rounds: int
    data: str
    threads: int
    gate: str
    deadline_s: float


class Reports:
    """A recorder that keeps what rounds cost."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def round_closed(self, report: RoundReport) -> None:
        """See `worker.trainer.Recorder`."""
        self.waited_s += report.communication_s

    def evaluated(self, round_: int, evaluation: Evaluation) -> None:
        """See `worker.trainer.Recorder`."""

    def save(self, round_: int) -> None:
        """See `worker.trainer.Recorder`."""

    def save_best(self, round_: int) -> None:
        """See `worker.trainer.Recorder`."""


def dataset_of(spec: JobSpec, name: str) -> Dataset:
    """The digits, or noise of CIFAR-10's shape."""
    if name != SYNTHETIC:
        return load_dataset(spec.data, root=None)
    count, generator = _ROUNDS_PER_EPOCH * spec.data.batch_per_worker, np.random.default_rng(0)
    pixels = torch.from_numpy(generator.integers(0, 256, (count, 3, 32, 32), np.uint8))
    samples = TensorSamples(pixels, torch.from_numpy(generator.integers(0, _CLASSES, count)))
    return Dataset(
        name=SYNTHETIC,
        train=samples,
        test=samples,
        classes=tuple(map(str, range(_CLASSES))),
        in_channels=3,
        image_size=32,
        mean=(0.5,) * 3,
        std=(0.29,) * 3,
    )


def run(server: str, host: str, _number: int, orders: ThroughputOrders, emit: Emitter) -> None:
    """Joins, runs all blocks, compares the parameters, leaves.

    Raises:
        DatpsError: the server is gone, or refuses us.
    """
    torch.set_num_threads(orders.threads)
    with Member(server, host, emit, orders.deadline_s, None) as member:
        spec, dataset = member.spec, dataset_of(member.spec, orders.data)
        model = _model(spec, dataset)
        replica = Replica(model, spec.optimizer, backward_order(model, dataset.train.images(torch.arange(2))))
        layout = plan_layout(replica.tensors, spec)
        exchange = member.join(layout, replica.replica_digest())
        plan = BatchPlan(
            samples_by_worker=(len(dataset.train.labels),),
            split=spec.data.split,
            batch_per_worker=spec.data.batch_per_worker,
            seed=spec.seed,
            workers=1,
        )
        reports = Reports()
        trainer = Trainer(
            spec=spec,
            replica=replica,
            dataset=dataset,
            plan=plan,
            worker_index=0,
            exchange=exchange,
            layout=layout,
            device=torch.device("cpu"),
            recorder=reports,
            stop_requested=lambda: False,
        )
        plain = PlainLoop(spec, _model(spec, dataset), dataset, plan)
        gate = Gate(orders.gate, orders.deadline_s)
        gate.wait()
        emit("throughput_ready", parameters=layout.d)
        for block in range(orders.blocks):
            for kind in KINDS if block % 2 == 0 else KINDS[::-1]:
                emit("throughput_block", block=block, **_block(kind, trainer, reports, plain, orders.block_rounds))
        emit("throughput_done", same_parameters=_are_same(replica.model, plain.model))
        member.final_digest = replica.replica_digest()


def _block(kind: str, trainer: Trainer, reports: Reports, plain: PlainLoop, rounds: int) -> dict[str, str | float]:
    waited_s, started_s = reports.waited_s, time.perf_counter()
    if kind == "ours":
        trainer.rounds = trainer.round + rounds
        trainer.run()
    else:
        plain.run(rounds)
    return {"kind": kind, "seconds": time.perf_counter() - started_s, "waited_s": reports.waited_s - waited_s}


def _model(spec: JobSpec, dataset: Dataset) -> nn.Module:
    return build_model(
        spec.model,
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=len(dataset.classes),
        mean=dataset.mean,
        std=dataset.std,
        seed=spec.seed,
    )


def _are_same(one: nn.Module, other: nn.Module) -> bool:
    ours, plain = one.state_dict(), other.state_dict()
    return all(torch.equal(tensor, plain[name]) for name, tensor in ours.items())


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], ThroughputOrders, run))
