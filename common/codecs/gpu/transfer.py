"""Buckets between a gradient on a GPU and the host: encoded and decoded on a stream beside the one that computes.

    DeviceEncoder   gradient -> kernels -> staging on the device -> pinned memory -> (scales, payload) of NumPy
    DeviceDecoder   (scales, payload) of NumPy -> pinned memory -> staging on the device -> kernels -> gradient

What has to be true of the order, and who sees to it:

    the gradient is final before it is encoded, free before it is decoded onto       `Queue.wait`, on the device
    a staging buffer's device half is used by one bucket after the other             they share one queue
    pinned memory is read once the copy to it is complete                            `Bucket.result` waits
    pinned memory is copied to again once the host has read it                       `Bucket.release` gives it back
    pinned memory is written to again once the copy from it is complete              the decoder waits for `done`
    a gradient that is dropped early is not handed out again before its last use     `Queue.keep`

Neither class locks: a bucket may be taken and released on another thread than the encoder's; a decoder has one thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.codecs.base import Float32
from common.codecs.gpu.queues import Event, Queue, SideStream
from common.codecs.gpu.randomized import decode, encode, payload_bytes, scale_count
from common.codecs.scales import scale_refusal
from common.config import ScaleNorm
from common.errors import CodecError, refusal

_ALIGNMENT = 16
"""Bytes of a kernel's widest access. A payload follows its scales in one buffer, so that one copy moves both."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where the scales and the payload of a bucket of at most `elements` lie in a staging buffer."""

    elements: int
    block: int
    bits: int

    def require(self, n: int) -> None:
        """Refuses a bucket that is too long.

        Raises:
            CodecError: gives both lengths.
        """
        if n > self.elements:
            raise CodecError(refusal(f"a bucket of at most {self.elements} elements", "elements", n))

    def size(self, n: int) -> int:
        """Bytes of a bucket of n elements."""
        return self._payload_at(n) + payload_bytes(n, self.bits)

    def parts(self, memory: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Views of the scales, float32, and of the payload, uint8."""
        scales = memory[: 4 * scale_count(n, self.block)].view(torch.float32)
        return scales, memory[self._payload_at(n) : self.size(n)]

    def _payload_at(self, n: int) -> int:
        return -(-4 * scale_count(n, self.block) // _ALIGNMENT) * _ALIGNMENT


class _Staging:
    """A buffer on the device and one in pinned memory."""

    def __init__(self, queue: Queue, layout: _Layout) -> None:
        self.device = queue.on_device(layout.size(layout.elements))
        self.host = queue.on_host(layout.size(layout.elements))
        self.done: Event | None = None


class Bucket:
    """An encoded bucket on its way to the host."""

    def __init__(
        self, *, values: Tensor, start: int, layout: _Layout, staging: _Staging, done: Event, free: deque[_Staging]
    ) -> None:
        self._values = values
        self._start = start
        self._layout = layout
        self._staging: _Staging | None = staging
        self._done = done
        self._free = free

    @property
    def done(self) -> Event:
        """After which the values have been read, and scales and payload are in pinned memory."""
        return self._done

    def result(self) -> tuple[Float32, NDArray[np.uint8]]:
        """Waits for the bucket.

        Returns:
            Scales and payload: views of pinned memory, valid until `release`.

        Raises:
            CodecError: a value is NaN or infinite (the message gives its flat index), or a scale overflows. The bucket
                is released then.
        """
        if self._staging is None:
            raise RuntimeError(refusal("a bucket that is not released", "start", self._start))
        self._done.synchronize()
        scales, payload = (part.numpy() for part in self._layout.parts(self._staging.host, len(self._values)))
        if not np.isfinite(scales).all():
            self.release()
            raise scale_refusal(self._values.cpu().numpy(), self._start)
        return scales, payload

    def release(self) -> None:
        """Gives the memory back; the views must not be read any more."""
        staging, self._staging = self._staging, None
        if staging is not None:
            self._free.append(staging)


class DeviceEncoder:
    """Encodes buckets of a gradient on a queue beside the current stream.

    Staging buffers are made when none is free: never more than buckets were unreleased at one time, and an encoder that
    waited for the network here would stop the backward pass.

    Args:
        device: where gradients lie.
        elements: of the longest bucket.
        block, bits, norm: see `randomized.encode`.
        queue: a stream of the device's own, unless given.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        elements: int,
        block: int,
        bits: int,
        norm: ScaleNorm,
        queue: Queue | None = None,
    ) -> None:
        self._layout = _Layout(elements=elements, block=block, bits=bits)
        self._norm = norm
        self._queue = SideStream(device) if queue is None else queue
        self._free: deque[_Staging] = deque()  # whose append and pop are atomic

    def encode(self, values: Tensor, start: int, words: tuple[int, int], *, final: Any = None) -> Bucket:
        """Starts to encode the bucket [start, start + n) and returns at once.

        Args:
            values: float32 of shape (n,) on the device; must not change until `Bucket.result` has returned.
            start, words: see `randomized.encode`.
            final: event after which `values` are final; None: what the current stream has been given makes them so.

        Raises:
            CodecError: the bucket is too long, or see `randomized.encode`.
        """
        layout, n = self._layout, len(values)
        layout.require(n)
        staging = self._take()

        def work() -> None:
            scales, payload = layout.parts(staging.device, n)
            form = {"block": layout.block, "bits": layout.bits}
            encode(values, start, words, norm=self._norm, scales=scales, payload=payload, **form)
            size = layout.size(n)
            staging.host[:size].copy_(staging.device[:size], non_blocking=True)

        self._queue.wait(final)
        self._queue.run(work)
        self._queue.keep(values)
        done = self._queue.mark()
        return Bucket(values=values, start=start, layout=layout, staging=staging, done=done, free=self._free)

    def _take(self) -> _Staging:
        try:
            return self._free.pop()
        except IndexError:
            return _Staging(self._queue, self._layout)


