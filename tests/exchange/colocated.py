"""Colocated workers of threads: each has its own node as production makes it, its shard a thread instead of a process.

All is real but the operating system's process: the words on standard input, the events on standard output, the place
that follows the admission, the node's memory, of which both ends have descriptors and mappings of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from common.config import JobSpec
from common.events import Emitter
from common.layout import TensorSpec, plan_layout
from common.node_memory import NodeMemory
from common.spec_sources import job_spec_from_json
from ps.daemon import _run_shard
from ps.server import ServerOptions
from tests.support import DEADLINE_S, TENSORS, Member, introduce, ready, silent
from worker.exchange import colocated
from worker.exchange.nodes import Node, NodeOptions, make_node

COMMAND = ("a shard that is a thread",)


class ShardThread:
    """What `ShardProcess` uses of `subprocess.Popen`, around `datps shard` in a thread."""

    def __init__(self, command: Sequence[str], *, pass_fds: tuple[int, ...], **_options: Any) -> None:
        assert tuple(command) == COMMAND
        (memory,) = pass_fds
        self._memory = os.dup(memory)  # inherited
        words, stdin = os.pipe()
        stdout, events = os.pipe()
        self.stdin = os.fdopen(stdin, "w", buffering=1)
        self.stdout = os.fdopen(stdout)
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._main, args=(words, events), name="shard", daemon=True)
        self._thread.start()

    def _main(self, words: int, events: int) -> None:
        said = _lines(words)
        with os.fdopen(events, "w", buffering=1) as told:
            first = json.loads(next(said))
            spec = job_spec_from_json(first["job_spec"])
            memory = NodeMemory(self._memory)
            options = ServerOptions(spec=spec, shard=None, host=str(first["host"]), port=0, memory=memory)
            self.exit_code = asyncio.run(_run_shard(options, said, Emitter("shard", as_json=True, stream=told)))
            memory.close()

    def wait(self, timeout: float | None = None) -> int | None:
        """As of a process; it must have ended."""
        self._thread.join(DEADLINE_S if timeout is None else max(timeout, 1.0))
        assert not self._thread.is_alive()
        return self.exit_code

    @property
    def returncode(self) -> int | None:
        """As of a process that has ended."""
        return self.exit_code


def _lines(descriptor: int) -> Any:
    """Of a pipe, which whoever reads to its end closes."""
    with os.fdopen(descriptor) as file:
        yield from file


@dataclass
class ColocatedMember(Member):
    """One worker with its node."""

    node: Node
    shard: ShardThread

    def vanish(self) -> None:
        """Ends without a word, and so does its shard."""
        super().vanish()
        self.node.close()


@pytest.fixture
def shards(monkeypatch: pytest.MonkeyPatch) -> list[ShardThread]:
    """Shards are threads; those that have been started."""
    started: list[ShardThread] = []

    def start(*arguments: Any, **options: Any) -> ShardThread:
        started.append(ShardThread(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(colocated.subprocess, "Popen", start)
    return started


def join_with_shard(address: str, worker_id: str, tensors: Sequence[TensorSpec] = TENSORS) -> ColocatedMember:
    """A whole join, as `worker.daemon` does it; needs the fixture `shards`."""
    channel, coordination, spec = introduce(address, worker_id)
    node = make_node(spec, NodeOptions(coordinator=address, shard_command=COMMAND, connect_s=DEADLINE_S), silent())
    layout = plan_layout(tensors, spec)
    admission = coordination.get_ready(ready(layout, address=node.address), 2 * DEADLINE_S)
    exchange: Any = node.open(admission, layout, 0, lambda: None)
    coordination.watch(exchange.fail)
    shard: Any = node
    return ColocatedMember(admission, coordination, exchange, layout, channel, node, shard._shard._process)


@contextmanager
def colocated_members(spec: JobSpec, address: str) -> Iterator[list[ColocatedMember]]:
    """All workers of a job, by worker_index; everything of theirs is ended on leaving."""
    with ThreadPoolExecutor(spec.workers) as pool:
        joining = [pool.submit(join_with_shard, address, f"worker-{number}") for number in range(spec.workers)]
        joined = [future.result(DEADLINE_S) for future in joining]
    joined.sort(key=lambda member: member.admission.worker_index)
    try:
        yield joined
    finally:
        with ThreadPoolExecutor(spec.workers) as pool:
            list(pool.map(ColocatedMember.vanish, joined))
