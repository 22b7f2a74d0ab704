"""How the local processes of one worker share its optimizer: each keeps and updates one slice of the flat vector.

A norm of a layer needs all of the layer, whoever updates its parts: `LayerNorms` cuts layers into the same pieces and
combines their norms in the same order whatever the slices are, so that sharing changes no bit of an update (on the
CPU; CUDA's reductions may depend on where in memory a piece begins).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

PIECE = 1 << 14
"""Elements that one call reduces: below ATen's grain size, so one thread does it, always in the same order."""

Gather = Callable[[Tensor, Sequence[int]], None]
"""(vector, edges): fills `vector`, of which process j holds [edges[j], edges[j + 1]), in place, on all processes."""


def _nothing_to_gather(vector: Tensor, edges: Sequence[int]) -> None:
    """One process has it all."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Which slice of the flat vector is this process's.

    Attributes:
        edges: q + 1 cuts of [0, d]; slice j is [edges[j], edges[j + 1]) and may be empty.
        index: j of this process.
        gather: brings the slices together; all processes call it in the same order.
    """

    edges: tuple[int, ...]
    index: int = 0
    gather: Gather = _nothing_to_gather

    @classmethod
    def undivided(cls, d: int) -> Shares:
        """One process has the whole vector."""
        return cls(edges=(0, d))

    @property
    def start(self) -> int:
        """First element of this process's slice."""
        return self.edges[self.index]

    @property
    def stop(self) -> int:
        """One past the last element of this process's slice."""
        return self.edges[self.index + 1]

    def own(self, vector: Tensor) -> Tensor:
        """This process's slice of a vector of d elements, a view."""
        return vector[self.start : self.stop]

    def joined(self, own: Tensor) -> Tensor:
        """The vector of which every process gives its slice; `own` itself if it is all of it. Gathers."""
        if len(self.edges) == 2:
            return own
        vector = own.new_zeros(self.edges[-1])
        self.own(vector).copy_(own)
        self.gather(vector, self.edges)
        return vector


class LayerNorms:
    """The l2 norm of every layer, as the norm of the norms of its pieces of `PIECE` elements.

    A piece belongs to the process in whose slice it begins. The few pieces that slices cut, at most one for each cut,
    are brought together first.
    """

    def __init__(self, lengths: Sequence[int], shares: Shares, device: torch.device | str = "cpu") -> None:
        """`lengths`: elements of the layers."""
        self._shares = shares
        pieces = [_pieces(length) for length in lengths]
        self._layer_pieces = [len(layer) for layer in pieces]
        self._lengths = [length for layer in pieces for length in layer]
        starts = list(accumulate(self._lengths, initial=0))[:-1]
        owners = [min(bisect_right(shares.edges, start), len(shares.edges) - 1) - 1 for start in starts]
        self._piece_edges = tuple(sum(owner < process for owner in owners) for process in range(len(shares.edges)))
        first, last = self._piece_edges[shares.index], self._piece_edges[shares.index + 1]
        self._owned = slice(first, last)
        self._cut = _CutPieces(starts, self._lengths, shares, device)
        whole = [(starts[k], self._lengths[k]) for k in range(first, last) if k not in self._cut.numbers]
        self._offset = whole[0][0] - shares.start if whole else 0
        self._whole_lengths = [length for _, length in whole]

    def of_vector(self, vector: Tensor) -> Tensor:
        """float32 [h], norms of the layers of a vector that all processes have."""
        return self._combined(list(torch.split(vector, self._lengths)[self._owned]))

    def of_slices(self, own: Tensor) -> Tensor:
        """float32 [h], norms of the layers of a vector of which each process has its slice."""
        whole = own[self._offset : self._offset + sum(self._whole_lengths)]
        return self._combined([*torch.split(whole, self._whole_lengths), *self._cut.owned_pieces(own)])

    def _combined(self, pieces: list[Tensor]) -> Tensor:
        """Norms of the layers from this process's pieces, in order. Gathers."""
        shares = self._shares
        if len(shares.edges) == 2:
            of_pieces = torch.stack(torch._foreach_norm(pieces))
        else:
            of_pieces = self._cut.memory.new_zeros(len(self._lengths))
            if pieces:
                of_pieces[self._owned] = torch.stack(torch._foreach_norm(pieces))
            shares.gather(of_pieces, self._piece_edges)
        return torch.stack(torch._foreach_norm(torch.split(of_pieces, self._layer_pieces)))


class _CutPieces:
    """The pieces that begin in one slice and end in another, one after the other in memory of their own."""

    def __init__(
        self, starts: Sequence[int], lengths: Sequence[int], shares: Shares, device: torch.device | str
    ) -> None:
        inner = shares.edges[1:-1]
        cut = [
            k
            for k, (start, length) in enumerate(zip(starts, lengths, strict=True))
            if any(start < edge < start + length for edge in inner)
        ]
        self.numbers = frozenset(cut)
        offsets = list(accumulate((lengths[k] for k in cut), initial=0))
        self.memory = torch.zeros(offsets[-1], dtype=torch.float32, device=device)
        self._gather = shares.gather
        self._edges = tuple(
            sum(min(max(edge - starts[k], 0), lengths[k]) for k in cut) for edge in shares.edges
        )  # how many elements of cut pieces lie before each cut of the slices
        self._owned: list[Tensor] = []
        self._copies: list[tuple[Tensor, slice]] = []
        for k, (begin, end) in zip(cut, pairwise(offsets), strict=True):
            start, stop = max(starts[k], shares.start), min(starts[k] + lengths[k], shares.stop)
            if start < stop:
                place = begin + start - starts[k]
                own = slice(start - shares.start, stop - shares.start)
                self._copies.append((self.memory[place : place + stop - start], own))
            if shares.start <= starts[k] < shares.stop:
                self._owned.append(self.memory[begin:end])

    def owned_pieces(self, own: Tensor) -> list[Tensor]:
        """The cut pieces that belong to this process, from everyone's slices. Gathers, if there are any cut pieces."""
        if self.numbers:
            for memory, part in self._copies:
                memory.copy_(own[part])
            self._gather(self.memory, self._edges)
        return self._owned


def _pieces(length: int) -> list[int]:
    """Lengths of the pieces of one layer: all `PIECE`, but for the last."""
    return [min(PIECE, length - start) for start in range(0, max(length, 1), PIECE)]
