"""The bit stream: layout by hand, the NumPy reference against a naive one, and the memory that it travels in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codecs import Encoded
from common.codecs.packing import memory_for, packed_bytes, stream_of
from common.errors import CodecError
from tests.codecs import reference
from tests.codecs.numpy_reference.packing import pack, signed, unpack

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 16]


def test_layout_by_hand() -> None:
    assert pack(np.array([0x1, 0x2, 0xF]), 4) == bytes([0x21, 0x0F])
    assert pack(np.array([1, 2, 3, 0, 1]), 2) == bytes([0b00_11_10_01, 0b01])
    assert pack(np.array([0b101, 0b001, 0b110]), 3) == bytes([0b10_001_101, 0b1])
    assert pack(np.array([-1, 0, 127, -127]), 8) == bytes([0xFF, 0x00, 0x7F, 0x81])
    assert pack(np.array([-2, 32767]), 16) == bytes([0xFE, 0xFF, 0xFF, 0x7F])
    assert pack(np.array([True, False, False, True]), 1) == bytes([0b1001])


@given(bits=st.sampled_from(WIDTHS), data=st.data())
def test_fields_equal_the_naive_bit_stream_and_come_back(bits: int, data: st.DataObject) -> None:
    fields = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50))
    packed = pack(np.array(fields, np.int64), bits)
    assert packed == reference.bit_string(fields, bits)
    assert len(packed) == packed_bytes(len(fields), bits)
    assert unpack(packed, len(fields), bits).tolist() == fields


@given(bits=st.sampled_from(WIDTHS[1:]), data=st.data())
def test_signed_numbers_come_back(bits: int, data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1), max_size=50))
    packed = pack(np.array(numbers, np.int16), bits)
    assert signed(unpack(packed, len(numbers), bits), bits).tolist() == numbers


@pytest.mark.parametrize("bits", WIDTHS)
def test_streams_join_at_multiples_of_eight_fields(bits: int) -> None:
    fields = np.arange(100) * 37 % 2**bits
    assert pack(fields[:40], bits) + pack(fields[40:], bits) == pack(fields, bits)


def test_a_stream_is_not_copied() -> None:
    payload = bytes(100)
    stream = stream_of(Encoded(scales=np.zeros(3, np.float32), payload=payload), 100, 3)
    assert np.shares_memory(stream, np.frombuffer(payload, np.uint8))


@pytest.mark.parametrize(
    "payload",
    [
        np.empty(9, np.uint8),
        np.empty(11, np.uint8),
        np.empty(10, np.int8),
        np.empty((10, 1), np.uint8),
        np.empty(20, np.uint8)[::2],
        np.frombuffer(bytes(10), np.uint8),
    ],
)
def test_memory_that_does_not_fit_is_refused(payload: np.ndarray) -> None:
    memory = np.empty(11, np.uint8)[1:]
    assert memory_for(memory, 10) is memory
    with pytest.raises(CodecError, match=r"expected writable uint8\[10\], got payload="):
        memory_for(payload, 10)
