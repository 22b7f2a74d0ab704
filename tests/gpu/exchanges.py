"""Whole rounds through a real server, gradients of some workers on a device: what is pushed, and what comes back."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from common.codecs import Codec, Encoded, Float32, RandomKey
from common.config import CodecSpec
from common.errors import CodecError
from common.layout import Bucket, BucketKind, Layout, TensorSpec, plan_layout
from common.node_memory import NodeMemory
from common.wire.frames import BucketMessage, read_worker_message
from tests.gpu.queues import HostQueue, Machine, machines
from tests.support import DEADLINE_S, in_threads, introduce, job, ready, running_servers, silent
from worker.exchange.base import Traffic
from worker.exchange.gradients import DeviceGradient, GradientMemory, HostGradient
from worker.exchange.ps import ParameterServerExchange

ROUNDS = 2
TENSORS = (
    TensorSpec(name="conv.weight", shape=(16, 5, 3, 3), buffer=False),
    TensorSpec(name="conv.bias", shape=(16,), buffer=False),
    TensorSpec(name="fc.weight", shape=(10, 147), buffer=False),
    TensorSpec(name="bn.running_mean", shape=(24,), buffer=True),
    TensorSpec(name="@metrics", shape=(7,), buffer=True),
)
"""Small, since interpreted kernels are slow."""
Memory = TypeVar("Memory", bound=DeviceGradient)
Arrays = dict[str, np.ndarray]
Program = Callable[[torch.device], Arrays]
Pushed = dict[tuple[int, int], tuple[str, bytes, bytes]]
"""By round and bucket: codec, scales and payload."""


class Place(Protocol):
    """Where a worker's gradient is computed, exchanged and used."""

    def memory(self, layout: Layout) -> GradientMemory:
        """The memory of all rounds; called once."""
        ...

    def compute(self, values: Float32, ready: Callable[[Iterable[int]], None]) -> None:
        """Computes a gradient and says of each bucket that it is ready."""
        ...

    def average(self) -> Float32:
        """The gradient that the next thing on the stream that computes would see."""
        ...


class OnHost:
    """A gradient that the host computes.

    Args:
        gate: gives something in each round before the gradient is ready; None: it is ready at once.
    """

    def __init__(self, gate: queue.SimpleQueue[None] | None = None) -> None:
        self._gate = gate

    def memory(self, layout: Layout) -> GradientMemory:
        self._layout = layout
        self._vector = np.empty(layout.d, np.float32)
        return HostGradient(self._vector)

    def compute(self, values: Float32, ready: Callable[[Iterable[int]], None]) -> None:
        self._vector[:] = values
        if self._gate:
            self._gate.get(timeout=DEADLINE_S)
        ready(bucket.number for bucket in self._layout.of_kind(BucketKind.GRADIENT))

    def average(self) -> Float32:
        return self._vector.copy()


class OnDevice:
    """A gradient that a machine computes bucket by bucket, after it has been set to zero, as backward does.

    Args:
        machine: whose queues it uses.
        kernels: whether the job's codec may use them.
        shuffled: buckets become ready in another order than that of their numbers.
    """

    def __init__(self, machine: Machine, *, kernels: CodecSpec | None, shuffled: bool = False) -> None:
        self.machine = machine
        self._kernels, self._shuffled = kernels, shuffled

    def memory(self, layout: Layout) -> GradientMemory:
        memory = self._make(DeviceGradient, layout)
        memory.warm()
        return memory

    def _make(self, kind: type[Memory], layout: Layout) -> Memory:
        self.buckets = layout.of_kind(BucketKind.GRADIENT)
        self.gradient = torch.full((layout.d,), torch.nan, device=self.machine.device)
        return kind(self.gradient, layout, out=self.machine.side, back=self.machine.back, kernels=self._kernels)

    def compute(self, values: Float32, ready: Callable[[Iterable[int]], None]) -> None:
        source = torch.from_numpy(values.copy()).to(self.machine.device)
        self.machine.current.run(self.gradient.zero_)
        order = [*self.buckets[1::2], *self.buckets[::2]] if self._shuffled else self.buckets
        for bucket in order:
            part = slice(bucket.start, bucket.stop)
            self.machine.current.run(lambda part=part: self.gradient[part].copy_(source[part]))
            ready([bucket.number])

    def average(self) -> Float32:
        seen = torch.empty_like(self.gradient)
        self.machine.current.run(lambda: seen.copy_(self.gradient))
        self.machine.current.mark().synchronize()
        return seen.cpu().numpy()


@dataclass
class Account:
    """What one worker has pushed and got."""

    averages: list[bytes] = field(default_factory=list)
    states: list[bytes] = field(default_factory=list)
    traffic: list[tuple[int, int]] = field(default_factory=list)
    pushed: Pushed = field(default_factory=dict)

    def of(self, round_traffic: Traffic, average: Float32, state: Float32) -> None:
        self.averages.append(average.tobytes())
        self.states.append(state.tobytes())
        self.traffic.append((round_traffic.pushed_bytes, round_traffic.pulled_bytes))


