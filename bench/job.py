"""The processes of one job: real servers, and workers of the laboratory, each on its node."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.processes import Crew, Host, children_of
from bench.settings import Topology, TopologyKind
from bench.workload import TRACE
from common.config import JobSpec

START_S = 120.0
"""What processes get to start."""
_DATPS = (sys.executable, "-m", "deploy.cli")


class Job:
    """One job: call `start` once."""

    def __init__(
        self, crew: Crew, hosts: Sequence[Host], topology: Topology, spec: JobSpec, folder: Path, *, traced: bool
    ) -> None:
        """`folder`: an existing one, for `job.yaml` and, if `traced`, the processes' timelines."""
        self._crew, self._hosts, self._topology, self._folder, self._traced = crew, hosts, topology, folder, traced
        self._spec_path = folder / "job.yaml"
        self._spec_path.write_text(spec.to_yaml())
        self._servers: dict[int, int] = {}
        self._workers: list[int] = []

    def start(self, module: str, orders: Path, environment: Mapping[str, str] | None = None) -> list[str]:
        """Starts servers, shard 0 last because it knows the others' addresses, then workers; returns their names.

        Args:
            module: of the workers, run as `python -m MODULE SERVER HOST WORKER_NUMBER ORDERS`.
            orders: file that tells a worker what to do.
            environment: of the workers, on top.

        Raises:
            DatpsError: a server does not come up.
        """
        dedicated = self._topology.kind is TopologyKind.DEDICATED
        others = range(1, self._topology.shards) if dedicated else ()
        for shard in others:
            self._start_server(shard, ())
        addresses: dict[int, str] = {}
        for event in self._listening(others):
            addresses[event["shard"]] = event["address"]
        known = [f"{self._place(0).address}:0", *(addresses[shard] for shard in others)] if others else ()
        self._start_server(0, known)
        coordinator = self._listening([0])[0]["address"]
        names = [f"worker-{number}" for number in range(self._topology.workers)]
        for number, name in enumerate(names):
            host = self._hosts[number]
            command = [sys.executable, "-m", module, coordinator, host.address, str(number), str(orders)]
            self._workers.append(self._crew.start(name, host.command(command), environment))
        return names

    def shard_pids(self) -> list[int]:
        """The processes that aggregate, by shard, once all workers are in the view.

        Worker i's only child is its node's shard, which is shard i: a worker_index is a worker's number here.
        """
        match self._topology.kind:
            case TopologyKind.DEDICATED:
                return [self._servers[shard] for shard in range(self._topology.shards)]
            case TopologyKind.COLOCATED:
                return [child for worker in self._workers for child in children_of(worker)]
            case TopologyKind.COLLECTIVE:
                return []

    def _listening(self, shards: Sequence[int]) -> list[dict[str, Any]]:
        names = [f"server-{shard}" for shard in shards]
        return list(self._crew.collect("listening", names, START_S, "the address").values())

    def _place(self, shard: int) -> Host:
        """Where a server runs; one that only coordinates on node 0."""
        if self._topology.kind is TopologyKind.DEDICATED:
            return self._hosts[self._topology.node_of_shard(shard)]
        return self._hosts[0]

    def _start_server(self, shard: int, addresses: Sequence[str]) -> None:
        name, place = f"server-{shard}", self._place(shard)
        trace = self._folder / f"{name}{TRACE}" if self._traced else None
        command = server_command(self._spec_path, place.address, shard, addresses, trace)
        self._servers[shard] = self._crew.start(name, place.command(command))


def server_command(
    job: Path, host: str, shard: int, shard_addresses: Sequence[str], trace: Path | None = None
) -> list[str]:
    """A real `datps server` on any free port."""
    command = [*_DATPS, "server", "--json", "--job", str(job), "--shard", str(shard), "--host", host, "--port", "0"]
    if shard_addresses:
        command += ["--shard-addresses", ",".join(shard_addresses)]
    return [*command, "--trace", str(trace)] if trace else command
