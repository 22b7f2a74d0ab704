"""Compiling: a `kernel` has one signature, holds no GIL and is kept on disk; a `helper` is compiled into kernels.

Numba is imported with the first kernel that is needed (0.4 s), not with this file. Signatures are written as in C:
`const float32[]` is an array that is only read, possibly read-only, and `float32[]` one that is written. Both are
contiguous and at any address.

Numba keeps a compiled kernel beside its source file, or in the user's cache folder where that is read-only, and drops
it when that file changes. It does not notice a change of a helper in another file; hence the digest in a kernel's name.
Where no folder can be written each process compiles for itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType
from typing import Any, Generic, ParamSpec, TypeVar, cast

import numpy as np

_P = ParamSpec("_P")
_R = TypeVar("_R")
_F = TypeVar("_F", bound=Callable[..., Any])

_OPTIONS: dict[str, Any] = {"error_model": "numpy", "_nrt": False}
"""Division by zero as in NumPy; no allocation, hence no reference counts of arrays and their parts."""
_ANNOUNCED: list[Callable[[], object]] = []
"""What makes the helpers known to Numba, as soon as it is needed."""
_GENERATORS: dict[str, list[FunctionType]] = {}
"""The same by module, but for what `helper` announces."""


class Kernel(Generic[_P, _R]):
    """A function of arrays and numbers that is compiled, or loaded from disk, when it is first needed.

    Args:
        function: in the part of Python and NumPy that Numba knows.
        result: type of what it returns.
        arguments: their types.
    """

    def __init__(self, function: Callable[_P, _R], result: str, arguments: tuple[str, ...]) -> None:
        self.function = function
        self._result = result
        self._arguments = arguments
        self._compiled: Callable[_P, _R] | None = None

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Runs the compiled function."""
        return (self._compiled or self.ready())(*args, **kwargs)

    def ready(self) -> Callable[_P, _R]:
        """Compiles or loads it unless that is done; from now on a call takes a microsecond."""
        from numba.core.compiler_lock import global_compiler_lock

        with global_compiler_lock:
            if self._compiled is None:
                self._compiled = _compiled(cast(FunctionType, self.function), self._result, self._arguments)
            return self._compiled


def kernel(result: str, *arguments: str) -> Callable[[Callable[_P, _R]], Kernel[_P, _R]]:
    """Makes a function a kernel; for its arguments see `Kernel`."""

    def decorate(function: Callable[_P, _R]) -> Kernel[_P, _R]:
        return Kernel(function, result, arguments)

    return decorate


def helper(function: _F) -> _F:
    """Lets kernels call a function, which is compiled into them; Python calls it as it is."""

    def register() -> None:
        import numba

        cast(Any, numba).extending.register_jitable(**_OPTIONS)(function)

    _ANNOUNCED.append(register)
    return function


def announce(register: _F) -> _F:
    """Has a function called before the next kernel is compiled; it may import Numba and extend it."""
    _ANNOUNCED.append(register)
    _GENERATORS.setdefault(register.__module__, []).append(cast(FunctionType, register))
    return register


def _compiled(function: FunctionType, result: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
    while _ANNOUNCED:
        _ANNOUNCED.pop()()
    signature = _type_of(result)(*map(_type_of, arguments))
    sources = [repr(_OPTIONS).encode(), *_sources(function, set())]
    digest = hashlib.blake2b(b"".join(sources), digest_size=8).hexdigest()
    function.__qualname__ = f"{function.__name__}_{digest}"
    try:
        return _built(function, signature, keep=True)
    except (RuntimeError, OSError):  # no folder can be written, or the disk is full
        return _built(function, signature, keep=False)


def _built(function: FunctionType, signature: Any, *, keep: bool) -> Callable[..., Any]:
    import numba

    dispatcher = cast(Any, numba).njit(nogil=True, cache=keep, **_OPTIONS)(function)
    dispatcher.compile(signature)
    dispatcher.disable_compile()
    return cast(Callable[..., Any], dispatcher)


def _type_of(name: str) -> Any:
    from numba import types

    scalar = getattr(types, name.removeprefix("const ").removesuffix("[]"))
    if not name.endswith("[]"):
        return scalar
    return types.Array(scalar, 1, "C", readonly=name.startswith("const "), aligned=False)


def _sources(function: FunctionType, seen: set[FunctionType]) -> Iterator[bytes]:
    """What a function's machine code follows from: its code, the constants and functions that this names, and so on.

    Where a module extends Numba, its functions follow from the code that does so.
    """
    seen.add(function)
    named: list[object] = list(_GENERATORS.get(function.__module__, ()))
    for code in _codes(function.__code__):
        constants = [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
        yield code.co_code + repr((constants, code.co_names, code.co_varnames)).encode()
        named += [function.__globals__.get(name) for name in code.co_names]
    while named:
        value = named.pop()
        if isinstance(value, FunctionType) and value not in seen:
            yield from _sources(value, seen)
        elif isinstance(value, tuple):
            named += value
        elif isinstance(value, np.ndarray):
            yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
        elif isinstance(value, int | float | str | np.generic):
            yield repr(value).encode()


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Of a function and all that are defined within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
