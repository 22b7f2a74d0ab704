"""Message buffers that are filled in place: `bytes`, which is all that grpcio sends, without a copy to make them."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes, _new_bytes.restype = (ctypes.c_void_p, ctypes.c_ssize_t), ctypes.py_object
_address_of = ctypes.pythonapi.PyBytes_AsString
_address_of.argtypes, _address_of.restype = (ctypes.py_object,), ctypes.c_void_p


def new_buffer(size: int) -> tuple[bytes, NDArray[np.uint8]]:
    """A bytes object of undefined content, and a writable view of it.

    CPython's own way to build a bytes object (`PyBytes_FromStringAndSize(NULL, size)`): it may be filled until somebody
    else has seen it. So whoever asks for it fills it, and from then on only hands on the bytes. The view does not keep
    the bytes alive.
    """
    if size < 2:  # such objects are shared
        raise ValueError(f"expected at least 2 bytes, got size={size}")
    data: bytes = _new_bytes(None, size)
    view = (ctypes.c_uint8 * size).from_address(_address_of(data))
    return data, np.frombuffer(memoryview(view), np.uint8)