def values_of(layout: Layout, worker: int, round_: int) -> Float32:
    """Of very different magnitudes."""
    random = np.random.default_rng((3, worker, round_))
    return (random.standard_normal(layout.d) * 10.0 ** random.integers(-6, 3, layout.d)).astype(np.float32)


def run_job(
    settings: Sequence[str],
    places: Sequence[Place],
    *,
    node_memory: bool = False,
    change: Callable[[Float32, int], None] = lambda _values, _worker: None,
) -> list[Account]:
    """Some rounds of a job with a worker at each place, worker 0 with a shard on its node if there is `node_memory`.

    `change`: changes the gradients of a worker.
    """
    spec = job(f"workers={len(places)}", "exchange.bucket_bytes=1024", *settings)
    layout = plan_layout(TENSORS, spec)
    with ExitStack() as stack:
        shard = worker = None
        if node_memory:
            worker = NodeMemory.make()
            worker.lay_out(layout, spec, 0, grow=True)
            shard = NodeMemory(os.dup(worker.descriptor))
            stack.callback(worker.close)
            stack.callback(shard.close)
        servers = stack.enter_context(running_servers(spec, memory=shard))
        address = servers[0].address
        numbers = range(len(places))
        with ThreadPoolExecutor(len(places)) as pool:
            joining = [pool.submit(join, address, layout, number, worker) for number in numbers]
            joined = [future.result(DEADLINE_S) for future in joining]
        for exchange, leave in joined:
            stack.callback(leave)
            stack.callback(exchange.abandon)
        accounts = [account_of(exchange, worker) for exchange, _ in joined]
        in_threads([lambda n=n: run_rounds(joined[n][0], layout, places[n], n, accounts[n], change) for n in numbers])
    return accounts


def join(
    address: str, layout: Layout, number: int, memory: NodeMemory | None
) -> tuple[ParameterServerExchange, Callable[[], None]]:
    """A worker's exchange, and what closes its channel."""
    channel, coordination, spec = introduce(address, f"worker-{number}")
    admission = coordination.get_ready(ready(layout), DEADLINE_S)
    assert admission.worker_index == number
    exchange = ParameterServerExchange(
        layout=layout,
        spec=spec,
        admission=admission,
        first_round=0,
        emit=silent(),
        memory=memory if number == 0 else None,
    )
    coordination.watch(exchange.fail)
    return exchange, channel.close


def account_of(exchange: ParameterServerExchange, memory: NodeMemory | None) -> Account:
    """An account of what the exchange will push."""
    account = Account()
    for stream in exchange._streams.values():

        def put(message: bytes, bucket: int | None = None, *, stream: Any = stream, put: Any = stream.put) -> None:
            if bucket is not None:
                read = read_worker_message(message)
                assert isinstance(read, BucketMessage)
                payload = bytes(read.payload)
                if memory is not None and stream.uses_memory:
                    assert not payload
                    payload = bytes(memory.contribution(read.round, read.bucket))
                account.pushed[read.round, read.bucket] = (read.codec, bytes(read.scales), payload)
            put(message, bucket)

        stream.put = put
    return account


def run_rounds(
    exchange: ParameterServerExchange,
    layout: Layout,
    place: Place,
    worker: int,
    account: Account,
    change: Callable[[Float32, int], None],
) -> None:
    memory = place.memory(layout)
    for round_ in range(ROUNDS):
        values = values_of(layout, worker, round_)
        change(values, worker)
        state = np.random.default_rng((4, worker, round_)).standard_normal(layout.e).astype(np.float32)
        exchange.begin(round_, memory, b"%016d" % round_)
        place.compute(values, exchange.ready)
        traffic = exchange.finish(state)
        account.of(traffic, place.average(), state)


def arrays_of(accounts: Sequence[Account]) -> Arrays:
    """All that the accounts say."""
    arrays = {}
    for worker, account in enumerate(accounts):
        lists = {"average": account.averages, "state": account.states}
        for name, found in lists.items():
            arrays |= {f"{worker} {name} {k}": np.frombuffer(content, np.uint8) for k, content in enumerate(found)}
        arrays[f"{worker} traffic"] = np.array(account.traffic)
        for (round_, bucket), (codec, scales, payload) in account.pushed.items():
            arrays[f"{worker} codec {round_} {bucket}"] = np.array(codec)
            arrays[f"{worker} scales {round_} {bucket}"] = np.frombuffer(scales, np.uint8)
            arrays[f"{worker} payload {round_} {bucket}"] = np.frombuffer(payload, np.uint8)
    return arrays


