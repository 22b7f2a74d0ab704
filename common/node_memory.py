"""Memory that a worker and the shard of its own node share: payloads between them never cross a socket.

A message of a stream that uses it is as any other but for its payload, which is empty: it lies in the bucket's slot.
There is a slot for every bucket of the shard, each way, for even and for odd rounds. That is enough: a server keeps the
averages of a round until every worker has contributed to the next one, and a worker does so when it has them. So nobody
reads what is written two rounds later. The messages themselves order the accesses.
"""

from __future__ import annotations

import mmap
import os
import tempfile

import numpy as np

from common.codecs import Bytes
from common.config import JobSpec
from common.errors import PeerLostError, refusal
from common.layout import BucketKind, Layout, pull_codec, push_codec, state_codec

_ALIGNMENT = 64
_CONTRIBUTION, _AVERAGE = 0, 1


class NodeMemory:
    """The slots of one shard. A process makes it, hands its file to another one, and both lay it out alike."""

    def __init__(self, descriptor: int) -> None:
        """
        Args:
            descriptor: of a file that both processes have open.
        """
        self.descriptor = descriptor
        self._slots: dict[tuple[int, int, int], Bytes] = {}

    @classmethod
    def make(cls) -> NodeMemory:
        """Memory of a new file, which has no name and is gone with the processes that have it open."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create("datps-node"))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def lay_out(self, layout: Layout, spec: JobSpec, shard: int, *, grow: bool) -> None:
        """Finds the slots' places, which follow from the layout.

        Args:
            layout: how the vectors are cut.
            spec: the job.
            shard: the shard whose buckets have slots.
            grow: make the file as long as it has to be; for the process that made it, which comes first.

        Raises:
            PeerLostError: the file is not as long as it has to be, or there is no memory for it.
        """
        plain = state_codec(layout)
        places, end = dict[tuple[int, int, int], tuple[int, int]](), 0
        for way, codec in ((_CONTRIBUTION, push_codec(layout, spec)), (_AVERAGE, pull_codec(layout, spec, shard))):
            for bucket in layout.of_shard(shard):
                used = codec if bucket.kind is BucketKind.GRADIENT else plain
                size = used.payload_bytes(bucket.start, bucket.n)
                for parity in range(2):
                    places[way, parity, bucket.number] = end, size
                    end += -(-size // _ALIGNMENT) * _ALIGNMENT
        try:
            if grow:
                os.ftruncate(self.descriptor, end)
            memory = np.frombuffer(mmap.mmap(self.descriptor, end), np.uint8)
        except (OSError, ValueError) as error:
            raise PeerLostError(refusal(f"{end} bytes of shared memory", "node_memory", str(error))) from None
        self._slots = {key: memory[start : start + size] for key, (start, size) in places.items()}

    def contribution(self, round_: int, bucket: int) -> Bytes:
        """Where the worker puts the payload of its contribution: uint8, as long as the codec says."""
        return self._slots[_CONTRIBUTION, round_ % 2, bucket]

    def average(self, round_: int, bucket: int) -> Bytes:
        """Where the server puts the payload of an average: uint8, as long as the codec says."""
        return self._slots[_AVERAGE, round_ % 2, bucket]

    def close(self) -> None:
        """Closes the file; what is mapped stays until nobody uses it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
