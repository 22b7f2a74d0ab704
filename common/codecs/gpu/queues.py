"""Work on a device beside the stream that computes: CUDA streams and events, and what a test puts in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Event(Protocol):
    """A point in a queue's work."""

    def synchronize(self) -> None:
        """Returns once all work before the point is done."""
        ...


class Queue(Protocol):
    """Work on a device in order, beside the current stream: `SideStream`, or a test's."""

    def wait(self, event: Any) -> None:
        """What follows starts after the event; None: after all that the caller's current stream has been given."""
        ...

    def run(self, work: Callable[[], object]) -> None:
        """Adds what `work` launches."""
        ...

    def mark(self) -> Event:
        """The end of what has been added."""
        ...

    def now(self) -> Event:
        """The end of what the caller's current stream has been given."""
        ...

    def join(self) -> None:
        """What the caller's current stream is given next starts after all that has been added."""
        ...

    def keep(self, tensor: Tensor) -> None:
        """The tensor's memory is not reused before what has been added is done, even if the tensor is dropped."""
        ...

    def on_device(self, size: int) -> Tensor:
        """Bytes on the device that only this queue's work uses."""
        ...

    def on_host(self, size: int) -> Tensor:
        """Bytes of pinned memory: copies from and to them do not hold up the host."""
        ...


class SideStream:
    """`Queue` on a CUDA stream of its own, whose short work goes before the long kernels of the backward pass."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def wait(self, event: torch.cuda.Event | None) -> None:
        """See `Queue`."""
        if event is None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        else:
            self._stream.wait_event(event)

    def run(self, work: Callable[[], object]) -> None:
        """See `Queue`; the stream's device is current meanwhile."""
        with torch.cuda.stream(self._stream):
            work()

    def mark(self) -> torch.cuda.Event:
        """See `Queue`. Blocking: a thread that waits sleeps, and leaves its core to gRPC."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event

    def now(self) -> torch.cuda.Event:
        """See `Queue`."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def join(self) -> None:
        """See `Queue`."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def keep(self, tensor: Tensor) -> None:
        """See `Queue`."""
        tensor.record_stream(self._stream)

    def on_device(self, size: int) -> Tensor:
        """See `Queue`. Of this stream's pool: what another stream has just freed may still be in use there."""
        with torch.cuda.stream(self._stream):
            return torch.empty(size, dtype=torch.uint8, device=self._device)

    def on_host(self, size: int) -> Tensor:
        """See `Queue`."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
