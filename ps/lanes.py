"""Lanes: the Exchange streams of the workers at one shard, what each carries, and how far it may run ahead."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np

from common.codecs import Encoded
from ps.streams import Outbox


class Lane:
    """One Exchange stream.

    A contribution that comes before its turn is held. Nothing more is read of a stream that has more than the window of
    them held, and the network makes its worker wait. That cannot become a deadlock: all workers push the buckets of a
    shard in the same order, so whatever is held waits for a worker that is further behind, and of the one that is
    furthest behind nothing is held.
    """

    def __init__(self, worker: int, buckets: frozenset[int], outbox: Outbox, window_bytes: int) -> None:
        """
        Args:
            worker: worker_index; a worker may have several lanes.
            buckets: those that it carries.
            outbox: what goes to the worker.
            window_bytes: how much may be held.
        """
        self.worker = worker
        self.buckets = buckets
        self.outbox = outbox
        self.room = asyncio.Event()
        """Set while less than the window is held."""
        self.room.set()
        self._window_bytes = window_bytes
        self._held_bytes = 0

    def hold(self, encoded: Encoded) -> None:
        """A contribution of this lane is held."""
        self._held_bytes += _size_bytes(encoded)
        if self._held_bytes > self._window_bytes:
            self.room.clear()

    def release(self, encoded: Encoded) -> None:
        """A contribution of this lane is held no more."""
        self._held_bytes -= _size_bytes(encoded)
        if self._held_bytes <= self._window_bytes:
            self.room.set()


class Lanes:
    """The lanes that are open, by worker."""

    def __init__(self) -> None:
        self._by_worker: dict[int, list[Lane]] = {}
        self._taken_leave: dict[int, frozenset[int]] = {}

    def __iter__(self) -> Iterator[Lane]:
        return iter([lane for lanes in self._by_worker.values() for lane in lanes])

    def __bool__(self) -> bool:
        return any(self._by_worker.values())

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


def _size_bytes(encoded: Encoded) -> int:
    return encoded.scales.nbytes + np.frombuffer(encoded.payload, np.uint8).nbytes
