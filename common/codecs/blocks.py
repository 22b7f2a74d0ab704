"""Which blocks (runs of elements that share one scale) a bucket overlaps.

Blocks refer to the flat vector, never to the bucket: the bytes of an element do not depend on how the vector is cut.
`FixedBlocks` are N elements each, counted from flat index 0. `EdgedBlocks` lie between given flat indices (the layers
of a range, or the range as one block).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import CodecError, refusal

PIECE_ELEMENTS = 1 << 14
"""Elements that are worked on at a time: all temporaries of a piece stay in a core's cache."""

_Element = TypeVar("_Element", bound=np.generic)


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A rectangle of a bucket: `rows` consecutive blocks, or parts of one, of `length` elements each.

    Attributes:
        offset: index of its first element in the bucket.
        block: place of its first block's scale among the bucket's scales.
        rows: how many blocks.
        length: elements of each.
    """

    offset: int
    block: int
    rows: int
    length: int

    def of(self, vector: NDArray[_Element]) -> NDArray[_Element]:
        """View of the piece in a vector that spans the bucket; shape (rows, length)."""
        return vector[self.offset : self.offset + self.rows * self.length].reshape(self.rows, self.length)

    def of_scales(self, scales: NDArray[_Element]) -> NDArray[_Element]:
        """The piece's part of an array with one entry per block of the bucket; shape (rows, 1)."""
        return scales[self.block : self.block + self.rows, None]

    def parts(self) -> Iterator[Piece]:
        """Cuts into pieces of at most PIECE_ELEMENTS, in order."""
        rows_at_once = max(1, PIECE_ELEMENTS // self.length)
        length_at_once = min(self.length, PIECE_ELEMENTS)
        for row in range(0, self.rows, rows_at_once):
            for column in range(0, self.length, length_at_once):
                yield Piece(
                    offset=self.offset + row * self.length + column,
                    block=self.block + row,
                    rows=min(rows_at_once, self.rows - row),
                    length=min(length_at_once, self.length - column),
                )


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

    def runs(self, start: int, n: int) -> Iterator[Piece]:
        """Covers the bucket with as few pieces as possible, in order."""
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

    def runs(self, start: int, n: int) -> Iterator[Piece]:
        """See `Blocks`: the whole blocks, then the last one if it is cut short by the end of the vector."""
        _require_bucket(start, n, self.start, self.stop, self.length)
        rows, rest = divmod(n, self.length)
        if rows:
            yield Piece(offset=0, block=0, rows=rows, length=self.length)
        if rest:
            yield Piece(offset=n - rest, block=rows, rows=1, length=rest)


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

    def runs(self, start: int, n: int) -> Iterator[Piece]:
        """See `Blocks`: a piece per block."""
        for block, number in enumerate(self.numbers(start, n)):
            begin = max(start, self.edges[number])
            end = min(start + n, self.edges[number + 1])
            yield Piece(offset=begin - start, block=block, rows=1, length=end - begin)

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


def _require_bucket(start: int, n: int, range_start: int, range_stop: int, alignment: int) -> None:
    stop = start + n
    bucket = f"[{start}, {stop})"
    if not range_start <= start <= stop <= range_stop:
        raise CodecError(refusal(f"a bucket within [{range_start}, {range_stop})", "bucket", bucket))
    if n and (start % alignment or (stop % alignment and stop != range_stop)):
        raise CodecError(refusal(f"a bucket between multiples of {alignment}", "bucket", bucket))
