"""Queues for the tests of transfers: one that works as late as it may, one at once, and those of a GPU.

On a GPU work is done at any time between its launch and the moment when someone waits for it. The two ends of that
span are what can be tested without one: whatever is read or overwritten too early differs at one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.codecs.gpu.queues import Queue, SideStream

_ONE_AT_A_TIME = threading.RLock()
"""Held while any queue works: queues wait for each other from several threads, and Triton's interpreter wants it."""


class HostQueue:
    """`queues.Queue` on the CPU; `late`: nothing is done before someone waits for it."""

    def __init__(self, *, late: bool, current: HostQueue | None = None) -> None:
        self.kept: list[Tensor] = []
        self.pinned = 0  # buffers made on the host
        self.done = 0  # pieces of work
        self._late = late
        self._current = current
        self._work: list[Callable[[], object]] = []

    def wait(self, event: Any) -> None:
        assert self._current is not None
        self.run((event or self._current.mark()).synchronize)

    def run(self, work: Callable[[], object]) -> None:
        with _ONE_AT_A_TIME:
            self._work.append(work)
            if not self._late:
                self.work_until(len(self._work))

    def mark(self) -> HostEvent:
        return HostEvent(queue=self, count=len(self._work))

    def now(self) -> HostEvent:
        assert self._current is not None
        return self._current.mark()

    def join(self) -> None:
        assert self._current is not None
        self._current.run(self.mark().synchronize)

    def keep(self, tensor: Tensor) -> None:
        self.kept.append(tensor)

    def on_device(self, size: int) -> Tensor:
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def on_host(self, size: int) -> Tensor:
        self.pinned += 1
        return torch.full((size,), 0xEE, dtype=torch.uint8)

    def work_until(self, count: int) -> None:
        with _ONE_AT_A_TIME:
            while self.done < count:
                self.done += 1
                self._work[self.done - 1]()


@dataclass(frozen=True, kw_only=True)
class HostEvent:
    """After the first `count` pieces of a queue's work."""

    queue: HostQueue
    count: int

    def synchronize(self) -> None:
        self.queue.work_until(self.count)

    def query(self) -> bool:
        return self.queue.done >= self.count


class CurrentStream:
    """What the tests ask of the GPU's current stream."""

    def run(self, work: Callable[[], object]) -> None:
        work()

    def mark(self) -> torch.cuda.Event:
        return torch.cuda.current_stream().record_event()


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device, the queue that computes gradients, and two beside it."""

    device: torch.device
    current: Any
    side: Queue
    back: Queue


def machines(device: torch.device) -> dict[str, Machine]:
    """The machines to test with on a device."""
    if device.type == "cuda":
        side, back = SideStream(device), SideStream(device)
        return {"streams": Machine(device=device, current=CurrentStream(), side=side, back=back)}
    return {name: host_machine(late=late) for name, late in (("late", True), ("at once", False))}


def host_machine(*, late: bool, computes_late: bool = True) -> Machine:
    """A machine on the CPU: whether the queues beside, and the one that computes, work late or at once."""
    current = HostQueue(late=computes_late)
    side, back = HostQueue(late=late, current=current), HostQueue(late=late, current=current)
    return Machine(device=torch.device("cpu"), current=current, side=side, back=back)
