"""Prefetching: memory on its way to the core while the core still computes.

An encoder reads a block twice, for its scale and for its levels. While it computes levels it asks for the elements that
come next; without this the two passes alternate between waiting for memory and computing (0.73 and 0.56 ns per element,
AMD Zen 3).
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from common.codecs.base import Bytes, Float32
from common.codecs.cpu.compile import announce, helper

AHEAD = 2048
"""Elements between the one that is worked on and the one that is asked for."""
_LINE = 64
"""Bytes of a cache line."""


def prefetch(memory: NDArray[Any], index: int) -> None:
    """Asks for the cache line of an element, to write to it unless the memory is read-only; changes nothing."""


@helper
def prefetch_ahead(values: Float32, begin: int, end: int) -> None:
    """Asks for as many elements as [begin, end) has, AHEAD elements later."""
    for index in range(begin + AHEAD, min(end + AHEAD, values.size), _LINE // 4):
        prefetch(values, index)


@helper
def prefetch_bytes(stream: Bytes, begin: int, end: int) -> None:
    """Asks for bytes that are written soon, all at a time."""
    for index in range(begin, min(end, stream.size), _LINE):
        prefetch(stream, index)


@announce
def _register() -> None:
    """`prefetch` is the instruction of that name."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils as untyped
    from numba.extending import intrinsic, overload

    cgutils: Any = untyped

    @intrinsic
    def instruction(typing_context: Any, memory: Any, index: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
            byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
            function = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
            address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
            write, near, data = word(int(memory.mutable)), word(3), word(1)
            intrinsic_function = cgutils.get_or_insert_function(builder.module, function, "llvm.prefetch.p0")
            builder.call(intrinsic_function, [address, write, near, data])

        return types.void(memory, index), generate

    @overload(prefetch, strict=False)
    def overloaded(memory: Any, index: Any) -> Any:  # noqa: ARG001
        generator: Any = instruction
        return lambda memory, index: generator(memory, index)