class Announcing(DeviceGradient):
    """Tells which buckets are leaving the device, and of each one whose average has been given to it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.leaving: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
        self.decoded: queue.SimpleQueue[int] = queue.SimpleQueue()

    def start(self) -> None:
        super().start()
        self.leaving.put(set(self._read))

    def decode(self, codec: Codec, bucket: Bucket, encoded: Encoded, key: RandomKey) -> None:
        super().decode(codec, bucket, encoded, key)
        self.decoded.put(bucket.number)


class LongComputing(OnDevice):
    """The stream that computes is busy for long after the first bucket; that one's average is looked at meanwhile.

    The last bucket is on its way out, too, as soon as it is computed, but it is not its turn. Only then the others'
    contributions may come, which `gate` is for.
    """

    def __init__(self, machine: Machine, *, kernels: CodecSpec | None) -> None:
        super().__init__(machine, kernels=kernels)
        self.gate: queue.SimpleQueue[None] = queue.SimpleQueue()

    def memory(self, layout: Layout) -> GradientMemory:
        self._memory = self._make(Announcing, layout)
        self.still_computing: list[bool] = []
        self.first_buckets: list[bytes] = []
        return self._memory

    def compute(self, values: Float32, ready: Callable[[Iterable[int]], None]) -> None:
        for told in (self._memory.leaving, self._memory.decoded):
            while not told.empty():  # of the round before
                told.get()
        source = torch.from_numpy(values.copy()).to(self.machine.device)
        first, *others, last = self.buckets
        assert others
        for bucket in self.buckets:
            part = slice(bucket.start, bucket.stop)
            self.machine.current.run(lambda part=part: self.gradient[part].copy_(source[part]))
            if bucket is first:
                ready([first.number])
                self.machine.current.run(lambda: long_work(self.machine.device))
        ready([last.number])
        end = self.machine.current.mark()
        while last.number not in self._memory.leaving.get(timeout=DEADLINE_S):
            pass
        self.gate.put(None)
        assert self._memory.decoded.get(timeout=DEADLINE_S) == first.number
        self.machine.back.mark().synchronize()
        with beside(self.machine.device):
            self.first_buckets.append(self.gradient[: first.stop].cpu().numpy().tobytes())
        self.still_computing.append(not end.query())
        ready(bucket.number for bucket in others)


def long_work(device: torch.device) -> None:
    """About a second on a GPU."""
    if device.type == "cuda":
        torch.cuda._sleep(2_000_000_000)


def beside(device: torch.device) -> Any:
    """The host's copies then do not wait for the stream that computes."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


KERNEL_CODECS = {
    "8 bits 2-sided": ("codec.two_sided=true", "codec.block=64"),
    "8 bits": ("codec.bits=8",),
    "4 bits 2-sided l2": ("codec.bits=4", "codec.two_sided=true", "codec.scale=l2", "codec.block=8"),
}
"""Those whose buckets kernels encode, and in the two-sided ones decode."""


def job_of(codec: str, place: Place, gate: queue.SimpleQueue[None] | None = None) -> Arrays:
    """All of a job with one worker's gradient at this place, the other one's on the host; one has a shard beside it."""
    return arrays_of(run_job(KERNEL_CODECS[codec], [place, OnHost(gate)], node_memory="2-sided" in codec))


def bytes_of_job(codec: str, machine: Machine) -> Arrays:
    """What is pushed and pulled."""
    place = OnDevice(machine, kernels=job(*KERNEL_CODECS[codec]).codec, shuffled=True)
    arrays = job_of(codec, place)
    if isinstance(machine.side, HostQueue):  # memory of one round serves the next one
        assert machine.side.pinned <= len(place.buckets) + 1
    return arrays


def decoded_while_computing(codec: str, machine: Machine) -> Arrays:
    """What a worker has of its first bucket while its device is still computing."""
    if machine.device.type == "cuda":
        bytes_of_job(codec, machine)  # has the kernels compiled, which may take longer than `long_work`
    place = LongComputing(machine, kernels=job(*KERNEL_CODECS[codec]).codec)
    arrays = job_of(codec, place, place.gate)
    firsts = {f"first bucket {k}": np.frombuffer(content, np.uint8) for k, content in enumerate(place.first_buckets)}
    return arrays | firsts | {"still computing": np.array(place.still_computing)}


def make_bad(values: Float32, _worker: int) -> None:
    """In the third parameter, and not in the first bucket."""
    values[2000:2002] = np.inf, np.nan


def refusal_of_job(codec: str, machine: Machine) -> Arrays:
    """What a worker says of a gradient that is not finite."""
    settings = KERNEL_CODECS[codec]
    place = OnDevice(machine, kernels=job(*settings).codec)
    return {"refusal": np.array(refusal_at(place, settings))}


def refusal_at(place: Place, settings: Sequence[str]) -> str:
    """The text with which a worker at this place refuses its gradient."""
    try:
        run_job(settings, [place], change=make_bad)
    except CodecError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def _on(name: str, work: Callable[[str, Machine], Arrays], codec: str) -> Program:
    return lambda device: work(codec, machines(device)[name])


EXCHANGE_PROGRAMS = {
    f"{work.__name__} {codec} {name}": _on(name, work, codec)
    for work in (bytes_of_job, decoded_while_computing, refusal_of_job)
    for codec in KERNEL_CODECS
    for name in ("late", "at once", "streams")
    if work is bytes_of_job or name != "at once"
}
