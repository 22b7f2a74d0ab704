"""Workers of threads that exchange through collectives: joined as real ones are, over a real coordinator."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from common.codecs import Float32
from common.config import JobSpec
from common.events import Emitter
from common.layout import BucketKind, Layout, TensorSpec, plan_layout
from common.timeline import OFF, Timeline
from common.wire.v1 import ps_pb2 as wire
from tests.support import DEADLINE_S, DIGEST, TENSORS, introduce, job, ready
from worker.exchange.base import Exchange, Traffic
from worker.exchange.coordination import Admission, Coordination, End
from worker.exchange.gradients import HostGradient
from worker.exchange.nodes import Node, NodeOptions, make_node
from worker.interruptions import AbortRelay


def collective(*settings: str) -> JobSpec:
    """A job without servers, with short deadlines and `settings` on top."""
    return job("exchange.topology=collective", *settings)


@dataclass
class CollectiveMember:
    """One worker of a thread: admitted, its exchange open."""

    admission: Admission
    coordination: Coordination
    exchange: Exchange
    layout: Layout
    node: Node
    channel: grpc.Channel
    log: io.StringIO

    @property
    def events(self) -> list[dict[str, Any]]:
        """What it has emitted so far."""
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def average(
        self,
        round_: int = 0,
        gradient: Float32 | None = None,
        state: Float32 | None = None,
        parameter_digest: bytes = DIGEST,
    ) -> Traffic:
        """A whole round of a gradient that is complete; zeros where nothing is given."""
        gradient = np.zeros(self.layout.d, np.float32) if gradient is None else gradient
        self.exchange.begin(round_, HostGradient(gradient), parameter_digest)
        self.exchange.ready(bucket.number for bucket in self.layout.of_kind(BucketKind.GRADIENT))
        return self.exchange.finish(np.zeros(self.layout.e, np.float32) if state is None else state)

    def leave(self, end: End | None = None, replica_digest: bytes = b"") -> None:
        """Ends as a worker does, in good order unless `end` says otherwise."""
        end = end or End(ending=wire.ENDING_COMPLETED)
        self.exchange.close(end)
        self.coordination.leave(end, replica_digest)
        self.node.close()
        self.channel.close()

    def vanish(self) -> None:
        """Ends without a word, as a killed process would."""
        self.channel.close()
        self.node.close()


def join(
    address: str, worker_id: str, tensors: Sequence[TensorSpec] = TENSORS, timeline: Timeline = OFF
) -> CollectiveMember:
    """A whole join; returns when the exchange is open."""
    channel, coordination, spec = introduce(address, worker_id)
    log = io.StringIO()
    node = make_node(
        spec, NodeOptions(coordinator=address, timeline=timeline), Emitter(worker_id, as_json=True, stream=log)
    )
    layout = plan_layout(tensors, spec)
    admission = coordination.get_ready(ready(layout, address=node.address), 2 * DEADLINE_S)
    relay = AbortRelay()
    coordination.watch(relay.aborted, relay.stop_requested)
    exchange = node.open(admission, layout, 0, relay.raise_if_aborted)
    relay.attach(exchange)
    return CollectiveMember(admission, coordination, exchange, layout, node, channel, log)


@contextmanager
def collective_members(spec: JobSpec, address: str) -> Iterator[list[CollectiveMember]]:
    """All workers of a job, by worker_index; everything of theirs is ended on leaving."""
    with ThreadPoolExecutor(spec.workers) as pool:
        joining = [pool.submit(join, address, f"worker-{number}") for number in range(spec.workers)]
        joined = [future.result(DEADLINE_S) for future in joining]
    joined.sort(key=lambda member: member.admission.worker_index)
    try:
        yield joined
    finally:
        with ThreadPoolExecutor(spec.workers) as pool:
            list(pool.map(CollectiveMember.vanish, joined))


def failures(work: Sequence[Callable[[], Any]]) -> list[BaseException | None]:
    """Runs functions at the same time; what each raised."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.exception(DEADLINE_S) for future in [pool.submit(function) for function in work]]
