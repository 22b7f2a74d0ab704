"""Kernels are compiled once: for one signature, and for all processes that start later."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.codecs import cpu
from common.codecs.cpu import KERNELS, compile, warm
from common.codecs.cpu.compile import Kernel, kernel
from common.codecs.cpu.floats import largest_word
from common.codecs.cpu.prefetch import prefetch_ahead

ROOT = Path(__file__).parent.parent.parent
TWO = 2


def half(x: int) -> int:
    return x // TWO


def twice_the_half(x: int) -> int:
    return 2 * half(x)


def of_the_last(numbers: list[int]) -> int:
    return max(numbers, key=lambda number: number // TWO)


def digest(function: Callable[..., Any], **constants: object) -> bytes:
    """What tells one version of a function from another, after changes of what it names."""
    names = {**globals(), **constants}
    if "half" not in constants:
        names["half"] = FunctionType(half.__code__, names)
    return b"".join(compile._sources(FunctionType(function.__code__, names), set()))


def test_a_kernel_has_another_name_on_disk_when_a_helper_or_a_constant_changes() -> None:
    assert digest(twice_the_half) == digest(twice_the_half)
    assert digest(twice_the_half) != digest(twice_the_half, TWO=3)
    assert digest(twice_the_half) != digest(twice_the_half, half=lambda x: x // 3)
    assert digest(half) != digest(twice_the_half)
    assert digest(half, TWO=(2, 3)) != digest(half, TWO=(2, 4))
    assert digest(half, TWO=np.arange(3)) != digest(half, TWO=np.arange(3) * 2)
    assert digest(of_the_last) != digest(of_the_last, TWO=3)
    assert b"0x" not in digest(of_the_last)  # an address would be another one in each process


def test_a_kernel_has_another_name_on_disk_when_an_extension_of_numba_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = b"".join(compile._sources(prefetch_ahead, set()))
    monkeypatch.setitem(compile._GENERATORS, prefetch_ahead.__module__, [half])
    assert b"".join(compile._sources(prefetch_ahead, set())) != before


def test_a_kernel_takes_read_only_and_unaligned_memory_without_another_compilation() -> None:
    words = np.arange(6, dtype=np.uint32)
    read_only = words.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"x" + words.tobytes(), np.uint32, 6, 1)
    for memory in (words, read_only, unaligned, words[1:]):
        assert largest_word(memory, 0xFFFFFFFF) == 5
    assert len(largest_word.ready().signatures) == 1  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        largest_word(words[::2], 0xFFFFFFFF)


def test_a_kernel_is_compiled_where_no_folder_can_be_written() -> None:
    def total(numbers: NDArray[np.int64]) -> int:
        result = 0
        for number in numbers:
            result += number
        return result

    homeless = FunctionType(total.__code__.replace(co_filename="/nowhere/at/all.py"), {}, "total")
    built: Kernel[[NDArray[np.int64]], int] = kernel("int64", "const int64[]")(homeless)
    assert built(np.arange(5)) == 10


def test_threads_that_need_a_kernel_first_get_the_same_one() -> None:
    fresh = Kernel(largest_word.function, "uint32", ("const uint32[]", "uint32"))
    gate = threading.Barrier(4)

    def first_use(_: int) -> object:
        gate.wait()
        return fresh.ready()

    with ThreadPoolExecutor(4) as threads:
        assert len(set(map(id, threads.map(first_use, range(4))))) == 1


def test_a_later_process_compiles_nothing_and_imports_numba_when_it_is_needed() -> None:
    warm()
    script = """
import sys
from common.codecs.cpu import KERNELS, warm
assert "numba" not in sys.modules
warm()
print(sum(sum(kernel.ready().stats.cache_misses.values()) for kernel in KERNELS))
"""
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert found.stdout == "0\n"


def test_warm_knows_all_kernels() -> None:
    names = [module.name for module in pkgutil.iter_modules(cpu.__path__, "common.codecs.cpu.")]
    defined = {value for name in names for value in vars(import_module(name)).values() if isinstance(value, Kernel)}
    assert defined == set(KERNELS)
    assert len(defined) == len(KERNELS)
