"""The scaled sign: its bytes, and what it says of a block."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs.sign import SignCodec
from tests.codecs.numpy_reference import sign as reference
from tests.codecs.table import KEY, SIZES, VALUES, bytes_of, gaussian

BLOCKS = (8, 24, 64, 512, 2056, 8192)
every_block = pytest.mark.parametrize("block", BLOCKS)


def build(stop: int, block: int) -> SignCodec:
    return SignCodec(start=0, stop=stop, block=block, wire_name=f"sign/{block}")


@every_block
def test_bytes_and_values_are_those_of_the_numpy_reference(block: int) -> None:
    vectors = [gaussian(n) for n in SIZES] + [make(1003) for make in VALUES.values()] + [gaussian(20_011)]
    for values in vectors:
        codec, n = build(len(values), block), len(values)
        encoded, expected = codec.encode(values, 0, KEY), reference.encode(values, block)
        assert bytes_of(encoded) == bytes_of(expected)
        decoded = reference.decode(expected, n, block)
        for add in (False, True):
            out = gaussian(n, seed=9)
            wanted = out + decoded if add else decoded
            codec.decode(encoded, 0, out, add=add)
            assert out.tobytes() == wanted.tobytes()


def test_wire_format_by_example() -> None:
    values = np.array([1, -2, 3, -0.0, 0, 0, 0, -6, 1.5], np.float32)
    encoded = build(9, 8).encode(values, 0, KEY)
    assert encoded.scales.tolist() == [1.5, 1.5]
    assert bytes(encoded.payload) == bytes([0b1000_0010, 0])


@every_block
def test_a_block_has_its_mean_magnitude_and_its_largest_may_be_any(block: int) -> None:
    for unit in (1e-45, 1e-38, 1, 3.4e38):
        values = np.full(2 * block, unit, np.float32)
        values[::2] *= -1
        encoded = build(2 * block, block).encode(values, 0, KEY)
        assert encoded.scales.tolist() == [np.float32(unit)] * 2
        out = np.empty_like(values)
        build(2 * block, block).decode(encoded, 0, out, add=False)
        assert np.array_equal(out, values)


def test_error_is_what_the_mean_magnitude_leaves() -> None:
    """|x - sign(x) mean|x||^2 = |x|^2 - n mean|x|^2: for a normal x a part 1 - 2/pi of the square."""
    values, out = gaussian(1 << 18), np.empty(1 << 18, np.float32)
    codec = build(len(values), 512)
    codec.decode(codec.encode(values, 0, KEY), 0, out, add=False)
    error = float(((out - values).astype(np.float64) ** 2).sum() / (values.astype(np.float64) ** 2).sum())
    assert error == pytest.approx(1 - 2 / np.pi, rel=0.01)
