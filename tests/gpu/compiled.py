"""Compiles the kernels for an H200, as the product launches them: `python -m tests.gpu.compiled FILE.json`.

Compiling needs no GPU, only to be told which one. In a process of its own: it pretends to have one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from common.codecs.gpu import randomized
from common.config import ScaleNorm
from tests.gpu.table import COMPILED, FUSED


class Hopper:
    """A driver that only knows what it compiles for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def main(path: Path) -> None:
    """Writes the PTX of every kernel by its name and form."""
    driver.set_active(Hopper())
    compiled = kernels_of(COMPILED)
    randomized.OPTIONS["enable_fp_fusion"] = True
    compiled |= {f"fused {name}": ptx for name, ptx in kernels_of(FUSED).items()}
    path.write_text(json.dumps(compiled))


def kernels_of(forms: dict[tuple[int, int, str, int], tuple[str, ...]]) -> dict[str, str]:
    """Lets the product encode and decode a bucket of each form, and compiles where it launches."""
    compiled: dict[str, str] = {}
    launched: list[tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []
    randomized._launch = lambda kernel, grid, *args, **constants: launched.append((kernel, grid, args, constants))
    for form, names in forms.items():
        launched.clear()
        round_trip(*form)
        for kernel, grid, args, constants in launched:
            if kernel.fn.__name__ in names:
                done = kernel.warmup(*args, grid=grid, **constants, **randomized.OPTIONS)
                assert done.asm["cubin"], "ptxas made no machine code"
                compiled[f"{kernel.fn.__name__} {form[0]}/{form[1]}/{form[2]}"] = done.asm["ptx"]
    return compiled


def round_trip(bits: int, block: int, norm: str, n: int) -> None:
    values, scales = torch.zeros(n), torch.zeros(randomized.scale_count(n, block))
    payload = torch.zeros(randomized.payload_bytes(n, bits), dtype=torch.uint8)
    form = {"block": block, "bits": bits}
    words = (2**32 - 1, 2**31)
    randomized.encode(values, block, words, norm=ScaleNorm(norm), scales=scales, payload=payload, **form)
    randomized.decode(scales, payload, block, values, add=True, **form)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        main(Path(sys.argv[1]))
