"""What a worker's node contributes to each topology, from before the worker is ready until it has left."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from common.config import JobSpec, Topology
from common.errors import SpecError, refusal
from common.events import Emitter
from common.layout import Layout
from common.node_memory import NodeMemory
from common.timeline import OFF, Timeline
from worker.exchange.base import Exchange
from worker.exchange.collective import GRACE_S, CollectiveExchange
from worker.exchange.colocated import ShardProcess, local_address
from worker.exchange.coordination import Admission
from worker.exchange.group import Group, meet, open_store
from worker.exchange.ps import ParameterServerExchange

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class NodeOptions:
    """What belongs to one node.

    Attributes:
        coordinator: host:port.
        host: this node's address, as other workers reach it; None: found out.
        shard_command: how this node's shard is run.
        connect_s: how long to wait for a server to answer.
        timeline: of this worker.
        shard_trace: file that this node's shard writes its timeline to.
        device: of the worker; collectives run there.
        carried: the buckets that this process exchanges with servers; None: all.
    """

    coordinator: str
    host: str | None = None
    shard_command: tuple[str, ...] = ()
    connect_s: float = 60.0
    timeline: Timeline = OFF
    shard_trace: Path | None = None
    device: torch.device = CPU
    carried: frozenset[int] | None = None


class Node(Protocol):
    """One worker's node in one topology; `close` ends whatever it has started."""

    address: str
    """host:port for `Readiness.address`; empty if the node serves nothing."""

    def open(self, admission: Admission, layout: Layout, first_round: int, give_up: Callable[[], None]) -> Exchange:
        """Opens the exchange once the view has formed.

        Args:
            admission: this worker's place.
            layout: how the vectors are cut.
            first_round: the round to begin with.
            give_up: called now and then; raises if waiting has become pointless.

        Raises:
            PeerLostError: a server or another worker does not answer.
        """
        ...

    def finish(self) -> None:
        """Waits, after this worker's part has ended well, until the node is not needed any more."""
        ...

    def close(self) -> None:
        """Ends everything at once; may be called at any time."""
        ...


def make_node(spec: JobSpec, options: NodeOptions, emit: Emitter) -> Node:
    """This worker's node for the job's topology.

    Raises:
        SpecError: this process has not been told how to run a shard, or `options.host` is no address of this machine.
        PeerLostError: this node's shard does not come up.
    """
    match spec.exchange.topology:
        case Topology.DEDICATED:
            return _ServedNode(spec, options, emit)
        case Topology.COLOCATED:
            return _ColocatedNode(spec, options, emit)
        case Topology.COLLECTIVE:
            return _CollectiveNode(spec, options, emit)


class _ServedNode:
    """A node that only has a worker; the shards are elsewhere."""

    address = ""

    def __init__(self, spec: JobSpec, options: NodeOptions, emit: Emitter) -> None:
        self._spec, self._options, self._emit = spec, options, emit
        self._exchange: ParameterServerExchange | None = None
        self._memory: NodeMemory | None = None

    def open(self, admission: Admission, layout: Layout, first_round: int, give_up: Callable[[], None]) -> Exchange:
        """See `Node`."""
        self._exchange = ParameterServerExchange(
            layout=layout,
            spec=self._spec,
            admission=admission,
            first_round=first_round,
            emit=self._emit,
            timeline=self._options.timeline,
            carried=self._options.carried,
            connect_s=self._options.connect_s,
            give_up=give_up,
            memory=self._memory,
        )
        return self._exchange

    def finish(self) -> None:
        """See `Node`."""

    def close(self) -> None:
        """See `Node`."""
        if self._exchange:
            self._exchange.abandon()


class _ColocatedNode(_ServedNode):
    """A node that also runs the shard of its worker's index."""

    def __init__(self, spec: JobSpec, options: NodeOptions, emit: Emitter) -> None:
        super().__init__(spec, options, emit)
        if not options.shard_command:
            raise SpecError(refusal("a command that runs this node's shard", "shard_command", "none"))
        host = options.host or local_address(options.coordinator)
        self._shard = ShardProcess(options.shard_command, spec, host, options.connect_s, emit, options.shard_trace)
        self.address = self._shard.address
        self._memory = self._shard.memory

    def open(self, admission: Admission, layout: Layout, first_round: int, give_up: Callable[[], None]) -> Exchange:
        """See `Node`."""
        self._shard.assign(admission, layout, first_round)
        return super().open(admission, layout, first_round, give_up)

    def finish(self) -> None:
        """See `Node`."""
        self._shard.finish()

    def close(self) -> None:
        """See `Node`."""
        super().close()
        self._shard.close()


class _CollectiveNode:
    """A node that has a store, where all workers meet if it is that of worker 0."""

    def __init__(self, spec: JobSpec, options: NodeOptions, emit: Emitter) -> None:
        self._spec, self._options, self._emit = spec, options, emit
        self._host = options.host or local_address(options.coordinator)
        self._store, self.address = open_store(self._host)
        self._exchange: CollectiveExchange | None = None

    def open(self, admission: Admission, layout: Layout, first_round: int, give_up: Callable[[], None]) -> Exchange:
        """See `Node`."""
        store, roll_call = meet(self._store, admission, first_round, self._options.connect_s, give_up)
        deadline_s = self._spec.deadlines.round_s + 2 * GRACE_S  # the exchange's own comes first, and knows more
        group = Group(store, admission, host=self._host, device=self._options.device, deadline_s=deadline_s)
        self._exchange = CollectiveExchange(
            layout=layout,
            spec=self._spec,
            admission=admission,
            group=group,
            roll_call=roll_call,
            emit=self._emit,
            timeline=self._options.timeline,
        )
        return self._exchange

    def finish(self) -> None:
        """See `Node`; the others have what they need of this one."""

    def close(self) -> None:
        """See `Node`."""
        if self._exchange:
            self._exchange.release()
