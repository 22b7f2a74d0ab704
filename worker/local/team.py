"""What one of q local processes does with the others in a round.

Together they are one worker: each has a part of the worker's batch, and a slice of its vectors, which it exchanges and
updates. The slices are runs of whole buckets. Local process 0 also exchanges the state vector.

The worker's gradient is the mean over its batch. The mean of each part is weighted with the part's size (relative to
an even part), and the q of them are added in the order of the local processes, then divided by q: with parts of equal
size these are the operations with which a server averages q workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common.codecs import Float32
from common.config import JobSpec, Topology
from common.errors import SpecError, refusal
from common.layout import Bucket, BucketKind, Layout, push_codec
from worker.exchange.base import Traffic
from worker.exchange.ps import GRACE_S
from worker.local.group import LocalGroup
from worker.metrics import COUNTS
from worker.optimizers import Shares


class Team(Protocol):
    """The local processes of one worker, as each of them sees it."""

    local_rank: int
    size: int
    """q."""

    @property
    def part(self) -> slice:
        """This process's part of the worker's batch."""
        ...

    @property
    def exchanged(self) -> slice:
        """The part of the gradient vector that this process's exchange needs."""
        ...

    def average_gradient(self, gradient: Tensor) -> None:
        """Brings the gradients of the parts together; afterwards this process's slice is that of the worker's."""
        ...

    def average_state(self, state: Float32) -> Float32:
        """The worker's state vector: buffers averaged, metrics summed up."""
        ...

    def conclude(self, state: Float32, traffic: Traffic) -> Traffic:
        """Ends an exchange: everyone gets the average state, in place; returns the traffic of all processes."""
        ...

    def share_parameters(self, theta: Tensor) -> None:
        """Brings the updated slices together."""
        ...


class Alone:
    """One process drives the worker's only device."""

    local_rank = 0
    size = 1
    part = slice(None)
    exchanged = slice(None)

    def average_gradient(self, gradient: Tensor) -> None:
        """See `Team`: there are no other parts."""

    def average_state(self, state: Float32) -> Float32:
        """See `Team`."""
        return state

    def conclude(self, state: Float32, traffic: Traffic) -> Traffic:  # noqa: ARG002
        """See `Team`."""
        return traffic

    def share_parameters(self, theta: Tensor) -> None:
        """See `Team`: there are no other slices."""


