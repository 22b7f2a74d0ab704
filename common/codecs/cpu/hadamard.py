"""The fast Walsh-Hadamard transform, in place.

The transform of n = 2^k elements has k stages h = 1, 2, 4, ..., n/2, one after the other: for each pair (i, i + h) with
i & h = 0 the elements a, b become a + b, a - b, each rounded to float32. A pair depends on no other pair of its stage,
so that any order within a stage, and any width of the vector unit, gives the same bits. It is its own inverse but for
the factor n.

Three stages run on registers at a time: `tile` does the first six on 64 elements, `join` up to three more on elements
that lie apart. Both are written in LLVM's vectors of eight, which it maps to whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.codecs.base import Float32
from common.codecs.cpu.compile import announce, helper

TILE = 64
"""The shortest transform."""
LANES = 8


def tile(values: Float32, at: int) -> None:
    """Stages 1 to 32 on values[at : at + 64]."""
    h = 1
    while h < TILE:
        for i in range(at, at + TILE):
            if not (i - at) & h:
                values[i], values[i + h] = values[i] + values[i + h], values[i] - values[i + h]
        h *= 2


def join2(values: Float32, at: int, apart: int) -> None:
    """Stage `apart` on eight adjacent elements from `at` on and those `apart` behind them."""
    _join(values, at, apart, 2)


def join4(values: Float32, at: int, apart: int) -> None:
    """Stages `apart` and 2 * apart on four times eight elements."""
    _join(values, at, apart, 4)


def join8(values: Float32, at: int, apart: int) -> None:
    """Stages `apart`, 2 * apart and 4 * apart on eight times eight elements."""
    _join(values, at, apart, 8)


def _join(values: Float32, at: int, apart: int, rows: int) -> None:
    h = 1
    while h < rows:
        for k in range(rows):
            if not k & h:
                a = values[at + k * apart : at + k * apart + LANES]
                b = values[at + (k | h) * apart : at + (k | h) * apart + LANES]
                a[:], b[:] = a + b, a - b
        h *= 2


@helper
def hadamard(values: Float32) -> None:
    """The transform of float32 (n,), n = 2^k >= 64, in place."""
    n = values.size
    for at in range(0, n, TILE):
        tile(values, at)
    h = TILE
    while 8 * h <= n:
        for base in range(0, n, 8 * h):
            for at in range(base, base + h, LANES):
                join8(values, at, h)
        h *= 8
    if 4 * h == n:
        for at in range(0, h, LANES):
            join4(values, at, h)
    elif 2 * h == n:
        for at in range(0, h, LANES):
            join2(values, at, h)


def _instruction(rows: int, within: bool) -> Callable[..., Any]:
    """The code of `tile` (`within`: stages 1, 2, 4 in each vector, too) and of `join`: on `rows` vectors apart."""
    from llvmlite import ir
    from numba.core import cgutils as untyped

    cgutils: Any = untyped
    vector, words = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)

    def stage(builder: Any, x: Any, h: int) -> Any:
        """x[i] + x[i + h] where i & h = 0, else x[i - h] - x[i]."""
        swapped = builder.shuffle_vector(x, ir.Constant(vector, ir.Undefined), words([i ^ h for i in range(LANES)]))
        minus = words([1 << 31 if i & h else 0 for i in range(LANES)])
        return builder.fadd(swapped, builder.bitcast(builder.xor(builder.bitcast(x, words), minus), vector))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = cgutils.create_struct_proxy(signature.args[0])(context, builder, arguments[0])
        at, apart = arguments[1:]
        places = [builder.add(at, builder.mul(apart, apart.type(k))) for k in range(rows)]
        pointers = [builder.bitcast(builder.gep(array.data, [place]), vector.as_pointer()) for place in places]
        x = [builder.load(pointer, align=1) for pointer in pointers]
        for h in (1, 2, 4) if within else ():
            x = [stage(builder, each, h) for each in x]
        h = 1
        while h < rows:
            for k in range(rows):
                if not k & h:
                    x[k], x[k | h] = builder.fadd(x[k], x[k | h]), builder.fsub(x[k], x[k | h])
            h *= 2
        for value, pointer in zip(x, pointers, strict=True):
            builder.store(value, pointer, align=1)
        return context.get_dummy_value()

    return generate


@announce
def _register() -> None:
    """`tile` and `join` are vector instructions."""
    from numba import types
    from numba.extending import intrinsic, overload

    def compiled(rows: int, within: bool) -> Any:
        generate = _instruction(rows, within)

        @intrinsic
        def body(typing_context: Any, values: Any, at: Any, apart: Any) -> Any:  # noqa: ARG001
            return types.void(values, types.int64, types.int64), generate

        return body

    def announce_join(function: Callable[..., None], rows: int) -> None:
        body = compiled(rows, False)

        @overload(function, strict=False)
        def _(values: Any, at: Any, apart: Any) -> Any:  # noqa: ARG001
            return lambda values, at, apart: body(values, at, apart)

    for function, rows in ((join2, 2), (join4, 4), (join8, 8)):
        announce_join(function, rows)
    whole = compiled(TILE // LANES, True)

    @overload(tile, strict=False)
    def _(values: Any, at: Any) -> Any:  # noqa: ARG001
        return lambda values, at: whole(values, at, LANES)
