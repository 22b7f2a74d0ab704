"""Brings the batches of one process to its device: from the device's own memory, or read one batch ahead."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from worker.data import Samples

RESIDENT_BYTES = 2 << 30
"""Training samples whose pixels take no more are copied to a GPU once: CIFAR takes 0.15 GB, 500,000 more images 1.5."""


@dataclass(frozen=True, kw_only=True)
class Fed:
    """A batch before augmentation. It is not to be changed: the next round may be given the same."""

    indices: Tensor
    """int64 [B], on the CPU: which samples they are."""
    images: Tensor
    """float32 [B, C, H, W] in [0, 1] on the device; zeros outside the process's part."""
    labels: Tensor
    """int64 on the device, of the process's part."""


class Feed:
    """Batches by their number, asked for in order.

    Where the samples are held in memory, they are read when asked for: on the CPU from there, on a GPU from its own
    memory, to which they are copied at first if they take no more than `RESIDENT_BYTES`. All others (images in
    files, and what is too large for the GPU) are read by a thread, one batch ahead, while the one before is trained on;
    for a GPU into pinned memory, so that the copy to it delays nobody. Which of these it is changes no bit of a batch.
    """

    def __init__(
        self, samples: Samples, indices: Callable[[int], Tensor], *, part: slice, device: torch.device, batches: int
    ) -> None:
        """
        Args:
            samples: what is trained on.
            indices: int64 [B], the samples of each batch.
            part: this process's part of a batch.
            device: where batches are wanted.
            batches: how many there are; nothing beyond is read.
        """
        on_gpu = device.type == "cuda"
        nbytes = samples.nbytes
        self._reads_ahead = nbytes is None or (on_gpu and nbytes > RESIDENT_BYTES)
        self._samples = samples.on(device) if on_gpu and not self._reads_ahead else samples
        self._indices = indices
        self._part = part
        self._device = device
        self._batches = batches
        self._reader = ThreadPoolExecutor(1, "feed") if self._reads_ahead else None
        self._ahead: dict[int, Future[Tensor]] = {}
        """The batch that was asked for last, and the one after it."""

    def batch(self, number: int) -> Fed:
        """
        Raises:
            DataError: one of its images cannot be read. That of a later batch says so in its turn.
        """
        indices = self._indices(number)
        images = self._read(number) if self._reader is None else self._read_ahead(self._reader, number)
        return Fed(
            indices=indices,
            images=self._whole(images.to(self._device, non_blocking=True), len(indices)),
            labels=self._samples.labels[indices[self._part]].to(self._device, non_blocking=True),
        )

    def close(self) -> None:
        """Ends the thread, after what it is reading."""
        if self._reader is not None:
            self._reader.shutdown(cancel_futures=True)

    def _read(self, number: int) -> Tensor:
        return self._samples.images(self._indices(number)[self._part])

    def _read_ahead(self, reader: ThreadPoolExecutor, number: int) -> Tensor:
        wanted = [each for each in (number, number + 1) if each == number or each < self._batches]
        self._ahead = {
            each: self._ahead[each] if each in self._ahead else reader.submit(self._read_pinned, each)
            for each in wanted
        }
        return self._ahead[number].result()

    def _read_pinned(self, number: int) -> Tensor:
        images = self._read(number)
        return images.pin_memory() if self._device.type == "cuda" else images

    def _whole(self, own: Tensor, size: int) -> Tensor:
        """The part in its place in the batch."""
        if len(own) == size:
            return own
        images = own.new_zeros(size, *own.shape[1:])
        images[self._part] = own
        return images
