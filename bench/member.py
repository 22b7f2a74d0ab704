"""A worker of the laboratory as a member of a real job: it joins and leaves as `worker/daemon.py` does."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.settings import JOB_ID
from bench.workload import TRACE
from common.codecs.cpu import warm
from common.config import JobSpec
from common.events import Emitter
from common.layout import Layout
from common.memory import keep_freed_memory
from common.timeline import Timeline
from common.wire.v1 import ps_pb2 as wire
from worker.exchange.base import Exchange
from worker.exchange.coordination import Admission, Coordination, End, ReadyReplica, connect
from worker.exchange.nodes import Node, NodeOptions, make_node
from worker.interruptions import AbortRelay

_SHARD_COMMAND = (sys.executable, "-m", "deploy.cli", "shard")
_KEEPALIVE_S = 10.0


class Member:
    """One worker: introduced on entering, with a place in the view after `join`, gone on leaving."""

    spec: JobSpec
    admission: Admission
    final_digest: bytes = b""
    """Of the replica at the end, which all workers must agree on; to be set before leaving."""

    def __init__(self, server: str, host: str, emit: Emitter, deadline_s: float, traces: str | None) -> None:
        """
        Args:
            server: the coordinator's address.
            host: this node's own.
            emit: named as the worker.
            deadline_s: for each step of joining.
            traces: folder for timelines; None: there are none.
        """
        self.timeline = Timeline(emit.process, on=traces is not None)
        self._server, self._host, self._emit, self._deadline_s = server, host, emit, deadline_s
        self._traces = None if traces is None else Path(traces)
        self._exchange: Exchange | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        keep_freed_memory()
        warm()
        with ExitStack() as stack:
            channel = connect(self._server, self._deadline_s, _KEEPALIVE_S)
            stack.callback(channel.close)
            self._coordination = Coordination(channel, self._server, self._emit.process, self._emit)
            stack.callback(self._coordination.close)
            self.spec = self._coordination.introduce(JOB_ID, self._deadline_s)
            self._node: Node = make_node(self.spec, self._node_options(), self._emit)
            stack.callback(self._node.close)
            self._stack = stack.pop_all()
        return self

    def join(self, layout: Layout, replica_digest: bytes) -> Exchange:
        """Waits until all workers are here, and opens the exchange.

        Raises:
            DatpsError: a server or another worker is gone, or refuses us.
        """
        replica = ReadyReplica(
            layout=layout,
            replica_digest=replica_digest,
            round=0,
            samples=1,
            classes=JOB_ID,
            address=self._node.address,
        )
        self.admission = self._coordination.get_ready(replica, self._deadline_s)
        relay = AbortRelay()
        self._coordination.watch(relay.aborted, relay.stop_requested)
        self._exchange = self._node.open(self.admission, layout, 0, relay.raise_if_aborted)
        relay.attach(self._exchange)
        return self._exchange

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        end = End.after(error) if error else End(ending=wire.ENDING_COMPLETED)
        with self._stack:
            if self._exchange:
                self._exchange.close(end)
            self._coordination.leave(end, self.final_digest)
            if error is None:
                self._node.finish()
        if self._traces and error is None:
            self.timeline.write(self._traces / f"{self._emit.process}{TRACE}")

    def _node_options(self) -> NodeOptions:
        name = self._emit.process.replace("worker", "shard")
        return NodeOptions(
            coordinator=self._server,
            host=self._host,
            shard_command=_SHARD_COMMAND,
            connect_s=self._deadline_s,
            timeline=self.timeline,
            shard_trace=self._traces / f"{name}{TRACE}" if self._traces else None,
        )
