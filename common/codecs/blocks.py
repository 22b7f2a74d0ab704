"""Which blocks (runs of elements that share one scale) a bucket overlaps.

Blocks refer to the flat vector, never to the bucket: the bytes of an element do not depend on how the vector is cut.
`FixedBlocks` are N elements each, counted from flat index 0. `EdgedBlocks` lie between given flat indices (the layers
of a range, or the range as one block).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import CodecError, refusal

Bounds = tuple[int, NDArray[np.int64], int]
"""Where blocks end, for the kernels: `length`, `edges`, `first_block` of `cpu.scales.block_end`."""

_NO_EDGES: NDArray[np.int64] = np.empty(0, np.int64)


class Blocks(Protocol):
    """The blocks of one encoder's range [start, stop) of the flat vector."""

    @property
    def alignment(self) -> int:
        """Buckets start at multiples of this many flat elements; they end at one, or where the range ends."""
        ...

    def numbers(self, start: int, n: int) -> range:
        """Numbers of the blocks that overlap the bucket [start, start + n).

        Raises:
            CodecError: the bucket leaves the range or is not aligned.
        """
        ...

    def bounds(self, start: int) -> Bounds:
        """Where the blocks of a bucket from `start` end."""
        ...

    def longest(self, n: int) -> int:
        """No block within n elements has more elements than this."""
        ...


@dataclass(frozen=True, kw_only=True)
class FixedBlocks:
    """Blocks of `length` elements, counted from flat index 0.

    Attributes:
        start, stop: the range.
        length: elements of a block, a multiple of 8.
    """

    start: int
    stop: int
    length: int

    @property
    def alignment(self) -> int:
        """See `Blocks`: whole blocks."""
        return self.length

    def numbers(self, start: int, n: int) -> range:
        """See `Blocks`; block k is [k * length, (k + 1) * length)."""
        _require_bucket(start, n, self.start, self.stop, self.length)
        first = start // self.length
        return range(first, first - (-n // self.length))

    def bounds(self, start: int) -> Bounds:  # noqa: ARG002
        """See `Blocks`; a bucket starts with a block."""
        return self.length, _NO_EDGES, 0

    def longest(self, n: int) -> int:
        """See `Blocks`."""
        return min(self.length, n)


@dataclass(frozen=True, kw_only=True)
class EdgedBlocks:
    """Blocks between flat indices.

    Attributes:
        edges: rising; block k is [edges[k], edges[k + 1]). The first and last one are the range's ends.
        alignment: of the buckets, not of the edges.
    """

    edges: tuple[int, ...]
    alignment: int = 8

    @classmethod
    def of_layers(cls, start: int, stop: int, layer_edges: Sequence[int]) -> EdgedBlocks:
        """The layers clipped to [start, stop); empty ones vanish."""
        return cls(edges=tuple(sorted({start, stop, *(edge for edge in layer_edges if start < edge < stop)})))

    def numbers(self, start: int, n: int) -> range:
        """See `Blocks`."""
        _require_bucket(start, n, self.edges[0], self.edges[-1], self.alignment)
        first = bisect_right(self.edges, start) - 1
        return range(first, bisect_left(self.edges, start + n) if n else first)

    def bounds(self, start: int) -> Bounds:
        """See `Blocks`."""
        return 0, self._edges, bisect_right(self.edges, start) - 1

    def longest(self, n: int) -> int:
        """See `Blocks`."""
        return n

    def stretch(self, start: int, n: int) -> tuple[int, EdgedBlocks]:
        """The number of the first of the whole blocks [start, start + n), and these blocks by themselves.

        Raises:
            CodecError: the stretch cuts a block.
        """
        for edge in (start, start + n):
            if edge not in self.edges:
                raise CodecError(refusal("a stretch of whole blocks", "end of the stretch", edge))
        first, last = self.edges.index(start), self.edges.index(start + n)
        return first, EdgedBlocks(edges=self.edges[first : last + 1], alignment=1)

    @cached_property
    def _edges(self) -> NDArray[np.int64]:
        return np.array(self.edges, np.int64)


def _require_bucket(start: int, n: int, range_start: int, range_stop: int, alignment: int) -> None:
    stop = start + n
    if not range_start <= start <= stop <= range_stop:
        raise CodecError(refusal(f"a bucket within [{range_start}, {range_stop})", "bucket", f"[{start}, {stop})"))
    if n and (start % alignment or (stop % alignment and stop != range_stop)):
        raise CodecError(refusal(f"a bucket between multiples of {alignment}", "bucket", f"[{start}, {stop})"))
