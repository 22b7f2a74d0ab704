"""What is run on a device, and returns arrays: every case of the table, and the kernels' odd inputs.

Each program takes a device. It runs where the kernels run: interpreted in a process of its own, or on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.codecs.gpu.randomized import decode, encode, payload_bytes, scale_count
from common.config import ScaleNorm
from tests.gpu.table import CASES, KEY, Case, gaussian

Arrays = dict[str, np.ndarray]
Program = Callable[[torch.device], Arrays]

GUARD = 64
"""Bytes before and behind each output that have to stay as they are."""

BAD_ELEMENTS = {3: np.nan, 64 + 63: np.inf, 3 * 64: -np.inf, 1600: -np.nan}
BAD_BLOCK = 64


class Guarded:
    """An output on the device between two stretches of guard bytes."""

    def __init__(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        size = n * dtype.itemsize
        self._memory = torch.full((size + 2 * GUARD,), 0xA5, dtype=torch.uint8, device=device)
        self.tensor: Tensor = self._memory[GUARD : GUARD + size].view(dtype)

    def array(self) -> np.ndarray:
        memory = self._memory.cpu().numpy()
        assert (memory[:GUARD] == 0xA5).all(), "written before the beginning"
        assert (memory[len(memory) - GUARD :] == 0xA5).all(), "written behind the end"
        return self.tensor.cpu().numpy()


def round_trip(case: Case, device: torch.device) -> Arrays:
    """Encodes the case, decodes it onto other values, and (see `Case.is_set`) in place of them."""
    values = torch.from_numpy(case.values()).to(device)
    scales = Guarded(scale_count(case.n, case.block), torch.float32, device)
    payload = Guarded(payload_bytes(case.n, case.bits), torch.uint8, device)
    form = {"block": case.block, "bits": case.bits}
    norm = ScaleNorm(case.norm)
    encode(values, case.start, KEY.words(), norm=norm, scales=scales.tensor, payload=payload.tensor, **form)
    assert np.array_equal(values.cpu().numpy().view(np.int32), case.values().view(np.int32)), "the input was changed"
    arrays = {"scales": scales.array(), "payload": payload.array()}
    for name, add in (("added", True), ("set", False)):
        if not add and not case.is_set:
            continue
        out = Guarded(case.n, torch.float32, device)
        out.tensor.copy_(torch.from_numpy(other_values(case.n)))
        decode(scales.tensor, payload.tensor, case.start, out.tensor, add=add, **form)
        arrays[name] = out.array()
    return arrays


def other_values(n: int) -> np.ndarray:
    return gaussian(n, seed=99)


def decoded_noise(device: torch.device) -> Arrays:
    """Every field that can be received, under scales from denormal to huge."""
    arrays = {}
    for bits in (2, 3, 4, 5, 6, 7, 8, 16):
        scales, payload = noise(bits)
        out = torch.zeros(8 * payload.size // bits, device=device)
        received = (torch.from_numpy(scales).to(device), torch.from_numpy(payload).to(device))
        decode(*received, 0, out, block=64, bits=bits, add=False)
        arrays[str(bits)] = out.cpu().numpy()
    return arrays


def noise(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales of blocks of 64, and random payload."""
    scales = np.array([2.0**exponent for exponent in (-149, -140, -126, -64, 0, 64, 126)], np.float32)
    return scales, np.random.default_rng(bits).integers(0, 256, len(scales) * 8 * bits, np.uint8)


def not_finite(device: torch.device) -> Arrays:
    """Scales of blocks of which some hold NaN or infinity."""
    arrays = {}
    for block, norm in ((BAD_BLOCK, "linf"), (BAD_BLOCK, "l2"), (8192, "linf"), (8192, "l2")):
        values = gaussian(8200, seed=5)
        values[list(BAD_ELEMENTS)] = list(BAD_ELEMENTS.values())
        scales = torch.zeros(scale_count(len(values), block), device=device)
        payload = torch.zeros(len(values), dtype=torch.uint8, device=device)
        form = {"block": block, "bits": 8, "norm": ScaleNorm(norm)}
        encode(torch.from_numpy(values).to(device), 0, KEY.words(), scales=scales, payload=payload, **form)
        arrays[f"{block}-{norm}"] = scales.cpu().numpy()
    return arrays


def _of(case: Case) -> Program:
    return lambda device: round_trip(case, device)


PROGRAMS: dict[str, Program] = {name: _of(case) for name, case in CASES.items()}
PROGRAMS |= {"decoded noise": decoded_noise, "not finite": not_finite}
