"""The randomized quantizer on a GPU: encodes and decodes one bucket with the bytes of `common/codecs/randomized.py`.

Both functions launch on the current stream of the tensors' device, wait for nothing and allocate nothing. The linf
scales of blocks of at most TILE elements come with the encoding, which then reads an element once; all others take a
kernel ahead.

An element that is NaN or infinite makes its block's scale so (`linf` by its bits, `l2` by arithmetic; an l2 norm beyond
float32 is infinite too) and its payload meaningless. The host sees that in the scales, which it copies anyway.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.codecs.gpu import kernels
from common.codecs.randomness import MAXIMAL_ELEMENTS
from common.config import ScaleNorm
from common.errors import CodecError, refusal

TILE = 4096
"""Elements that a program works on: whole blocks, or a part of one."""

SEGMENT, LANES = 4096, 64
"""Of sums of squares: see `common/codecs/scales.py`."""

SUMS = 1024
"""Sums of squares that a program grows at the same time, if its blocks are short enough."""

MAXIMAL_BUCKET = 1 << 30
"""Elements of a bucket, whose offsets are int32 in the kernels."""

OPTIONS = {"enable_fp_fusion": False, "num_warps": 8}
"""Of every launch. Without fusion a product is rounded before it is added to, as on the CPU."""

Constants = dict[str, int]
"""Arguments of a kernel that are known when it is compiled."""


def encode(
    values: Tensor,
    start: int,
    words: tuple[int, int],
    *,
    block: int,
    bits: int,
    norm: ScaleNorm,
    scales: Tensor,
    payload: Tensor,
) -> None:
    """Encodes the bucket [start, start + n).

    Args:
        values: float32 of shape (n,), not changed.
        start: flat index of values[0], a multiple of `block`; start + n <= 2^32.
        words: `RandomKey.words()`.
        block: elements that share a scale, a multiple of 8.
        bits: of a field: 2 to 8, or 16.
        norm: what a scale is.
        scales: float32 of shape (ceil(n / block),), filled.
        payload: uint8 of shape (ceil(n * bits / 8),), filled; with 16 bits it lies at an even address.

    Raises:
        CodecError: shapes, dtypes or start do not fit together.
    """
    _require_bucket(values, start, scales, payload, block, bits)
    n = len(values)
    if not n:
        return
    first, second = _int32(words[0] + start), _int32(words[1])
    with _on(values.device):
        measured = norm is not ScaleNorm.LINF or block > TILE
        if measured:
            _measure(values, block, norm, scales)
        units = _units(payload, bits)
        args = (values, n, first, second, scales, units, len(units))
        _launch(kernels.encode_tiles, _grid(n, block), *args, MEASURED=measured, **_tile(block), **_packing(bits))


def decode(scales: Tensor, payload: Tensor, start: int, out: Tensor, *, block: int, bits: int, add: bool) -> None:
    """Decodes the bucket [start, start + n): `out += values` if `add`, else `out[:] = values`.

    Args:
        scales, payload: as `encode` fills them; not changed.
        start, block, bits: see `encode`.
        out: float32 of shape (n,).
        add: onto what is there.

    Raises:
        CodecError: shapes, dtypes or start do not fit together.
    """
    _require_bucket(out, start, scales, payload, block, bits)
    n = len(out)
    if not n:
        return
    unit = float(np.float32(1) / np.float32(2 ** (bits - 1) - 1))
    with _on(out.device):
        units = _units(payload, bits)
        args = (scales, units, len(units), out, n, unit)
        _launch(kernels.decode_tiles, _grid(n, block), *args, ADD=add, **_tile(block), **_packing(bits))


def scale_count(n: int, block: int) -> int:
    """Scales of a bucket of n elements."""
    return -(-n // block)


def payload_bytes(n: int, bits: int) -> int:
    """Bytes of a bucket's payload of n fields."""
    return (n * bits + 7) // 8


