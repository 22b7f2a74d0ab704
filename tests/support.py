"""What many tests need: real servers on an event loop of their own, and workers of threads that speak to them."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from torch import Tensor

from common.config import JobSpec
from common.events import Emitter
from common.layout import Layout, TensorSpec, plan_layout
from common.node_memory import NodeMemory
from common.spec_sources import load_job_spec
from common.timeline import OFF, Timeline
from common.wire.v1 import ps_pb2 as wire
from ps.outcome import Outcome
from ps.server import Server, ServerOptions
from worker.checkpoint import Checkpoint
from worker.data import Dataset
from worker.exchange.coordination import Admission, Coordination, End, ReadyReplica, connect
from worker.exchange.ps import ParameterServerExchange
from worker.record import describe_data

DEADLINE_S = 20.0
DIGEST = b"d" * 16
"""Some parameters' digest."""
TENSORS = (
    TensorSpec(name="conv.weight", shape=(24, 7, 3, 3), buffer=False),
    TensorSpec(name="conv.bias", shape=(24,), buffer=False),
    TensorSpec(name="fc.weight", shape=(10, 331), buffer=False),
    TensorSpec(name="bn.running_mean", shape=(24,), buffer=True),
    TensorSpec(name="@metrics", shape=(7,), buffer=True),
)
"""A small layout with tensors of odd sizes."""


def job(*settings: str) -> JobSpec:
    """A job spec with short deadlines and `settings` on top."""
    defaults = ("deadlines.join_s=20", "deadlines.round_s=20", "deadlines.report_s=5", "deadlines.hello_s=10")
    return load_job_spec(settings=(*defaults, *settings))


@dataclass
class RunningServer:
    """A server on the event loop of a thread."""

    server: Server
    loop: asyncio.AbstractEventLoop
    log: io.StringIO
    outcome: Future[Outcome] = field(default_factory=Future)

    @property
    def address(self) -> str:
        return self.server.address

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has emitted so far."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Runs a function on the server's event loop, soon."""
        self.loop.call_soon_threadsafe(function, *arguments)


@contextmanager
def running_server(
    spec: JobSpec,
    *,
    shard: int = 0,
    shard_addresses: Sequence[str] = (),
    memory: NodeMemory | None = None,
    trace: Path | None = None,
) -> Iterator[RunningServer]:
    """A server of one shard on a free port of 127.0.0.1; ended on leaving, whatever happened.

    `memory`: that it shares with the worker of its own index; `trace`: file of its timeline.
    """
    started: Future[RunningServer] = Future()
    log = io.StringIO()

    async def serve() -> None:
        addresses = tuple(shard_addresses)
        options = ServerOptions(
            spec=spec, shard=shard, host="127.0.0.1", port=0, shard_addresses=addresses, memory=memory, trace=trace
        )
        server = Server(options, Emitter(f"server-{shard}", as_json=True, stream=log))
        running = RunningServer(server=server, loop=asyncio.get_running_loop(), log=log)
        await server.start()
        started.set_result(running)
        running.outcome.set_result(await server.serve())

    def main() -> None:
        try:
            asyncio.run(serve())
        except Exception as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = threading.Thread(target=main, name=f"server-{shard}", daemon=True)
    thread.start()
    running = started.result(DEADLINE_S)
    try:
        yield running
    finally:
        with suppress(RuntimeError):  # the job was over, and with it the loop
            running.call(running.server.end, Outcome(exit_code=75, text="the test is over"))
        thread.join(DEADLINE_S)


@contextmanager
def running_servers(spec: JobSpec, *, memory: NodeMemory | None = None) -> Iterator[list[RunningServer]]:
    """All servers of a job; shard 0 knows the others' addresses, and shares `memory` with worker 0."""
    with ExitStack() as stack:
        others = [stack.enter_context(running_server(spec, shard=shard)) for shard in range(1, spec.servers)]
        addresses = ["coordinator", *(server.address for server in others)] if others else []
        first = stack.enter_context(running_server(spec, shard_addresses=addresses, memory=memory))
        yield [first, *others]


@dataclass
class Member:
    """One worker of a thread: admitted, its exchange open."""

    admission: Admission
    coordination: Coordination
    exchange: ParameterServerExchange
    layout: Layout
    channel: grpc.Channel

    def leave(self, end: End | None = None, replica_digest: bytes = b"") -> None:
        """Ends, in good order unless `end` says otherwise."""
        end = end or End(ending=wire.ENDING_COMPLETED)
        self.exchange.close(end)
        self.coordination.leave(end, replica_digest)

    def vanish(self) -> None:
        """Ends without a word, as a killed process would."""
        self.channel.close()
        self.exchange.abandon()


def silent() -> Emitter:
    """An emitter that nobody reads."""
    return Emitter("test", as_json=True, stream=io.StringIO())


def introduce(address: str, worker_id: str) -> tuple[grpc.Channel, Coordination, JobSpec]:
    """The first half of a join."""
    channel = connect(address, DEADLINE_S, 10.0)
    coordination = Coordination(channel, address, worker_id, silent())
    return channel, coordination, coordination.introduce(None, DEADLINE_S)


def ready(layout: Layout, **changes: Any) -> ReadyReplica:
    """What a well-behaved worker says of itself, with `changes`."""
    values = {"layout": layout, "replica_digest": b"p" * 16, "round": 0, "samples": 100, "classes": "10 classes"}
    return ReadyReplica(**{**values, **changes})


def join(
    address: str,
    worker_id: str,
    tensors: Sequence[TensorSpec] = TENSORS,
    round_: int = 0,
    memory: NodeMemory | None = None,
    timeline: Timeline = OFF,
) -> Member:
    """A whole join; returns when the view has formed."""
    channel, coordination, spec = introduce(address, worker_id)
    layout = plan_layout(tensors, spec)
    admission = coordination.get_ready(ready(layout, round=round_), 2 * DEADLINE_S)
    exchange = ParameterServerExchange(
        layout=layout,
        spec=spec,
        admission=admission,
        first_round=round_,
        emit=silent(),
        memory=memory,
        timeline=timeline,
    )
    coordination.watch(exchange.fail)
    return Member(admission, coordination, exchange, layout, channel)


@contextmanager
def members(spec: JobSpec, address: str, tensors: Sequence[TensorSpec] = TENSORS) -> Iterator[list[Member]]:
    """All workers of a job, by worker_index; their channels are closed on leaving."""
    with ThreadPoolExecutor(spec.workers) as pool:
        joining = [pool.submit(join, address, f"worker-{number}", tensors) for number in range(spec.workers)]
        joined = [future.result(DEADLINE_S) for future in joining]
    joined.sort(key=lambda member: member.admission.worker_index)
    try:
        yield joined
    finally:
        for member in joined:
            member.vanish()


def in_threads(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs functions at the same time; their results, or the first exception."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result(DEADLINE_S) for future in [pool.submit(function) for function in work]]


def checkpoint_of(spec: JobSpec, dataset: Dataset, tensors: Mapping[str, Tensor], round_: int) -> Checkpoint:
    """What `save_checkpoint` and `load_checkpoint` would make of a state after round `round_` of 1,000."""
    return Checkpoint(
        path=Path("nowhere"),
        spec=spec,
        round=round_,
        rounds=1000,
        classes=len(dataset.classes),
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        mean=dataset.mean,
        std=dataset.std,
        data=describe_data(dataset),
        tensors=tensors,
    )
