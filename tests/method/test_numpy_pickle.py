"""Pickles of NumPy arrays are read, and everything else is refused by name without being run."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import tracemalloc
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import DataError
from worker.numpy_pickle import read_arrays

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), dtype=np.uint8)
TARGETS = np.array([3, 1, 4, 1, 5])
PUBLISHED = {"data": IMAGES, "extrapolated_targets": TARGETS, "prediction_model": "resnet", "prediction_epoch": 7}


def pickled(tmp_path: Path, content: bytes) -> Path:
    file = tmp_path / "file.pickle"
    file.write_bytes(content)
    return file


def refusal_of(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        read_arrays(pickled(tmp_path, content))
    assert str(caught.value).startswith("expected ")
    assert "file.pickle" in str(caught.value)
    return str(caught.value)


def under(core: bytes, content: bytes) -> bytes:
    """The pickle as another version of NumPy would have named its functions."""
    for module in (b"multiarray", b"numeric"):
        ours, theirs = b"numpy._core." + module, core + b"." + module
        content = content.replace(bytes([len(ours)]) + ours, bytes([len(theirs)]) + theirs)  # protocol 4 and 5
        content = content.replace(b"c" + ours, b"c" + theirs)
    return content


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
def test_the_published_format_is_read_in_every_protocol_and_under_both_names_of_numpy(
    tmp_path: Path, protocol: int, core: bytes
) -> None:
    content = under(core, pickle.dumps(PUBLISHED, protocol=protocol))
    assert core in content

    found = read_arrays(pickled(tmp_path, content))

    assert np.array_equal(found["data"], IMAGES)
    assert found["data"].dtype == np.uint8
    assert np.array_equal(found["extrapolated_targets"], TARGETS)
    assert (found["prediction_model"], found["prediction_epoch"]) == ("resnet", 7)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """Byte strings travel as they are: `T` and `U` with their lengths, where Python 3 spells them as text."""
    pixels = bytes(range(250, 256))
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01K\x02K\x03\x86" + dtype + b"\x89T\x06\x00\x00\x00" + pixels + b"tb"
    found = read_arrays(pickled(tmp_path, b"\x80\x02}U\x04data" + array + state + b"s."))
    assert found["data"].tolist() == [[250, 251, 252], [253, 254, 255]]


@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(12.0).reshape(3, 4)),
        np.arange(20, dtype=np.float32)[::3],
        np.arange(5, dtype=">i4"),
        np.array([True, False]),
        np.float16([1.5, -2]),
        np.array(3),
    ],
    ids=["Fortran's order", "with gaps", "big-endian", "switches", "half", "no dimension"],
)
@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_come_back_as_the_standard_library_would_give_them(
    tmp_path: Path, array: np.ndarray[Any, Any], protocol: int
) -> None:
    content = pickle.dumps({"x": array, "again": [array, (array,)]}, protocol=protocol)
    found, expected = read_arrays(pickled(tmp_path, content))["x"], pickle.loads(content)["x"]
    assert np.array_equal(found, expected)
    assert (found.dtype.newbyteorder("="), found.shape) == (expected.dtype.newbyteorder("="), expected.shape)


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


def reads_a_file(path: str) -> bytes:
    return Path(path).read_bytes()


@pytest.mark.parametrize("protocol", [0, 2, 3, 4, 5])
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (lambda marker: Calls(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Calls(subprocess.check_call, ["touch", marker]), ".check_call"),
        (lambda marker: Calls(eval, f"open({marker!r}, 'w')"), ".eval"),
        (lambda marker: Calls(np.save, marker, np.zeros(1)), ".save"),
        (lambda marker: Calls(reads_a_file, marker), "test_numpy_pickle.reads_a_file"),
        (lambda marker: OrderedDict(a=marker), "collections.OrderedDict"),
        (lambda _: np.float64(3), "multiarray.scalar"),
        (lambda _: np.array([{}], dtype=object), "'O8'"),
        (lambda _: np.array(["text"]), "'U4'"),
        (lambda _: np.zeros(2, dtype=[("a", "u1")]), "'V1'"),
        (lambda _: np.array(["2020-01-01"], dtype="datetime64[D]"), "'M8'"),
        (lambda _: {1, 2}, ""),
        (lambda _: Path("x"), "Path"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_everything_but_plain_arrays_is_refused_by_name_and_nothing_happens(
    tmp_path: Path, protocol: int, attack: Any, name: str
) -> None:
    marker = tmp_path / "marker"
    content = pickle.dumps({"data": attack(str(marker)), "extrapolated_targets": TARGETS}, protocol=protocol)

    message = refusal_of(tmp_path, content)

    assert "expected a pickle of NumPy arrays and plain values, got content=" in message
    assert name in message
    assert not marker.exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"
RECONSTRUCT, FROM_BUFFER = b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy._core.numeric\n_frombuffer\n"
U1 = DTYPE + b"\x8c\x02u1\x89\x88\x87R"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (opcodes(b"}", NDARRAY, b"(K\x01tR"), "a call of numpy.ndarray"),
        (opcodes(RECONSTRUCT, NDARRAY, b"\x8a\x05\xff\xff\xff\xff\x7f\x85C\x01b\x87R"), "does not begin empty"),
        (opcodes(RECONSTRUCT, DTYPE, b"K\x00\x85C\x01b\x87R"), "does not begin empty"),
        (opcodes(FROM_BUFFER, b"(C\x02ab", U1, b"\x8a\x05\xff\xff\xff\xff\x7f\x85\x8c\x01CtR"), "from 2 bytes"),
        (opcodes(FROM_BUFFER, b"(C\x02ab", U1, b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86\x8c\x01CtR"), "of shape"),
        (opcodes(FROM_BUFFER, b"(K\x07", U1, b"K\x07\x85\x8c\x01CtR"), "more than plain numbers"),
        (opcodes(U1, b"(K\x03\x8c\x01|N\x8c\x01aNtb"), "more than plain numbers"),
        (opcodes(NDARRAY, b"}\x8c\x04callK\x01sb"), "a state for what has none"),
        (opcodes(b"]\x8c\x01ab"), "a state for what has none"),
        (opcodes(b"\x8c\x01a)R"), "a call of what cannot be called"),
        (opcodes(NDARRAY, b")\x81"), "opcode NEWOBJ"),
        (opcodes(b"(K\x01icollections\nOrderedDict\n"), "opcode INST"),
        (opcodes(b"K\x07Q"), "opcode BINPERSID"),
        (opcodes(b"\x82\x01"), "opcode EXT1"),
        (opcodes(b"}K\x01K\x02s"), "a key of type int"),
        (opcodes(b"\x8c\x05posix\x8c\x06system\x93"), "posix.system"),
        (opcodes(b"\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93"), "numpy.ndarray.__reduce__"),
        (opcodes(b"c_codecs\nencode\n\x8c\x01a\x8c\x05utf-8\x86R"), "_codecs.encode"),
        (opcodes(b"\x96" + b"\xff" * 7 + b"\x00"), "EOFError"),
        (opcodes(b"\x8e" + b"\xff" * 5 + b"\x00" * 3), "EOFError"),
        (opcodes(b"h\x07"), "KeyError"),
        (opcodes(b"0"), "opcode POP"),
        (opcodes(b"]"), "a dictionary of arrays, got pickled=list"),
        (b"no pickle", "expected a whole pickle of NumPy arrays"),
        (b"", "expected a whole pickle of NumPy arrays"),
        (pickle.dumps(PUBLISHED)[:-40], "expected a whole pickle of NumPy arrays"),
        (opcodes(b"\x85" * 100_000), "more than the stack holds"),
        (opcodes(b"K\x01" + b"\x85" * 200_000 + b"\x8c\x01u\x93"), "RecursionError"),
        (opcodes(b"}K\x01" + b"\x85" * 200_000 + b"Ns"), "a key of type tuple"),
    ],
)
def test_a_pickle_made_by_hand_gets_nothing_else(tmp_path: Path, content: bytes, text: str) -> None:
    assert text in refusal_of(tmp_path, content)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path: Path) -> None:
    """A memo index of 2^31, and one text that is turned into bytes again and again."""
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20)
    encode = b"c_codecs\nencode\n"
    again = b"h\x01h\x00\x8c\x06latin1\x86R"
    bomb = opcodes(text, b"q\x00r\xff\xff\xff\x7f", encode, b"q\x01", again * 50)
    tracemalloc.start()
    try:
        message = refusal_of(tmp_path, bomb)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "_codecs.encode of more than the file holds" in message
    assert peak_bytes < 16 << 20


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a file that can be read, got file="):
        read_arrays(tmp_path / "nowhere.pickle")
