"""Workers of several local processes, each a thread here: as `worker.local.member` runs them, over real servers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from common.config import JobSpec
from common.wire.v1 import ps_pb2 as wire
from tests.support import introduce, ready, running_servers, silent
from tests.training.test_trainer import Recording
from worker.checkpoint import Checkpoint
from worker.data import Dataset
from worker.datasets import load_dataset
from worker.exchange.coordination import Admission, End
from worker.exchange.ps import ParameterServerExchange
from worker.local.group import LocalGroup, Store, join_store
from worker.local.team import LocalTeam
from worker.workplace import Workplace

CPU = torch.device("cpu")
WAIT_S = 60.0
SMALL = ("model.width=4", "data.batch_per_worker=16", "exchange.bucket_bytes=2048")
"""A model of 2,358 parameters in several buckets."""
ATTACK = ("attack.epsilon=0.2", "attack.steps=2", "attack.step_size=0.1")


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one local process of a worker has after some rounds."""

    workplace: Workplace
    recording: Recording
    replica_digest: bytes
    state: dict[str, Tensor]

    @property
    def theta(self) -> Tensor:
        return self.workplace.replica.parameters.theta


def together(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs functions at the same time; their results, or the first exception."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(WAIT_S) for future in [pool.submit(function) for function in work]]


def with_groups(size: int, work: Callable[[LocalGroup, int], Any]) -> list[Any]:
    """`work(group, local_rank)` in as many threads as there are processes."""
    store = Store()

    def run(rank: int) -> Any:
        own = store.store if rank == 0 else join_store(store.port)
        return work(LocalGroup(own, rank, size, CPU, WAIT_S), rank)

    return together([lambda rank=rank: run(rank) for rank in range(size)])


@cache
def dataset_of(spec: JobSpec) -> Dataset:
    return load_dataset(spec.data, root=None)


def train(
    spec: JobSpec,
    sizes: Sequence[int],
    rounds: int,
    checkpoint: Checkpoint | None = None,
) -> list[list[Share]]:
    """All workers of a job, worker i of `sizes[i]` local processes; what each has after round `rounds`."""
    with running_servers(spec) as servers:
        address = servers[0].address
        workers = [Worker(spec, address, number, size, rounds, checkpoint) for number, size in enumerate(sizes)]
        shares = together([lambda w=worker, r=rank: w.run(r) for worker in workers for rank in range(worker.size)])
    return [shares[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]


class Worker:
    """One worker of several threads."""

    def __init__(
        self,
        spec: JobSpec,
        address: str,
        number: int,
        size: int,
        rounds: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.size = size
        self._spec, self._address, self._number, self._rounds = spec, address, number, rounds
        self._checkpoint = checkpoint
        self._store = Store()
        self._admission: Future[Admission] = Future()

    def run(self, rank: int) -> Share:
        try:
            return self._run(rank)
        except BaseException as error:
            if not self._admission.done():
                self._admission.set_exception(error)
            raise

    def _run(self, rank: int) -> Share:
        spec = self._spec
        team = LocalTeam(spec, rank, self.size) if self.size > 1 else None
        workplace = Workplace.build(spec, dataset_of(spec), CPU, self._checkpoint, team)
        if team:
            team.meet(self._store.store if rank == 0 else join_store(self._store.port), CPU)
        digest = workplace.replica.replica_digest()
        leave = self._join(workplace, digest) if rank == 0 else None
        admission = self._admission.result(WAIT_S)
        exchange = ParameterServerExchange(
            layout=workplace.layout,
            spec=spec,
            admission=admission,
            first_round=workplace.round,
            emit=silent(),
            carried=team.carried(workplace.layout) if team else None,
        )
        recording = Recording()
        trainer = workplace.trainer(exchange, admission, recording)
        trainer.rounds = self._rounds
        trainer.run()
        digest = workplace.replica.replica_digest()
        state = workplace.replica.state_tensors()
        end = End(ending=wire.ENDING_COMPLETED)
        exchange.close(end)
        if leave:
            leave(end, digest)
        return Share(workplace=workplace, recording=recording, replica_digest=digest, state=state)

    def _join(self, workplace: Workplace, digest: bytes) -> Callable[[End, bytes], None]:
        channel, coordination, _ = introduce(self._address, f"worker-{self._number}")
        samples = len(workplace.dataset.train.labels)
        said = ready(workplace.layout, replica_digest=digest, round=workplace.round, samples=samples)
        self._admission.set_result(coordination.get_ready(said, WAIT_S))

        def leave(end: End, final: bytes) -> None:
            coordination.leave(end, final)
            channel.close()

        return leave