def _measure(values: Tensor, block: int, norm: ScaleNorm, scales: Tensor) -> None:
    """Scales by themselves: all l2 ones, and the linf ones of blocks longer than a tile."""
    n = len(values)
    if norm is ScaleNorm.LINF:
        largest = scales.view(torch.int32).zero_()
        _launch(kernels.measure_largest, _grid(n, block), values, n, largest, LENGTH=block, WIDTH=TILE)
    else:
        sums = _sums(block)
        _launch(kernels.measure_euclidean, (-(-len(scales) // sums["ROWS"]),), values, n, scales, **sums)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Makes the device current: Triton launches there. The CPU, where the tests interpret the kernels, always is."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """The one place where kernels are launched."""
    kernel[grid](*args, **constants, **OPTIONS)


def _grid(n: int, block: int) -> tuple[int, int]:
    """Programs: along the blocks, and along each block."""
    tile = _tile(block)
    return -(-scale_count(n, block) // tile["ROWS"]), -(-block // tile["WIDTH"])


@cache
def _tile(block: int) -> Constants:
    """A tile: ROWS blocks of LENGTH elements on WIDTH columns. A dimension is a power of two: Triton wants it."""
    width = min(_power_of_two(block), TILE)
    return {"LENGTH": block, "WIDTH": width, "ROWS": TILE // width}


@cache
def _sums(block: int) -> Constants:
    """Sums of squares of ROWS blocks at a time: lanes and segments side by side, steps one after the other."""
    length = min(block, SEGMENT)
    lanes = min(LANES, _power_of_two(length))
    segments = _power_of_two(-(-block // SEGMENT))
    return {
        "LENGTH": block,
        "ROWS": max(1, SUMS // (segments * lanes)),
        "SEGMENTS": segments,
        "SEGMENT_FOLDS": _log2(segments),
        "LANES": lanes,
        "LANE_FOLDS": _log2(lanes),
        "STEPS": -(-length // lanes),
    }


@cache
def _packing(bits: int) -> Constants:
    """The shortest run of fields that fills whole units of the payload: bytes, or (16 bits) pairs of bytes."""
    fields = 8 // gcd(bits, 8)
    units = 1 if bits == 16 else fields * bits // 8
    return {"BITS": bits, "FIELDS": fields, "UNITS": units, "UNITS_PADDED": _power_of_two(units)}


def _units(payload: Tensor, bits: int) -> Tensor:
    return payload.view(torch.int16) if bits == 16 else payload


def _int32(word: int) -> int:
    """The int32 with the bits of a word modulo 2^32: a kernel's integers are int32 only if they fit."""
    return (word + (1 << 31)) % (1 << 32) - (1 << 31)


def _log2(power: int) -> int:
    return power.bit_length() - 1


def _power_of_two(n: int) -> int:
    """The least that is no less than n >= 1."""
    return 1 << (n - 1).bit_length()


def _require_bucket(values: Tensor, start: int, scales: Tensor, payload: Tensor, block: int, bits: int) -> None:
    if block < 8 or block % 8 or start % block:
        raise CodecError(
            refusal("a start at a multiple of the block, itself one of 8", "start", start, f"block={block}")
        )
    if bits not in (2, 3, 4, 5, 6, 7, 8, 16):
        raise CodecError(refusal("2 to 8, or 16", "bits", bits))
    n = values.numel()
    if n > MAXIMAL_BUCKET or start + n > MAXIMAL_ELEMENTS:
        rule = f"at most {MAXIMAL_BUCKET} elements within {MAXIMAL_ELEMENTS}"
        raise CodecError(refusal(rule, "bucket", f"[{start}, {start + n})"))
    wanted = {
        "values": (values, torch.float32, n),
        "scales": (scales, torch.float32, scale_count(n, block)),
        "payload": (payload, torch.uint8, payload_bytes(n, bits)),
    }
    for name, (tensor, dtype, length) in wanted.items():
        if tensor.dtype != dtype or tensor.shape != (length,) or not tensor.is_contiguous():
            raise CodecError(
                refusal(f"contiguous {dtype} of shape ({length},)", name, f"{tensor.dtype}{list(tensor.shape)}")
            )
        if tensor.device != values.device:
            raise CodecError(refusal(f"tensors on {values.device}", name, tensor.device))
