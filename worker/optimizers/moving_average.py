"""The exponential moving average of weights and batch-norm statistics, which is judged instead of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from worker.optimizers.shares import Shares


class Averages(NamedTuple):
    """What is averaged, all of it."""

    theta: Tensor
    """float32 [d]."""
    buffers: Mapping[str, Tensor]
    """Batch-norm statistics by name."""


class MovingAverage:
    """w <- d_t w + (1 - d_t) theta after every update t = 1, 2, ..., with d_t = min(decay, (1 + t) / (10 + t)).

    The rising decay (that of TensorFlow's `ExponentialMovingAverage` with `num_updates`) forgets the random start after
    some ten rounds; a constant one would carry it on for about 1 / (1 - decay). Batch-norm statistics are averaged with
    the same weights, after the workers' average of the round.

    Where processes share the optimizer, each keeps the slice of the weights that it updates, and all of the statistics.
    """

    def __init__(self, decay: float, theta: Tensor, buffers: Mapping[str, Tensor], shares: Shares) -> None:
        """It begins as a copy of `theta`, float32 [d], and `buffers`."""
        self.decay = decay
        self._shares = shares
        self._own = shares.own(theta).clone()
        self._buffers = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        self._whole: Tensor | None = None

    @torch.no_grad()
    def update(self, theta: Tensor, buffers: Mapping[str, Tensor], t: int) -> None:
        """Takes in the parameters and statistics after update `t`, counted from 1; of `theta` this process's slice."""
        weight = 1 - min(self.decay, (1 + t) / (10 + t))
        kept = [self._own, *self._buffers.values()]
        torch._foreach_lerp_(kept, [self._shares.own(theta), *(buffers[name] for name in self._buffers)], weight)
        self._whole = None

    def whole(self) -> Averages:
        """The averages; not to be changed. Gathers, once after each update."""
        if self._whole is None:
            self._whole = self._shares.joined(self._own)
        return Averages(theta=self._whole, buffers=self._buffers)

    @torch.no_grad()
    def load(self, averages: Averages) -> None:
        """Takes over what `whole` gave, of the same shapes, copying what this process keeps."""
        self._own.copy_(self._shares.own(averages.theta))
        for name, buffer in self._buffers.items():
            buffer.copy_(averages.buffers[name])
        self._whole = None
