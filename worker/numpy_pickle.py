"""Reading a pickle of NumPy arrays in plain containers, and of nothing else, from anybody.

No unpickler runs: the opcodes that such a pickle is made of are followed here, all others are refused. Nothing that a
pickle names is imported or called. The few names under which NumPy pickles its arrays stand for functions of ours,
which check what they are told; any other name is refused. No more is read or made than the file is long, so that a
small file cannot ask for much memory.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.errors import DataError, refusal

_NUMBERS = frozenset({"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"})
_IGNORED = frozenset({"PROTO", "FRAME"})
_VALUES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
"""Opcodes whose argument is the value."""
_CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _RefusedError(Exception):
    """What a pickle asks for and does not get; whoever reads it knows the file."""


def read_arrays(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle: its arrays, and what plain values there are beside them.

    Args:
        path: pickle protocol 2 to 5, of Python 2 or 3, with names of NumPy 1 or 2.

    Raises:
        DataError: no such pickle; nothing of it has been imported or called.
    """
    try:
        with path.open("rb") as stream:
            found = _Reader(_Bounded(stream, path.stat().st_size)).read()
    except OSError as error:
        raise DataError(refusal("a file that can be read", "file", path, error.strerror or "")) from None
    except _RefusedError as error:
        raise DataError(refusal("a pickle of NumPy arrays and plain values", "content", error, str(path))) from None
    except Exception as error:  # a file that is no pickle makes the opcodes' readers raise almost anything
        kind = type(error).__name__
        raise DataError(refusal("a whole pickle of NumPy arrays", "file", path, f"{kind}: {error}")) from None
    if type(found) is not dict:
        raise DataError(refusal("a dictionary of arrays", "pickled", type(found).__name__, str(path)))
    return {name: value.values if isinstance(value, _Array) else value for name, value in found.items()}


class _Bounded:
    """A file that is never asked for more than it has left."""

    def __init__(self, stream: BinaryIO, size_bytes: int) -> None:
        self._stream, self.left = stream, size_bytes

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise EOFError(f"{count} bytes wanted, {self.left} left")
        self.left -= count
        return self._stream.read(count)

    def readline(self) -> bytes:
        line = self._stream.readline(self.left)
        self.left -= len(line)
        return line


class _Name:
    """What a pickle gets for a name that NumPy pickles its arrays under; all it can do with it is to call it."""

    def __init__(self, call: Callable[..., object]) -> None:
        self.call = call


class _Dtype:
    """An element type; its code is one of `_NUMBERS`."""

    def __init__(self, *arguments: object) -> None:
        code = arguments[0] if arguments else None
        if not isinstance(code, str) or code not in _NUMBERS:
            raise _RefusedError(f"an array of dtype {code!r}")
        self._code, self._order = code, "="

    def build(self, state: Any) -> None:
        """Takes (version, byte order, subarray, names, fields, and sizes that only these need)."""
        _version, order, subarray, names, fields = state[:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in (subarray, names, fields)):
            raise _RefusedError("an array of more than plain numbers")
        self._order = order

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self._order + self._code)


