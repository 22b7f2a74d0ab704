"""Triton kernels of the randomized quantizer: block scales, encoding, decoding.

The bytes are those of the definitions on top of `common/codecs/randomized.py`, `scales.py`, `randomness.py` and
`packing.py`, because every float operation here is one of IEEE 754, in the defined order:

    no contraction   kernels are launched with `enable_fp_fusion=False` (`randomized.OPTIONS`): LLVM then emits
                     `mul.rn` and `add.rn`, which are never fused, and ptxas gets `--fmad=false`
    no flushing      an instruction without `.ftz` takes and gives float32 denormals like other numbers; Triton emits
                     `.ftz` only in libdevice's functions, of which none is used (`tl.floor` would be one)
    division, root   `div_rn` is `div.rn.f32`; a float64 `sqrt` has no approximate form, it is `sqrt.rn.f64`
    order of sums    lanes are added in a loop, halves by adding exactly two numbers: nothing is left to a reduction

`tests/gpu/test_compiled.py` reads all of this from the PTX that is compiled for sm_90.

A program works on a tile of ROWS blocks, or of one block's part, by WIDTH columns. Columns past the block's LENGTH and
elements past the bucket's `count` are masked: they load as zero, which changes no scale and no field.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton  # type: ignore  # untyped, or (not on Linux) absent
import triton.language as tl  # type: ignore

TINY = tl.constexpr(2.0**-64)
HUGE = tl.constexpr(2.0**64)
UNIT = tl.constexpr(2.0**-24)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""All bits of a float32 but its sign: magnitudes order as these integers do, infinity and NaN above all numbers."""


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit`. The key words change every round, and no value of theirs may compile a variant of its own."""
    return triton.jit(function, do_not_specialize=["first_word", "second_word"])


@kernel
def uniforms(x: tl.tensor, second_word: tl.tensor) -> tl.tensor:
    """Draws of `randomness.py`; x is uint32, index + k0."""
    x ^= x >> 16
    x *= 0x21F0AAAD
    x ^= second_word
    x ^= x >> 15
    x *= 0x735A2D97
    x ^= x >> 15
    x *= 0x31848BAB
    x ^= x >> 14
    return ((x >> 8) | 1).to(tl.float32) * UNIT


@kernel
def next_larger(x: tl.tensor) -> tl.tensor:
    """`nextafter` towards infinity of positive finite float32."""
    return (x.to(tl.int32, bitcast=True) + 1).to(tl.float32, bitcast=True)


@kernel
def halves(sums: tl.tensor, ROWS: tl.constexpr, WIDTH: tl.constexpr, FOLDS: tl.constexpr) -> tl.tensor:
    """Adds each row of (ROWS, WIDTH) in halves, WIDTH = 2^FOLDS; each `tl.sum` adds two numbers, in any order alike."""
    for fold in tl.static_range(FOLDS):
        sums = tl.sum(tl.reshape(sums, (ROWS, 2, WIDTH // (2 << fold))), axis=1)
    return tl.reshape(sums, (ROWS,))


@kernel
def fields_of(x: tl.tensor, scale: tl.tensor, draws: tl.tensor, BITS: tl.constexpr) -> tl.tensor:
    """Levels with the sign of x as two's complement of BITS bits, int32; `scale` is float32 of shape (ROWS,).

    An element that is NaN or infinite gives some field: its block's scale says so.
    """
    levels = tl.full(scale.shape, (1 << (BITS - 1)) - 1, tl.float32)
    first = tl.where(scale < TINY, HUGE, tl.where(scale > HUGE, TINY, 1.0))
    shifted = scale * first
    second = tl.div_rn(levels, tl.where(scale > 0, shifted, 1.0))
    second = tl.where(shifted * second < levels, next_larger(second), second)
    second = tl.where(scale > 0, second, 0.0)
    bits = x.to(tl.int32, bitcast=True)
    magnitude = (bits & MAGNITUDE).to(tl.float32, bitcast=True)
    y = tl.minimum((magnitude * first[:, None]) * second[:, None], levels[:, None])
    whole = y.to(tl.int32)  # truncates, which is floor(y) for y >= 0
    level = whole + (draws < y - whole.to(tl.float32)).to(tl.int32)
    return tl.where(bits < 0, -level, level) & ((1 << BITS) - 1)


@kernel
def store_fields(
    fields: tl.tensor,
    row: tl.tensor,
    chunk: tl.tensor,
    payload: tl.tensor,
    total: tl.tensor,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PADDED: tl.constexpr,
) -> None:
    """Packs a tile of int32 fields and stores it.

    FIELDS fields fill a word of UNITS units of the payload. A unit is a byte, for 16 bits two; `total` is the payload's
    length in units.
    """
    words = fields.to(tl.uint64) if BITS * FIELDS > 32 else fields.to(tl.uint32)
    if FIELDS > 1:
        shifts = (tl.arange(0, FIELDS) * BITS).to(words.dtype)
        words = tl.sum(tl.reshape(words, (ROWS, WIDTH // FIELDS, FIELDS)) << shifts[None, None, :], axis=2)
    column = chunk * (WIDTH // FIELDS) + tl.arange(0, WIDTH // FIELDS)[None, :]
    position = row[:, None] * (LENGTH // FIELDS * UNITS) + column * UNITS
    inside = column < LENGTH // FIELDS
    if UNITS == 1:
        tl.store(payload + position, words.to(payload.dtype.element_ty), mask=inside & (position < total))
    else:
        unit = tl.arange(0, UNITS_PADDED)[None, None, :]
        bytes_of_words = words[:, :, None] >> (unit * 8).to(words.dtype)
        position = position[:, :, None] + unit
        mask = inside[:, :, None] & (unit < UNITS) & (position < total)
        tl.store(payload + position, bytes_of_words.to(payload.dtype.element_ty), mask=mask)


@kernel
def load_fields(
    row: tl.tensor,
    chunk: tl.tensor,
    payload: tl.tensor,
    total: tl.tensor,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PADDED: tl.constexpr,
) -> tl.tensor:
    """The inverse of `store_fields`: a tile of signed levels, int32 of shape (ROWS, WIDTH)."""
    column = chunk * (WIDTH // FIELDS) + tl.arange(0, WIDTH // FIELDS)[None, :]
    position = row[:, None] * (LENGTH // FIELDS * UNITS) + column * UNITS
    inside = column < LENGTH // FIELDS
    if UNITS == 1:
        words = tl.load(payload + position, mask=inside & (position < total), other=0).to(tl.uint32)
    else:
        unit = tl.arange(0, UNITS_PADDED)[None, None, :]
        position = position[:, :, None] + unit
        mask = inside[:, :, None] & (unit < UNITS) & (position < total)
        parts = tl.load(payload + position, mask=mask, other=0)
        parts = parts.to(tl.uint64) if BITS * FIELDS > 32 else parts.to(tl.uint32)
        words = tl.sum(parts << (unit * 8).to(parts.dtype), axis=2)
    if FIELDS > 1:
        shifts = (tl.arange(0, FIELDS) * BITS).to(words.dtype)
        words = tl.reshape((words[:, :, None] >> shifts[None, None, :]) & ((1 << BITS) - 1), (ROWS, WIDTH))
    return (words.to(tl.int32) << (32 - BITS)) >> (32 - BITS)


@kernel
def measure_largest(
    values: tl.tensor, count: tl.tensor, scales: tl.tensor, LENGTH: tl.constexpr, WIDTH: tl.constexpr
) -> None:
    """linf scales of blocks of many tiles onto zeros; `scales` as int32. A maximum is the same in any order."""
    block = tl.program_id(0)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    offset = block * LENGTH + column
    x = tl.load(values + offset, mask=(column < LENGTH) & (offset < count), other=0.0)
    tl.atomic_max(scales + block, tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=0), sem="relaxed")


@kernel
def measure_euclidean(
    values: tl.tensor,
    count: tl.tensor,
    scales: tl.tensor,
    LENGTH: tl.constexpr,
    ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SEGMENT_FOLDS: tl.constexpr,
    LANES: tl.constexpr,
    LANE_FOLDS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """l2 scales of ROWS blocks, each of SEGMENTS segments (a power of two: those past the end are zero).

    Apart from `encode_tiles`, whatever the block's length: a scale that is folded by reshaping lies across the threads
    in a way that Triton carries on into the encoding, where every thread then works on the whole tile.
    """
    part = tl.arange(0, ROWS * SEGMENTS)[:, None]
    lane = tl.arange(0, LANES)[None, :]
    block = tl.program_id(0) * ROWS + part // SEGMENTS
    sums = tl.zeros((ROWS * SEGMENTS, LANES), tl.float64)
    for step in range(STEPS):
        column = (part % SEGMENTS) * 4096 + step * LANES + lane
        offset = block * LENGTH + column
        x = tl.load(values + offset, mask=(column < LENGTH) & (offset < count), other=0.0).to(tl.float64)
        sums += x * x
    segments = halves(sums, ROWS * SEGMENTS, LANES, LANE_FOLDS)
    norm = tl.sqrt(halves(segments, ROWS, SEGMENTS, SEGMENT_FOLDS))
    scale = norm.to(tl.float32)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    scale = tl.where(scale.to(tl.float64) < norm, next_larger(scale), scale)
    tl.store(scales + row, scale, mask=row * LENGTH < count)


@kernel
def encode_tiles(
    values: tl.tensor,
    count: tl.tensor,
    first_word: tl.tensor,
    second_word: tl.tensor,
    scales: tl.tensor,
    payload: tl.tensor,
    total: tl.tensor,
    MEASURED: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PADDED: tl.constexpr,
) -> None:
    """Fields of a tile; unless MEASURED, the tile holds whole blocks, and their linf scales come first.

    `first_word` is (k0 + start) modulo 2^32, `second_word` is k1, both as int32.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    column = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
    offset = row[:, None] * LENGTH + column
    x = tl.load(values + offset, mask=(column < LENGTH) & (offset < count), other=0.0)
    within = row * LENGTH < count
    if MEASURED:
        scale = tl.load(scales + row, mask=within, other=0.0)
    else:
        scale = tl.max(x.to(tl.int32, bitcast=True) & MAGNITUDE, axis=1).to(tl.float32, bitcast=True)
        tl.store(scales + row, scale, mask=within)
    index = offset.to(tl.uint32) + first_word.to(tl.uint32, bitcast=True)
    fields = fields_of(x, scale, uniforms(index, second_word.to(tl.uint32, bitcast=True)), BITS)
    store_fields(fields, row, chunk, payload, total, LENGTH, WIDTH, ROWS, BITS, FIELDS, UNITS, UNITS_PADDED)


@kernel
def decode_tiles(
    scales: tl.tensor,
    payload: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    count: tl.tensor,
    unit: tl.tensor,
    ADD: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PADDED: tl.constexpr,
) -> None:
    """(field * unit) * scale, onto `out` or in its place; `unit` is float32(1 / s)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1)
    levels = load_fields(row, chunk, payload, total, LENGTH, WIDTH, ROWS, BITS, FIELDS, UNITS, UNITS_PADDED)
    scale = tl.load(scales + row, mask=row * LENGTH < count, other=0.0)
    value = (levels.to(tl.float32) * unit) * scale[:, None]
    column = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
    offset = row[:, None] * LENGTH + column
    mask = (column < LENGTH) & (offset < count)
    if ADD:
        value = tl.load(out + offset, mask=mask, other=0.0) + value
    tl.store(out + offset, value, mask=mask)
