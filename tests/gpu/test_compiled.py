"""The kernels compile for an H200, and to operations that round like IEEE 754: read from the PTX, without a GPU."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.conftest import SECONDS

pytestmark = pytest.mark.timeout(SECONDS)

OPERATION = re.compile(r"^\s*(?:@!?%p\d+\s+)?([a-z]\w*(?:\.\w+)*\.f(?:32|64)(?:\.\w+)*)\s", re.MULTILINE)
EXACT = re.compile(
    r"(?:add|sub|mul|div|sqrt)\.rn\.f(?:32|64)"
    r"|(?:min|max|selp|mov)\.f32|setp\.[a-z]+\.f(?:32|64)"
    r"|cvt\.(?:rn\.f32\.[us](?:16|32)|rn\.f32\.f64|f64\.f32|rzi\.s32\.f32)"
)
"""Correctly rounded, or without rounding: not contracted (`fma`, `mul` without `.rn`), not `approx`, not `ftz`."""


@pytest.fixture(scope="module")
def compiled(written: Callable[[str], Path]) -> dict[str, str]:
    return json.loads(written("compiled.json").read_text())


def inexact(ptx: str) -> set[str]:
    """Float operations that may round otherwise than the CPU does."""
    return {operation for operation in OPERATION.findall(ptx) if not EXACT.fullmatch(operation)}


def test_every_kernel_compiles(compiled: dict[str, str]) -> None:
    kernels = {name.split()[0] for name in compiled} - {"fused"}
    assert kernels == {"measure_largest", "measure_euclidean", "encode_tiles", "decode_tiles"}


def test_all_float_operations_are_exact_or_correctly_rounded(compiled: dict[str, str]) -> None:
    found = {name: inexact(ptx) for name, ptx in compiled.items() if not name.startswith("fused")}
    assert {name: operations for name, operations in found.items() if operations} == {}


def test_division_and_root_are_correctly_rounded_ones(compiled: dict[str, str]) -> None:
    assert "div.rn.f32" in compiled["encode_tiles 8/512/linf"]
    assert "sqrt.rn.f64" in compiled["measure_euclidean 5/1000/l2"]


def test_a_bucket_of_whole_rows_moves_16_bytes_at_a_time(compiled: dict[str, str]) -> None:
    for name in ("encode_tiles 8/512/linf", "decode_tiles 8/512/linf"):
        assert len(re.findall(r"ld\.global\.v4\.b32", compiled[name])) >= 4
        assert re.search(r"st\.global\.v4\.b32", compiled[name])


def test_these_checks_see_a_contraction(compiled: dict[str, str]) -> None:
    assert inexact(compiled["fused decode_tiles 8/64/linf"]) & {"fma.rn.f32", "mul.f32", "add.f32"}
    for operation in ("cvt.rmi.ftz.f32.f32", "mul.ftz.f32", "div.full.f32", "mul.f32", "sqrt.approx.f32"):
        assert inexact(f"\tmul.rn.f32 \t%r1, %r2, %r3;\n\t@%p2 {operation} \t%r1, %r2;") == {operation}
