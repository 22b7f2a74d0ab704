"""One server process's services put together: aggregator, coordinator on shard 0, health and reflection."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.config import JobSpec, Topology
from common.errors import EXIT_MISMATCH, EXIT_TERMINATED, SpecError, refusal
from common.events import Emitter
from common.node_memory import NodeMemory
from common.timeline import Timeline
from common.wire import rpc
from common.wire.frames import read_worker_message
from common.wire.listeners import limit_receive_buffers
from common.wire.v1 import ps_pb2 as wire
from ps.aggregator import Aggregator
from ps.coordinator import Coordinator
from ps.membership import FormView
from ps.outcome import Outcome

TICK_S = 0.25
FAREWELL_S = 5.0
"""How long the last words may take to reach the workers."""


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What belongs to one server process.

    Attributes:
        spec: the job.
        shard: which shard it aggregates; shard 0 is the coordinator. None: it is told later (`Server.assign`), and
            does not coordinate.
        host: address to listen on.
        port: 0 for any free port.
        shard_addresses: host:port by shard, as workers reach them; needed by shard 0 if there are several servers.
        trace: file that the timeline is written to at the end.
        memory: shared with the worker of this node, if there is one.
    """

    spec: JobSpec
    shard: int | None = 0
    host: str = "0.0.0.0"
    port: int = 50051
    shard_addresses: tuple[str, ...] = ()
    trace: Path | None = None
    memory: NodeMemory | None = None

    def __post_init__(self) -> None:
        servers = self.spec.servers
        if self.shard is not None and not 0 <= self.shard < servers:
            raise SpecError(refusal(f"shard from 0 to {servers - 1} (servers={servers})", "shard", self.shard))
        given = len(self.shard_addresses)
        if self.shard == 0 and given != servers and (given or servers > 1):
            raise SpecError(refusal(f"{servers} shard addresses (servers={servers})", "shard_addresses", given))
        if not 0 <= self.port <= 65535:
            raise SpecError(refusal("port from 0 to 65535", "port", self.port))


class Server:
    """One server of one job; all methods run on one event loop."""

    def __init__(self, options: ServerOptions, emit: Emitter) -> None:
        self.incarnation = secrets.randbits(64)
        self.address = ""
        self._timeline = Timeline(emit.process, on=options.trace is not None)
        self.aggregator = Aggregator(
            spec=options.spec,
            incarnation=self.incarnation,
            emit=emit,
            end=self.end,
            timeline=self._timeline,
            memory=options.memory,
        )
        self.coordinator: Coordinator | None = None
        self._aggregates = options.shard is None or options.spec.exchange.topology is Topology.DEDICATED
        if options.shard is not None:
            self.aggregator.assign(options.shard)
        if options.shard == 0:
            self.coordinator = Coordinator(
                spec=options.spec,
                incarnation=self.incarnation,
                shard_addresses=options.shard_addresses,
                emit=emit,
                end=self._coordinator_ended,
                view_formed=self._view_formed,
            )
        self._options = options
        self._emit = emit
        self._outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._grpc = grpc.aio.server(
            options=rpc.server_options(options.spec.deadlines.keepalive_s, options.spec.exchange.read_ahead_bytes)
        )
        self._health = health.aio.HealthServicer()
        self._started_s = time.monotonic()
        self._register()

    async def start(self) -> None:
        """Binds and serves.

        Raises:
            SpecError: the address is in use or cannot be bound, or its receive buffer cannot be set.
        """
        options = self._options
        wanted = f"{options.host}:{options.port}"
        try:
            port = self._grpc.add_insecure_port(wanted)
        except RuntimeError:
            port = 0
        if port == 0:
            raise SpecError(refusal("an address that is free and ours", "address", wanted, "it cannot be bound"))
        receive_buffer_bytes = options.spec.exchange.receive_buffer_bytes
        if receive_buffer_bytes is not None:
            limit_receive_buffers(port, receive_buffer_bytes)
        await self._grpc.start()
        for name in self._health_names:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        self.address = f"{options.host}:{port}"
        self._emit("listening", address=self.address, shard=options.shard, job_id=options.spec.job_id)

    async def serve(self) -> Outcome:
        """Serves until the job is over; returns how it ended."""
        ticking = asyncio.ensure_future(self._tick())
        ticking.add_done_callback(self._tick_ended)
        try:
            return await self._outcome
        finally:
            ticking.cancel()
            await self._grpc.stop(FAREWELL_S)
            self.aggregator.close()
            if self._options.trace:
                self._timeline.write(self._options.trace)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    def assign(self, shard: int, view: FormView, coordinator_incarnation: int) -> None:
        """Tells a server of no shard yet which one it has, in which view."""
        self._timeline.process += f"-{shard}"
        self.aggregator.assign(shard)
        self.aggregator.expect(view, coordinator_incarnation)

    def end(self, outcome: Outcome) -> None:
        """Ends the job; on a failure every worker is told who and what."""
        if self._outcome.done():
            return
        if outcome.exit_code in (0, EXIT_TERMINATED):
            if self.coordinator:
                return  # the workers still have to leave
        else:
            self._abort(outcome)
        self._outcome.set_result(outcome)

    def request_stop(self, text: str) -> None:
        """Asks all workers to finish the round, save and leave; ends at once if there are none."""
        self._emit("stopping", text=text)
        running = self.coordinator.formed if self.coordinator else self.aggregator.has_workers
        if running:
            self.aggregator.request_stop(text)
            if self.coordinator and not self._aggregates:
                self.coordinator.broadcast(wire.JoinResponse(stop=wire.StopRequest(text=text)))
        elif not self._outcome.done():
            outcome = Outcome(exit_code=EXIT_TERMINATED, text=f"{text} before the view formed")
            self._abort(outcome)
            self._outcome.set_result(outcome)

    def _coordinator_ended(self, outcome: Outcome) -> None:
        if outcome.exit_code not in (0, EXIT_TERMINATED):
            self.end(outcome)
        elif not self._outcome.done():
            self._outcome.set_result(outcome)

    def _abort(self, outcome: Outcome) -> None:
        retry = outcome.exit_code != EXIT_MISMATCH
        abort = wire.Abort(text=outcome.text, worker_ids=outcome.worker_ids, retry=retry)
        self.aggregator.broadcast(wire.ServerMessage(abort=abort), last=True)
        if self.coordinator:
            self.coordinator.broadcast(wire.JoinResponse(abort=abort), last=True)

    def _view_formed(self, view: FormView) -> None:
        self.aggregator.expect(view, self.incarnation)

    def _tick_ended(self, task: asyncio.Task[None]) -> None:
        """Without ticks no deadline holds: a defect there ends the job."""
        if not task.cancelled() and task.exception():
            self.end(Outcome.failed(f"defect in the server: {task.exception()!r}", (), retry=False))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.aggregator.tick()
            if self.coordinator:
                self.coordinator.tick()

    def _register(self) -> None:
        handlers, names = [], []
        if self._aggregates:
            readers = {"Exchange": read_worker_message}
            handlers.append(rpc.service_handler(rpc.AGGREGATOR, {"Exchange": self.aggregator.exchange}, readers))
            names.append(rpc.service_name(rpc.AGGREGATOR))
        if self.coordinator:
            methods: dict[str, Callable[..., Any]] = {"Join": self.coordinator.join, "Leave": self.coordinator.leave}
            handlers.append(rpc.service_handler(rpc.COORDINATOR, methods))
            names.append(rpc.service_name(rpc.COORDINATOR))
        self._grpc.add_generic_rpc_handlers(tuple(handlers))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        self._health_names = ("", *names)
        reflection.enable_server_reflection((*names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
