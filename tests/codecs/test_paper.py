"""The paper's quantizer to the bit: 32 + d + b*d bits, and the distribution of (A6) up to level s."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import BlockScales
from common.config import CodecSpec
from common.errors import CodecError
from tests.codecs.table import KEY, build, decode, encode, gaussian, round_trip

every_width = pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])


def paper(bits: int) -> CodecSpec:
    return CodecSpec(name="paper", bits=bits)


@every_width
@pytest.mark.parametrize("d", [8, 64, 1000])
def test_a_vector_takes_exactly_the_papers_bits(bits: int, d: int) -> None:
    (encoded,) = encode(build(paper(bits), d), gaussian(d))
    assert 8 * (encoded.scales.nbytes + len(encoded.payload)) == 32 + d + bits * d


@every_width
@pytest.mark.parametrize("value", [1.0, -1.0, 3.3e-41, -1e-45, 1e30, -3.4e38])
def test_a_single_nonzero_element_is_exact_with_its_sign(bits: int, value: float) -> None:
    values = np.zeros(21, np.float32)
    values[13] = value
    codec = build(paper(bits), 21)
    (encoded,) = encode(codec, values)
    assert np.signbit(encoded.scales[0]) == (value < 0)
    assert np.array_equal(decode(codec, [encoded], 21), values)


@pytest.mark.parametrize("sign", [1, -1])
def test_only_the_bucket_of_the_element_at_the_highest_level_carries_its_sign(sign: int) -> None:
    values = np.zeros(40, np.float32)
    values[18] = sign * 5
    buckets = encode(build(paper(4), 40), values, cuts=[16, 24])
    assert [float(bucket.scales[0]) for bucket in buckets] == [5, sign * 5, 5]
    assert np.array_equal(decode(build(paper(4), 40), buckets, 40, [16, 24]), values)


@pytest.mark.parametrize(("bits", "sign"), [(2, -1), (4, 1)])
def test_a_dominating_element_takes_the_two_highest_levels_with_their_probabilities(bits: int, sign: int) -> None:
    """Equation (A6), for the element that is sent as minus zero as for the others."""
    values = np.full(24, 0.02, np.float32)
    values[3] = sign
    codec, s, draws = build(paper(bits), 24), 2**bits, 2000
    norm = float(np.linalg.norm(values.astype(np.float64)))
    decoded = np.array([round_trip(codec, values, replace(KEY, round=t)) for t in range(draws)])
    levels = np.rint(decoded / norm * s).astype(int)
    assert set(levels[:, 3]) == {sign * (s - 1), sign * s}
    assert set(levels[:, 4]) == {0, 1}
    for element, low in ((3, s - 1), (4, 0)):
        probability = s * abs(float(values[element])) / norm - low
        share = float((np.abs(levels[:, element]) == low + 1).mean())
        assert abs(share - probability) < 4 * (probability * (1 - probability) / draws) ** 0.5


@every_width
@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, min_value=-(2.0**120), max_value=2.0**120), min_size=2, max_size=9
    ),
    round=st.integers(0, 1000),
)
def test_at_most_one_element_is_at_the_highest_level(bits: int, values: list[float], round: int) -> None:
    vector = np.array(values, np.float32)
    codec = build(paper(bits), len(vector))
    norm = codec.measure(vector, 0).values[0]
    decoded = round_trip(codec, vector, replace(KEY, round=round))
    assert (np.abs(decoded) == norm).sum() <= 1 or norm < 2.0**-126
    assert (np.abs(decoded) <= norm).all()


@every_width
def test_denormal_vectors_never_have_two_elements_at_the_highest_level(bits: int) -> None:
    """The norm of (1, 1) units is rounded up to 2 units; to nearest, both would equal it and `encode` would refuse."""
    unit = np.float32(1e-45)
    for d in range(2, 40):
        values = np.full(d, unit)
        for t in range(10):
            decoded = round_trip(build(paper(bits), d), values, replace(KEY, round=t))
            assert np.isfinite(decoded).all()


def test_level_zero_has_no_sign() -> None:
    values = np.full(64, -1e-6, np.float32)
    values[0] = 1
    (encoded,) = encode(build(paper(2), 64), values)
    assert bytes(encoded.payload[:8]) == b"\1" + bytes(7)
    assert not np.signbit(round_trip(build(paper(2), 64), values)).any()


def test_a_norm_of_other_values_is_refused() -> None:
    codec = build(paper(4), 16)
    values = np.ones(16, np.float32)
    for norm, rule in ((1.0, "the norm of these values"), (0.5, "values within the measured scale 0.5")):
        measured = BlockScales(first_block=0, values=np.array([norm], np.float32))
        with pytest.raises(CodecError, match=f"expected {rule}"):
            codec.encode(values, 0, KEY, measured)
