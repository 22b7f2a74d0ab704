"""Levels of equation (A6), element by element: in integers for up to 8 bits, in float32 for all widths."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import helper
from common.codecs.cpu.draws import draw
from common.codecs.cpu.packing import PIECE

_DRAW = np.float32(2.0**-24)
_DRAWS = np.float32(2.0**24)


@helper
def draw_short_fields(
    values: Float32,
    index: np.uint32,
    second_word: np.uint32,
    first: np.float32,
    second: np.float32,
    top: np.float32,
    fields: NDArray[np.int8],
) -> None:
    """Signed levels of at most 127.

    With the draw u = r * 2^-24 and t = y * 2^24, rounded up, the level floor(y) + [u < y - floor(y)] is
    -floor((r - t) / 2^24): the difference falls below a multiple of 2^24 just where r is less than the rest of t.
    Products with 2^24 are exact, and rounding t up changes no comparison with the whole number r. One subtraction and
    one shift thus replace rounding down, a difference, a comparison and a sum.

    Args:
        values: float32 of shape (n,), finite.
        index: flat index of values[0] plus the key's first word, modulo 2^32.
        second_word: of the key.
        first, second, top: see `level_factors`.
        fields: written; int8 of shape (n,).
    """
    second = np.float32(second * _DRAWS)
    top = np.float32(top * _DRAWS)
    for i in range(values.size):
        x = values[i]
        t = np.int32(np.ceil(min(np.float32(np.float32(abs(x) * first) * second), top)))
        minus_level = np.int32(np.int32(draw(index, second_word) - t) >> np.int32(24))
        fields[i] = np.int8(minus_level if x < np.float32(0) else -minus_level)
        index = np.uint32(index + np.uint32(1))


@helper
def draw_levels(
    values: Float32,
    index: np.uint32,
    second_word: np.uint32,
    first: np.float32,
    second: np.float32,
    top: np.float32,
    levels: NDArray[np.int32],
) -> None:
    """Levels without sign, 0 to 65536; arguments as for `draw_short_fields`."""
    for i in range(values.size):
        y = min(np.float32(np.float32(abs(values[i]) * first) * second), top)
        floor = np.floor(y)
        up = np.float32(np.float32(draw(index, second_word)) * _DRAW) < np.float32(y - floor)
        levels[i] = np.int32(np.int32(floor) + np.int32(up))
        index = np.uint32(index + np.uint32(1))


def room_for_levels() -> NDArray[np.int32]:
    """Memory for the levels of a piece; they need not be set."""
    return np.empty(PIECE, np.int32)
