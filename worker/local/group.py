"""How the vectors of q local processes come together: gloo on the CPU, NCCL between GPUs of one machine.

Only moves are left to the libraries: sums are ours, in the order of the local processes, so that they are the same bits
in every run and on either library. Everything stays on the loopback interface, or between the GPUs.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import EXIT_RETRY, DatpsError, clipped

LOOPBACK = "127.0.0.1"
MEETING_S = 60.0
"""How long processes that are all there may take to connect to each other."""
LOOK_S = 0.5
"""How often a process that waits for others looks whether it got a signal."""


class GroupBrokenError(DatpsError):
    """Another local process is gone or does not answer."""

    exit_code = EXIT_RETRY


class Store:
    """Where local processes find each other: process 0 keeps it, on the loopback interface only."""

    def __init__(self) -> None:
        """Listens on a free port."""
        listening = socket.socket()
        listening.bind((LOOPBACK, 0))
        listening.listen()
        self.port: int = listening.getsockname()[1]
        self.store = dist.TCPStore(
            LOOPBACK,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=MEETING_S),
            master_listen_fd=listening.detach(),
        )


def join_store(port: int) -> dist.Store:
    """The store that process 0 keeps.

    Raises:
        GroupBrokenError: nobody answers there.
    """
    with _telling("no store"):
        return dist.TCPStore(LOOPBACK, port, is_master=False, timeout=timedelta(seconds=MEETING_S))


class LocalGroup:
    """One process's place among q; all of them call the same methods in the same order."""

    def __init__(self, store: dist.Store, local_rank: int, size: int, device: torch.device, timeout_s: float) -> None:
        """Waits for the others.

        Args:
            store: where they meet.
            local_rank: of this process.
            size: q.
            device: where this process's vectors are, besides those on the host.
            timeout_s: how long the others may take for a call; all must have come within `MEETING_S`.

        Raises:
            GroupBrokenError: not all of them come.
        """
        self._local_rank = local_rank
        self._size = size
        self._aborted = threading.Event()
        with _telling("the others did not come"):
            self._host = _gloo(store, local_rank, size, timeout_s)
            self._cuda = _nccl(store, local_rank, size, timeout_s) if device.type == "cuda" else None

    def gather(self, vector: Tensor, edges: Sequence[int]) -> None:
        """Fills a contiguous vector, of which process j holds [edges[j], edges[j + 1]), in place.

        Raises:
            GroupBrokenError: another process is gone, or too slow.
        """
        group = self._of(vector)
        with _telling("lost while gathering"):
            works = [
                group.broadcast(vector[start:stop], process)
                for process, (start, stop) in enumerate(pairwise(edges))
                if start < stop
            ]
            for work in works:
                self._wait(work, vector)

    def add_slices(self, vector: Tensor, edges: Sequence[int], weights: Sequence[float]) -> Tensor:
        """This process's slice of the sum of all processes' vectors, each times its weight: new memory.

        The sum begins with process 0's and adds the others' in order. Products and sums are rounded each on its own: a
        fused operation rounds once, and whether one is used may depend on where in the slice an element lies.

        Args:
            vector: float32, contiguous, of the length of all slices; left as it was.
            edges: q + 1 cuts of the vector.
            weights: of each process's vector.

        Raises:
            GroupBrokenError: another process is gone, or too slow.
        """
        lengths = [stop - start for start, stop in pairwise(edges)]
        n = lengths[self._local_rank]
        received = vector.new_empty(self._size * n)
        with _telling("lost while adding gradients"):
            self._wait(self._of(vector).alltoall_base(received, vector, [n] * self._size, lengths), vector)
        rows = received.view(self._size, n)
        for row, weight in zip(rows, weights, strict=True):
            if weight != 1.0:
                row.mul_(weight)
        total = rows[0]
        for row in rows[1:]:
            total.add_(row)
        return total

    def abort(self) -> None:
        """Ends this process's waiting: another one will never come. From any thread.

        Gloo sees for itself that a process is gone, but not that one that is still there will not call any more.
        """
        self._aborted.set()
        if self._cuda is not None:
            self._cuda.abort()

    def _of(self, vector: Tensor) -> Any:
        return self._host if vector.device.type == "cpu" else self._cuda

    def _wait(self, work: Any, vector: Tensor) -> None:
        """Waits for a collective; on the host so that signals and `abort` are heard meanwhile."""
        while vector.device.type == "cpu" and not work.is_completed():
            if self._aborted.is_set():
                raise RuntimeError("another one has failed")
            with suppress(RuntimeError):  # its own, which comes again, or that it takes longer
                work.wait(timedelta(seconds=LOOK_S))
        work.wait()


# Groups of their own rather than torch's default one, of which a process has only one: the exchange may want it.


def _gloo(store: dist.Store, local_rank: int, size: int, timeout_s: float) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=LOOPBACK)]
    options._timeout = timedelta(seconds=MEETING_S)
    group = gloo(dist.PrefixStore("gloo", store), local_rank, size, options)
    group._set_default_timeout(timedelta(seconds=timeout_s))
    return group


def _nccl(store: dist.Store, local_rank: int, size: int, timeout_s: float) -> Any:
    # a wait then ends with an exception when its time is up; by default the library would end the process
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=timeout_s)
    return nccl(dist.PrefixStore("nccl", store), local_rank, size, options)


@contextmanager
def _telling(what: str) -> Iterator[None]:
    """What torch.distributed raises is told as an error of the group."""
    try:
        yield
    except RuntimeError as error:
        first_line = str(error).split("\n", maxsplit=1)[0]
        raise GroupBrokenError(f"the local processes of this worker: {what}: {clipped(first_line, 300)}") from None
