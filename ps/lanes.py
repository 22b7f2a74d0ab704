"""Lanes: the Exchange streams of the workers at one shard, what each carries, and how far it may run ahead."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

from common.node_memory import NodeMemory
from ps.streams import Outbox


class Lane:
    """One Exchange stream.

    It runs ahead by what it has contributed to buckets that other workers have yet to contribute to. Nothing more is
    read of a stream that is too far ahead, and the network makes its worker wait. That cannot become a deadlock: all
    workers push the buckets of a shard in the same order, so a stream that is ahead waits for one that is further
    behind, and the one that is furthest behind is not ahead of anybody.
    """

    def __init__(self, worker: int, buckets: frozenset[int], outbox: Outbox, memory: NodeMemory | None = None) -> None:
        """
        Args:
            worker: worker_index; a worker may have several lanes.
            buckets: those that it carries.
            outbox: what goes to the worker.
            memory: where its payloads lie, both ways; None: in the messages.
        """
        self.worker = worker
        self.buckets = buckets
        self.outbox = outbox
        self.memory = memory
        self.room = asyncio.Event()
        """Set while it is not too far ahead."""
        self.room.set()
        self.ahead_bytes = 0


class Lanes:
    """The lanes that are open, by worker, and how far each is ahead in the open round.

    While some worker has not begun the round, the others may run ahead by the whole window: their links would be idle
    otherwise. Once all have begun, they share the server's link, and whoever runs ahead takes from the slowest, on whom
    the next average waits; so the limit is low then, and they stay abreast.
    """

    def __init__(self, workers: int, window_bytes: int, abreast_bytes: int) -> None:
        """
        Args:
            workers: M, all of which contribute to every bucket.
            window_bytes: how far a lane may run ahead while a worker has not begun the round.
            abreast_bytes: how far once all have; a bucket does.
        """
        self._by_worker: dict[int, list[Lane]] = {}
        self._taken_leave: dict[int, frozenset[int]] = {}
        self._workers = workers
        self._window_bytes = window_bytes
        self._abreast_bytes = min(window_bytes, abreast_bytes)
        self.open_round()

    def __iter__(self) -> Iterator[Lane]:
        return iter([lane for lanes in self._by_worker.values() for lane in lanes])

    def __bool__(self) -> bool:
        return any(self._by_worker.values())

    def open_round(self) -> None:
        """A round begins: no worker has contributed."""
        self._begun: set[int] = set()
        self._waiting: dict[int, list[tuple[Lane, int]]] = {}
        self._added: Counter[int] = Counter()
        for lane in self:
            lane.ahead_bytes = 0
            lane.room.set()

    def contributed(self, lane: Lane, bucket: int, size_bytes: int) -> None:
        """A lane has contributed to a bucket of which not everything is added."""
        self._waiting.setdefault(bucket, []).append((lane, size_bytes))
        lane.ahead_bytes += size_bytes
        if lane.worker not in self._begun:
            self._begun.add(lane.worker)
            if len(self._begun) == self._workers:
                for each in self:
                    self._look(each)
        self._look(lane)

    def added(self, bucket: int) -> None:
        """One worker's contribution to a bucket is being added; with the last one, nobody is ahead by this bucket."""
        self._added[bucket] += 1
        if self._added[bucket] < self._workers:
            return
        for lane, size_bytes in self._waiting.pop(bucket, ()):
            lane.ahead_bytes -= size_bytes
            self._look(lane)

    def add(self, lane: Lane) -> None:
        """A stream has opened."""
        self._by_worker.setdefault(lane.worker, []).append(lane)

    def remove(self, lane: Lane) -> None:
        """A stream has ended."""
        self._by_worker[lane.worker].remove(lane)

    def carrier(self, worker: int, bucket: int) -> Lane | None:
        """The lane that carries a worker's bucket, if it is open."""
        return next((lane for lane in self._by_worker.get(worker, ()) if bucket in lane.buckets), None)

    def carried(self, worker: int) -> frozenset[int]:
        """All buckets that a worker's open lanes carry."""
        return frozenset(bucket for lane in self._by_worker.get(worker, ()) for bucket in lane.buckets)

    def take_leave(self, lane: Lane) -> frozenset[int]:
        """A lane has said Goodbye; returns all buckets whose lanes of this worker have."""
        gone = self._taken_leave.get(lane.worker, frozenset()) | lane.buckets
        self._taken_leave[lane.worker] = gone
        return gone

    def _look(self, lane: Lane) -> None:
        """Lets a lane go on, or not."""
        limit_bytes = self._abreast_bytes if len(self._begun) == self._workers else self._window_bytes
        if lane.ahead_bytes > limit_bytes:
            lane.room.clear()
        else:
            lane.room.set()
