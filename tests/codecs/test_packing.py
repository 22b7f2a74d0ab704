"""The bit stream: layout by hand, against a naive one, and joined at multiples of eight fields."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codecs.packing import pack, packed_bytes, signed, unpack
from tests.codecs import reference

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


def test_whole_bytes_are_unpacked_without_a_copy() -> None:
    payload = bytes(100)
    assert np.shares_memory(unpack(payload, 100, 8), np.frombuffer(payload, np.uint8))
    assert np.shares_memory(unpack(payload, 50, 16), np.frombuffer(payload, np.uint8))
