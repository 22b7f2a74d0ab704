"""Random signs: a factor that is plus or minus one number, its sign drawn for each element.

The sign of the element at flat index f is bit 8 + f % 16 of the draw r at index f // 16 (u = r * 2^-24, see
`common.codecs.randomness`): one draw for sixteen elements. A second, independent set of signs takes its draws from
index 2^31 on; those of the first set end below 2^28.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs.base import Float32
from common.codecs.cpu.compile import announce, helper
from common.codecs.cpu.draws import draw

RUN = 16
"""Elements whose signs are bits of one draw."""
SECOND_SET = 1 << 31
"""Index of the first draw of the second set."""

_FIRST_BIT = 8
_SIGN = 1 << 31
_LANES = 8

Words32 = NDArray[np.uint32]


def word_of(number: np.float32) -> np.uint32:
    """The bits of a float32."""
    return np.float32(number).view(np.uint32)


def set_run(values: Float32, out: Float32, at: int, word: np.uint32, factor: np.uint32) -> None:
    """out[i] = values[i] * +-factor for sixteen elements from `at` on; `word` has their signs, see `put_signed`."""
    out[at : at + RUN] = values[at : at + RUN] * _factors(word, factor)


def add_run(values: Float32, out: Float32, at: int, word: np.uint32, factor: np.uint32) -> None:
    """out[i] += values[i] * +-factor, likewise."""
    out[at : at + RUN] += values[at : at + RUN] * _factors(word, factor)


def _factors(word: np.uint32, factor: np.uint32) -> Float32:
    signs = (int(word) >> np.arange(_FIRST_BIT, _FIRST_BIT + RUN)) & 1
    return ((signs << 31).astype(np.uint32) | np.uint32(factor)).view(np.float32)


@helper
def draw_runs(index: np.uint32, second_word: np.uint32, words: Words32) -> None:
    """Draws of consecutive runs.

    Args:
        index: of the first draw, plus the key's first word, modulo 2^32.
        second_word: of the key.
        words: written; one per run.
    """
    for j in range(words.size):
        words[j] = np.uint32(draw(index, second_word))
        index = np.uint32(index + np.uint32(1))


@helper
def put_signed(values: Float32, words: Words32, factor: np.float32, out: Float32, add: bool) -> None:
    """Products with a factor of random sign: `out += values * +-factor` if `add`, else `out[:] = values * +-factor`.

    Args:
        values: float32 of shape (n,), n a multiple of 16.
        words: of these n // 16 runs, see `draw_runs`.
        factor: finite, not negative.
        out: float32 of shape (n,); may be `values`.
        add: see above.
    """
    magnitude = word_of(factor)
    if add:
        for j in range(values.size // RUN):
            add_run(values, out, j * RUN, words[j], magnitude)
    else:
        for j in range(values.size // RUN):
            set_run(values, out, j * RUN, words[j], magnitude)


def _instruction(add: bool) -> Any:
    """The code of `add_run` and `set_run`, on LLVM's vectors of eight."""
    from llvmlite import ir
    from numba.core import cgutils as untyped

    cgutils: Any = untyped
    vector, words = ir.VectorType(ir.FloatType(), _LANES), ir.VectorType(ir.IntType(32), _LANES)
    undefined = ir.Constant(words, ir.Undefined)

    def everywhere(builder: Any, word: Any) -> Any:
        return builder.shuffle_vector(
            builder.insert_element(undefined, word, ir.IntType(32)(0)), undefined, words([0] * _LANES)
        )

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            cgutils.create_struct_proxy(kind)(context, builder, argument)
            for kind, argument in zip(signature.args[:2], arguments[:2], strict=True)
        )
        at, word, factor = arguments[2:]
        word, factor = everywhere(builder, word), everywhere(builder, factor)
        for first in range(0, RUN, _LANES):
            shifts = words([31 - _FIRST_BIT - first - i for i in range(_LANES)])
            sign = builder.and_(builder.shl(word, shifts), words([_SIGN] * _LANES))
            place = builder.add(at, at.type(first))
            read, write = (
                builder.bitcast(builder.gep(array.data, [place]), vector.as_pointer()) for array in (source, target)
            )
            product = builder.fmul(builder.load(read, align=1), builder.bitcast(builder.or_(sign, factor), vector))
            result = builder.fadd(builder.load(write, align=1), product) if add else product
            builder.store(result, write, align=1)
        return context.get_dummy_value()

    return generate


@announce
def _register() -> None:
    """`set_run` and `add_run` are vector instructions, `word_of` is none at all."""
    from llvmlite import ir
    from numba import types
    from numba.extending import intrinsic, overload

    def compiled(add: bool) -> Any:
        generate = _instruction(add)

        @intrinsic
        def body(typing_context: Any, values: Any, out: Any, at: Any, word: Any, factor: Any) -> Any:  # noqa: ARG001
            return types.void(values, out, types.int64, types.uint32, types.uint32), generate

        return body

    @intrinsic
    def bits(typing_context: Any, number: Any) -> Any:  # noqa: ARG001
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
            return builder.bitcast(arguments[0], ir.IntType(32))

        return types.uint32(types.float32), generate

    setter, adder = compiled(False), compiled(True)
    reinterpreted: Any = bits

    @overload(set_run, strict=False)
    def _(values: Any, out: Any, at: Any, word: Any, factor: Any) -> Any:  # noqa: ARG001
        return lambda values, out, at, word, factor: setter(values, out, at, word, factor)

    @overload(add_run, strict=False)
    def _(values: Any, out: Any, at: Any, word: Any, factor: Any) -> Any:  # noqa: ARG001
        return lambda values, out, at, word, factor: adder(values, out, at, word, factor)

    @overload(word_of, strict=False)
    def _(number: Any) -> Any:  # noqa: ARG001
        return lambda number: reinterpreted(number)