class DeviceDecoder:
    """Decodes buckets onto a gradient on a queue beside the current stream.

    Args:
        device: where gradients lie.
        elements: of the longest bucket.
        block, bits: see `randomized.decode`.
        depth: staging buffers; the host waits when it is so many buckets ahead of the device.
        queue: a stream of the device's own, unless given.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        elements: int,
        block: int,
        bits: int,
        depth: int = 4,
        queue: Queue | None = None,
    ) -> None:
        self._layout = _Layout(elements=elements, block=block, bits=bits)
        self._queue = SideStream(device) if queue is None else queue
        self._ring = deque(_Staging(self._queue, self._layout) for _ in range(depth))

    def decode(
        self,
        scales: Float32,
        payload: bytes | bytearray | memoryview | NDArray[np.uint8],
        start: int,
        out: Tensor,
        *,
        add: bool,
        ready: Any = None,
    ) -> None:
        """Starts to decode the bucket [start, start + n); `finish` says when it is there.

        Args:
            scales, payload: as received and checked (`Codec.check`); copied before this returns.
            start, add: see `randomized.decode`.
            out: float32 of shape (n,) on the device.
            ready: event after which `out` may be written; None: after all that the current stream has been given.

        Raises:
            CodecError: the bucket is too long, or not of these sizes.
        """
        layout, n = self._layout, len(out)
        layout.require(n)
        stream = np.frombuffer(payload, np.uint8)
        sizes = (scale_count(n, layout.block), payload_bytes(n, layout.bits))
        if (len(scales), len(stream)) != sizes:
            rule = f"{sizes[0]} scales, {sizes[1]} bytes"
            raise CodecError(refusal(rule, "bucket", f"{len(scales)} scales, {len(stream)} bytes"))
        self._ring.rotate(-1)
        staging = self._ring[0]
        if staging.done is not None:
            staging.done.synchronize()
        host_scales, host_payload = layout.parts(staging.host, n)
        host_scales.numpy()[...] = scales
        host_payload.numpy()[...] = stream

        def work() -> None:
            size = layout.size(n)
            staging.device[:size].copy_(staging.host[:size], non_blocking=True)
            decode(*layout.parts(staging.device, n), start, out, block=layout.block, bits=layout.bits, add=add)

        self._queue.wait(ready)
        self._queue.run(work)
        self._queue.keep(out)
        staging.done = self._queue.mark()

    def finish(self) -> None:
        """What the current stream is given next sees all that has been decoded; the host does not wait."""
        self._queue.join()
