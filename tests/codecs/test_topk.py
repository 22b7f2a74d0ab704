"""Top-k: its bytes, which elements it chooses, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import Encoded, Float32
from common.codecs.topk import TopkCodec, density_of
from common.errors import CodecError
from tests.codecs.numpy_reference import topk as reference
from tests.codecs.table import KEY, SIZES, VALUES, bytes_of, gaussian

CASES = [(8, 1 / 32), (64, 1 / 32), (64, 1.0), (1000, 0.1), (4096, 1 / 32), (1 << 16, 0.01), (512, 0.999)]
every_case = pytest.mark.parametrize(("block", "density"), CASES)


def build(stop: int, block: int, density: float) -> TopkCodec:
    return TopkCodec(start=0, stop=stop, block=block, density=density_of(density), wire_name="topk")


def assert_same_as_the_reference(values: Float32, block: int, density: float) -> None:
    codec, n = build(len(values), block, density), len(values)
    encoded = codec.encode(values, 0, KEY)
    assert bytes_of(encoded) == bytes_of(reference.encode(values, block, density))
    codec.check(encoded, 0, n)
    decoded = reference.sparse(values, block, density)
    assert np.array_equal(reference.decode(encoded, n, block, density), decoded)
    for add in (False, True):
        out = gaussian(n, seed=9)
        wanted = out + decoded if add else decoded
        codec.decode(encoded, 0, out, add=add)
        assert np.array_equal(out, wanted)


@every_case
def test_bytes_and_values_are_those_of_the_numpy_reference(block: int, density: float) -> None:
    for values in [gaussian(n) for n in SIZES] + [make(1003) for make in VALUES.values()] + [gaussian(block + 4465)]:
        assert_same_as_the_reference(values, block, density)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.one_of(st.integers(-3, 3), st.floats(width=32, allow_nan=False, allow_infinity=False))),
    density=st.sampled_from([1 / 32, 0.2, 0.5, 0.9, 1.0]),
)
def test_ties_go_to_the_first(values: list[float], density: float) -> None:
    assert_same_as_the_reference(np.array(values, np.float32), 16, density)


@pytest.mark.parametrize("spread", [1, 2, 1 << 15, 1 << 16, 1 << 20])
def test_neighbours_in_magnitude_are_told_apart(spread: int) -> None:
    """Magnitudes that agree in their upper half or in all but a few bits, and every number of elements."""
    words = 0x3F80_0000 + np.random.default_rng(spread).integers(0, spread, 4096)
    values = words.astype(np.uint32).view(np.float32) * np.where(np.arange(4096) % 3, 1, -1).astype(np.float32)
    for density in (1 / 4096, 0.01, 0.3, 0.5, 0.9, 1.0):
        assert_same_as_the_reference(values, 4096, density)


def test_wire_format_by_example() -> None:
    values = np.array([0, 5, -7, 0, 0, 0, 0, 7, 0, -1], np.float32)
    encoded = build(10, 8, 0.25).encode(values, 0, KEY)
    kept = np.array([-7, 7, -1], "<f4").tobytes()
    assert bytes(encoded.payload) == kept + bytes([2 | 7 << 3, 1])


@pytest.mark.parametrize(("density", "n", "count"), [(0.1, 30, 3), (1 / 32, 33, 2), (0.01, 4096, 41), (1e-9, 4096, 1)])
def test_a_density_is_read_as_a_fraction_and_rounded_up(density: float, n: int, count: int) -> None:
    assert build(n, 4096, density).payload_bytes(0, n) == 4 * count + (12 * count + 7) // 8


def test_bytes_at_the_default() -> None:
    assert build(1 << 20, 512, 1 / 32).wire_bytes(0, 1 << 20) / (1 << 20) == (4 * 16 + 18) / 512


@pytest.mark.parametrize(
    ("places", "context"),
    [((5, 5), "twice"), ((6, 5), "falling"), ((9, 30), "behind the end of a short block"), ((0, 63), "far behind")],
)
def test_places_that_no_encoder_sends_are_refused_and_write_nothing_outside(
    places: tuple[int, int], context: str
) -> None:
    codec = build(64 + 20, 64, 0.1)
    encoded = codec.encode(gaussian(84), 0, KEY)
    payload = bytearray(encoded.payload)
    payload[-2:] = (places[0] | places[1] << 6).to_bytes(2, "little")
    wrong = replace(encoded, payload=payload)
    with pytest.raises(CodecError, match="expected rising places within each block, got block=from 64"):
        codec.check(wrong, 0, 84)
    memory = np.zeros(200, np.float32)
    codec.decode(wrong, 0, memory[:84], add=False)
    assert not memory[84:].any(), context


def test_a_number_that_is_not_finite_is_refused_by_check() -> None:
    codec = build(64, 64, 0.1)
    payload = bytearray(codec.encode(gaussian(64), 0, KEY).payload)
    payload[4:8] = np.float32(np.inf).tobytes()
    with pytest.raises(CodecError, match="expected a finite value, got element 1=inf"):
        codec.check(Encoded(scales=np.empty(0, np.float32), payload=payload), 0, 64)