class _Array:
    """An array: empty until its state comes."""

    def __init__(self) -> None:
        self.values: np.ndarray[Any, Any] = np.empty(0, np.uint8)

    def build(self, state: Any) -> None:
        """Takes (version, shape, dtype, whether in Fortran's order, elements)."""
        _version, shape, dtype, fortran, elements = state
        self.fill(elements, dtype, shape, "F" if fortran is True else "C")

    def fill(self, elements: object, dtype: object, shape: object, order: object) -> None:
        """Becomes a view of `elements`; nothing is copied."""
        if isinstance(elements, str):  # a byte string of Python 2
            elements = elements.encode("latin1")
        if not isinstance(dtype, _Dtype) or not isinstance(elements, (bytes, bytearray)) or order not in ("C", "F"):
            raise _RefusedError("an array of more than plain numbers")
        if not isinstance(shape, tuple) or any(type(side) is not int or side < 0 for side in shape):
            raise _RefusedError(f"an array of shape {shape!r}")
        if math.prod(shape) * dtype.numpy.itemsize != len(elements):
            raise _RefusedError(f"an array of shape {shape} from {len(elements)} bytes")
        self.values = np.frombuffer(elements, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")


class _Reader:
    """Follows the opcodes of one pickle."""

    def __init__(self, file: _Bounded) -> None:
        self._file = file
        self._may_encode = file.left
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[object, Any] = {}
        ndarray = _Name(self._no_array)
        self._names: dict[tuple[str, str], _Name] = {
            ("numpy", "ndarray"): ndarray,
            ("numpy", "dtype"): _Name(_Dtype),
            ("_codecs", "encode"): _Name(self._encode),
        }
        for core in ("numpy.core", "numpy._core"):
            self._names[f"{core}.multiarray", "_reconstruct"] = _Name(lambda *how: self._empty_array(ndarray, *how))
            self._names[f"{core}.numeric", "_frombuffer"] = _Name(self._whole_array)

    def read(self) -> object:
        """What is pickled."""
        file: Any = self._file  # genops reads, and needs nothing else of a file
        for opcode, argument, _ in pickletools.genops(file):
            self._follow(opcode.name, argument)
        return self._stack.pop()

    def _follow(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in _VALUES:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _TUPLES:
            stack.append(tuple(self._popped(_TUPLES[opcode])))
        elif opcode in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode == "GLOBAL":
            stack.append(self._named(*argument.split(" ", maxsplit=1)))
        elif opcode not in _IGNORED:
            self._act(opcode)

    def _act(self, opcode: str) -> None:
        """The opcodes that have no argument."""
        stack = self._stack
        match opcode:
            case "MARK":
                self._marks.append(stack)
                self._stack = []
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "TUPLE":
                self._unmark(tuple)
            case "LIST":
                self._unmark(list)
            case "DICT":
                self._unmark(lambda items: self._extended({}, items))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "SETITEM":
                items = self._popped(1 if opcode == "APPEND" else 2)
                self._extended(self._stack[-1], items)
            case "APPENDS" | "SETITEMS":
                self._stack = self._marks.pop()
                self._extended(self._stack[-1], stack)
            case "STACK_GLOBAL":
                stack.append(self._named(*self._popped(2)))
            case "REDUCE":
                called, arguments = self._popped(2)
                if not isinstance(called, _Name) or not isinstance(arguments, tuple):
                    raise _RefusedError("a call of what cannot be called")
                stack.append(called.call(*arguments))
            case "BUILD":
                (state,) = self._popped(1)
                if not isinstance(stack[-1], (_Array, _Dtype)):
                    raise _RefusedError("a state for what has none")
                stack[-1].build(state)
            case "STOP":
                pass
            case _:
                raise _RefusedError(f"opcode {opcode}")

    def _popped(self, count: int) -> list[Any]:
        """The uppermost items of the stack, the top one last."""
        items = self._stack[-count:]
        if len(items) < count:
            raise _RefusedError("more than the stack holds")
        del self._stack[-count:]
        return items

    def _unmark(self, make: Callable[[list[Any]], object]) -> None:
        items, self._stack = self._stack, self._marks.pop()
        self._stack.append(make(items))

    def _extended(self, container: Any, items: list[Any]) -> Any:
        if type(container) is list:
            container.extend(items)
        elif type(container) is dict:
            for name, value in zip(items[::2], items[1::2], strict=True):
                # Other keys are not needed, and the hash of a deep enough tuple ends the process.
                if type(name) is not str:
                    raise _RefusedError(f"a dictionary with a key of type {type(name).__name__}")
                container[name] = value
        else:
            raise _RefusedError("items for what holds none")
        return container

    def _named(self, module: object, name: object) -> _Name:
        known = self._names.get((str(module), str(name)))
        if known is None:
            raise _RefusedError(f"{module}.{name}")
        return known

    def _encode(self, text: object, encoding: object) -> bytes:
        """How protocol 2 spells bytes; in all, no more of them than the file is long."""
        if not isinstance(text, str) or encoding != "latin1" or len(text) > self._may_encode:
            raise _RefusedError("_codecs.encode of more than the file holds")
        self._may_encode -= len(text)
        return text.encode("latin1")

    @staticmethod
    def _empty_array(ndarray: _Name, kind: object, shape: object, code: object) -> _Array:
        if kind is not ndarray or shape != (0,) or code not in (b"b", "b"):
            raise _RefusedError("an array that does not begin empty")
        return _Array()

    @staticmethod
    def _whole_array(elements: object, dtype: object, shape: object, order: object) -> _Array:
        array = _Array()
        array.fill(elements, dtype, shape, order)
        return array

    @staticmethod
    def _no_array(*_: object) -> _Array:
        raise _RefusedError("a call of numpy.ndarray")
