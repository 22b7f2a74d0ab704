"""Pieces of a bucket that NumPy works on at a time: rectangles of whole blocks, or of parts of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from common.codecs.blocks import Blocks, EdgedBlocks, FixedBlocks

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


def runs(blocks: Blocks, start: int, n: int) -> Iterator[Piece]:
    """Covers the bucket [start, start + n) with as few pieces as possible, in order."""
    if isinstance(blocks, FixedBlocks):
        rows, rest = divmod(n, blocks.length)
        if rows:
            yield Piece(offset=0, block=0, rows=rows, length=blocks.length)
        if rest:
            yield Piece(offset=n - rest, block=rows, rows=1, length=rest)
    if isinstance(blocks, EdgedBlocks):
        for block, number in enumerate(blocks.numbers(start, n)):
            begin, end = max(start, blocks.edges[number]), min(start + n, blocks.edges[number + 1])
            yield Piece(offset=begin - start, block=block, rows=1, length=end - begin)