class LocalTeam:
    """One of q processes, q > 1."""

    def __init__(self, spec: JobSpec, local_rank: int, size: int) -> None:
        """
        Args:
            spec: the job.
            local_rank: of this process.
            size: q.

        Raises:
            SpecError: several processes cannot do this job.
        """
        refuse_unfit(spec, size)
        batch = spec.data.batch_per_worker
        self.local_rank = local_rank
        self.size = size
        self._spec = spec
        cuts = [batch * process // size for process in range(size + 1)]
        self.part = slice(cuts[local_rank], cuts[local_rank + 1])
        self._weights = [(stop - start) * size / batch for start, stop in pairwise(cuts)]
        self._group: LocalGroup | None = None
        self._edges: tuple[int, ...] = ()
        self._needs_whole_gradient = False

    def meet(self, store: dist.Store, device: torch.device) -> None:
        """Connects to the others, who come to the same store.

        Raises:
            GroupBrokenError: they do not come.
        """
        # longer than a server waits, which knows more
        timeout_s = self._spec.deadlines.round_s + 2 * GRACE_S
        self._group = LocalGroup(store, self.local_rank, self.size, device, timeout_s)

    def abort(self) -> None:
        """Another one is gone: this process need not wait for it. From any thread."""
        if self._group is not None:
            self._group.abort()

    def divide(self, layout: Layout) -> Shares:
        """Cuts the vectors of a layout into slices."""
        self._edges = slice_edges(layout, self.size)
        self._needs_whole_gradient = push_codec(layout, self._spec).needs_whole_vector
        return Shares(edges=self._edges, index=self.local_rank, gather=self.gather)

    def carried(self, layout: Layout) -> frozenset[int]:
        """The buckets that this process exchanges: those of its slice, with their scales, and process 0 the state's."""
        return frozenset(bucket.number for bucket in layout.buckets if self._carries(layout, bucket))

    def _carries(self, layout: Layout, bucket: Bucket) -> bool:
        if bucket.kind is BucketKind.STATE:
            return self.local_rank == 0
        gradient = bucket if bucket.kind is BucketKind.GRADIENT else layout.scales_of(bucket)
        return self.own.start <= gradient.start < self.own.stop

    @property
    def own(self) -> slice:
        """This process's slice of the gradient vector."""
        return slice(self._edges[self.local_rank], self._edges[self.local_rank + 1])

    @property
    def exchanged(self) -> slice:
        """See `Team`: scales that span the vector are measured over all of it."""
        return slice(None) if self._needs_whole_gradient else self.own

    def gather(self, vector: Tensor, edges: Sequence[int]) -> None:
        """Fills a vector of which each process holds its part."""
        self._reachable.gather(vector, edges)

    def average_gradient(self, gradient: Tensor) -> None:
        """See `Team`."""
        total = self._reachable.add_slices(gradient, self._edges, self._weights)
        divisor = torch.tensor(float(self.size), device=gradient.device)  # CUDA multiplies by a plain number's inverse
        torch.div(total, divisor, out=gradient[self.own])
        if self._needs_whole_gradient:
            self.gather(gradient, self._edges)

    def average_state(self, state: Float32) -> Float32:
        """See `Team`; everyone gets it."""
        rows = torch.empty(self.size, len(state))
        rows[self.local_rank] = torch.from_numpy(state)
        self.gather(rows.view(-1), range(0, rows.numel() + 1, len(state)))
        averaged = len(state) - COUNTS
        weighted = rows.numpy()
        weighted[:, :averaged] *= np.array(self._weights, np.float32)[:, None]
        total: Float32 = weighted[0]
        for row in weighted[1:]:
            total += row
        total[:averaged] /= np.float32(self.size)
        return total

    def conclude(self, state: Float32, traffic: Traffic) -> Traffic:
        """See `Team`; seconds are those of the process that took longest."""
        self.gather(torch.from_numpy(state), (0, *[len(state)] * self.size))
        numbers = torch.empty(self.size, 4, dtype=torch.float64)
        own = (traffic.pushed_bytes, traffic.pulled_bytes, traffic.seconds, traffic.waited_s)
        numbers[self.local_rank] = torch.tensor(own, dtype=torch.float64)
        self.gather(numbers.view(-1), range(0, 4 * self.size + 1, 4))
        pushed, pulled = numbers[:, :2].sum(0).tolist()
        seconds, waited_s = numbers[:, 2:].amax(0).tolist()
        return Traffic(pushed_bytes=round(pushed), pulled_bytes=round(pulled), seconds=seconds, waited_s=waited_s)

    def share_parameters(self, theta: Tensor) -> None:
        """See `Team`."""
        self.gather(theta, self._edges)

    @property
    def _reachable(self) -> LocalGroup:
        assert self._group is not None
        return self._group


def refuse_unfit(spec: JobSpec, size: int) -> None:
    """Refuses jobs that `size` local processes cannot do as one worker.

    Raises:
        SpecError: a batch of fewer samples than processes, or no servers.
    """
    batch = spec.data.batch_per_worker
    if batch < size:
        rule = f"data.batch_per_worker of at least {size}, one for each local process"
        raise SpecError(refusal(rule, "data.batch_per_worker", batch))
    if size > 1 and spec.exchange.topology is Topology.COLLECTIVE:
        rule = "one device of each worker (exchange.topology=collective has no servers to take several for one worker)"
        raise SpecError(refusal(rule, "devices", size))
    if size > 1 and spec.codec.keeps_residual:
        rule = f"one device of each worker (codec {spec.codec.name}: its residual is kept by one process)"
        raise SpecError(refusal(rule, "devices", size))


def slice_edges(layout: Layout, size: int) -> tuple[int, ...]:
    """Cuts of the gradient vector into `size` runs of whole buckets, each cut the one nearest to an even one.

    Where there are fewer buckets than processes some slices are empty.
    """
    cuts = sorted({0, *(bucket.stop for bucket in layout.of_kind(BucketKind.GRADIENT))})
    inner = [min(cuts, key=lambda cut: abs(cut * size - layout.d * process)) for process in range(1, size)]
    return (0, *inner, layout.d)
