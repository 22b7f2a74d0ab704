"""Trainings of a few rounds over a real server, the gradients of all workers wherever a test puts them."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from common.codecs import BlockScales, Bytes, Codec, Encoded, RandomKey
from common.config import CodecSpec, JobSpec
from common.layout import Bucket, Layout
from common.wire.v1 import ps_pb2 as wire
from tests.gpu.exchanges import Arrays
from tests.gpu.queues import host_machine
from tests.support import DEADLINE_S, in_threads, introduce, job, ready, running_servers, silent
from tests.training.test_trainer import Recording
from worker.datasets import load_dataset
from worker.exchange.coordination import End
from worker.exchange.gradients import DeviceGradient, GradientMemory, gradient_memory
from worker.exchange.ps import ParameterServerExchange
from worker.workplace import Workplace, open_device

SMALL = ("model.width=4", "data.batch_per_worker=16", "exchange.bucket_bytes=2048", "workers=2")
ATTACK = ("attack.epsilon=0.2", "attack.steps=2", "attack.step_size=0.1")
KERNEL_CODEC = ("codec.two_sided=true", "codec.block=64")
ROUNDS = 3
MemoryOf = Callable[[Tensor, Layout, JobSpec, slice], GradientMemory]


def train(settings: tuple[str, ...], device: torch.device, memory_of: MemoryOf = gradient_memory) -> list[list[str]]:
    """The parameters' digest after each round, by worker; `memory_of` stands for the trainer's `gradient_memory`."""
    spec = job(*SMALL, *ATTACK, *settings)
    with patch("worker.trainer.gradient_memory", memory_of), running_servers(spec) as servers:
        address = servers[0].address
        return in_threads([lambda n=n: _train_one(spec, address, n, device) for n in range(spec.workers)])


def _train_one(spec: JobSpec, address: str, number: int, device: torch.device) -> list[str]:
    workplace = Workplace.build(spec, load_dataset(spec.data, root=None), open_device(str(device), None), None, None)
    channel, coordination, _ = introduce(address, f"worker-{number}")
    said = ready(workplace.layout, replica_digest=workplace.replica.replica_digest())
    admission = coordination.get_ready(said, DEADLINE_S)
    exchange = ParameterServerExchange(
        layout=workplace.layout, spec=spec, admission=admission, first_round=0, emit=silent()
    )
    recording = Recording()
    trainer = workplace.trainer(exchange, admission, recording)
    trainer.rounds = ROUNDS
    trainer.run()
    end = End(ending=wire.ENDING_COMPLETED)
    exchange.close(end)
    coordination.leave(end, workplace.replica.replica_digest())
    channel.close()
    return [report.parameter_digest for report in recording.reports]


def beside(kernels: bool) -> MemoryOf:
    """A gradient that the CPU computes at once, and that leaves and comes back as late as it may."""

    def memory_of(gradient: Tensor, layout: Layout, spec: JobSpec, part: slice) -> GradientMemory:
        machine = host_machine(late=True, computes_late=False)
        codec: CodecSpec | None = spec.codec if kernels else None
        return DeviceGradient(gradient, layout, out=machine.side, back=machine.back, part=part, kernels=codec)

    return memory_of


def digests_with_kernels(_device: torch.device) -> Arrays:
    """A training whose codec is that of the kernels, interpreted."""
    return {"digests": np.array(train(KERNEL_CODEC, torch.device("cpu"), beside(kernels=True)))}


class Checked:
    """A memory whose every encoding and decoding is done again by the codec of the CPU, and compared.

    Args:
        memory: the memory.
        gradient: what it exchanges.
    """

    def __init__(self, memory: DeviceGradient, gradient: Tensor) -> None:
        self._memory, self._gradient = memory, gradient
        self._averages: list[tuple[Bucket, np.ndarray]] = []
        self.final, self.start, self.fetch, self.whole = memory.final, memory.start, memory.fetch, memory.whole
        self.room, self.store = memory.room, memory.store
        self.encoded = self.decoded = 0

    def begin(self, key: RandomKey) -> None:
        self._key = key
        self._averages = []
        self._memory.begin(key)

    def encode(self, codec: Codec, bucket: Bucket, measured: BlockScales | None, payload: Bytes) -> Encoded:
        got = self._memory.encode(codec, bucket, measured, payload)
        values = self._gradient[bucket.start : bucket.stop].cpu().numpy()
        expected = codec.encode(values, bucket.start, self._key, measured)
        assert np.array_equal(got.scales.view(np.int32), expected.scales.view(np.int32))
        assert bytes(got.payload) == bytes(expected.payload)
        self.encoded += 1
        return got

    def decode(self, codec: Codec, bucket: Bucket, encoded: Encoded, key: RandomKey) -> None:
        average = np.empty(bucket.n, np.float32)
        codec.decode(encoded, bucket.start, average, add=False, key=key)
        self._averages.append((bucket, average))
        self._memory.decode(codec, bucket, encoded, key)
        self.decoded += 1

    def settle(self) -> None:
        self._memory.settle()
        gradient = self._gradient.cpu().numpy()
        for bucket, average in self._averages:
            assert np.array_equal(gradient[bucket.start : bucket.stop].view(np.int32), average.view(np.int32))


def checked(made: list[Checked]) -> MemoryOf:
    """Checks the memory that the trainer would have; `made` gets it."""

    def memory_of(gradient: Tensor, layout: Layout, spec: JobSpec, part: slice) -> GradientMemory:
        memory = gradient_memory(gradient, layout, spec, part)
        assert isinstance(memory, DeviceGradient)
        made.append(Checked(memory, gradient))
        return made[-1]

    return memory_of


TRAINING_PROGRAMS = {"digests with kernels": digests_with_kernels}
