"""Zero, single, denormal and huge values: exact where they can be, refused where they cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import CodecSpec
from common.errors import CodecError
from tests.codecs.table import (
    FLOATS,
    KEY,
    QUANTIZERS,
    SHARED,
    SPECS,
    build,
    encode,
    gaussian,
    measured_by,
    name_of,
    round_trip,
)

every_codec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
every_quantizer = pytest.mark.parametrize("spec", [*QUANTIZERS, *SHARED], ids=name_of)
"""Not `rotated`, whose error spreads over a block, nor `sign` and `topk`, which do not keep each element."""

SMALLEST = np.float32(1e-45)


def bits_of(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint32)


@every_codec
def test_a_zero_vector_is_exact(spec: CodecSpec) -> None:
    decoded = round_trip(build(spec, 1003), np.zeros(1003, np.float32))
    assert np.array_equal(bits_of(decoded), np.zeros(1003, np.uint32))


@every_quantizer
def test_minus_zero_decodes_to_plus_zero(spec: CodecSpec) -> None:
    values = np.array([-0.0, 0.0, -0.0, 1.0, 0.0, -0.0, -0.0, -0.0, -0.0], np.float32)
    assert np.array_equal(bits_of(round_trip(build(spec, 9), values)), bits_of(np.abs(values)))
    zeros = np.full(9, -0.0, np.float32)
    (encoded,) = encode(build(spec, 9), zeros)
    assert not np.signbit(encoded.scales).any()
    assert np.array_equal(bits_of(round_trip(build(spec, 9), zeros)), np.zeros(9, np.uint32))


def test_codec_none_keeps_every_bit() -> None:
    values = np.array([-0.0, 0.0, 1e-45, -1e-45, 3.4e38, -1.1754942e-38, 1 / 3], np.float32)
    assert np.array_equal(bits_of(round_trip(build(CodecSpec(name="none"), 7), values)), bits_of(values))


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from([spec for spec in SPECS if spec not in FLOATS]),
    value=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_a_single_element_is_exact_whatever_its_magnitude(spec: CodecSpec, value: float) -> None:
    values = np.array([value], np.float32)
    assert np.array_equal(round_trip(build(spec, 1), values), values)


@settings(max_examples=150, deadline=None)
@given(
    spec=st.sampled_from([spec for spec in [*QUANTIZERS, *SHARED] if spec.scale == "linf" and spec.name != "paper"]),
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
)
def test_the_element_that_gives_an_linf_block_its_scale_is_exact(spec: CodecSpec, values: list[float]) -> None:
    vector = np.array(values, np.float32)
    decoded = round_trip(build(spec, len(vector)), vector)
    largest = np.abs(vector).max()
    assert np.array_equal(decoded[np.abs(vector) == largest], vector[np.abs(vector) == largest])
    assert (np.abs(decoded) <= largest).all()


@every_quantizer
def test_tiny_and_huge_vectors_stay_within_one_level(spec: CodecSpec) -> None:
    for unit in (1e-45, 1e-41, 1e-38, 1e-30, 2.0**-64, 2.0**64, 1e25, 1e30):
        values = np.tile(np.array([1, -0.5, 0.25, 0, 0.999], np.float32), 15) * np.float32(unit)
        codec = build(spec, len(values))
        (encoded,) = encode(codec, values)
        levels = 2**spec.bits if spec.name == "paper" else 2 ** (spec.bits - 1) - 1
        scales = measured_by(codec, values).values if spec.name == "shared" else encoded.scales
        step = float(np.abs(scales).max()) / levels
        off = np.abs(round_trip(codec, values).astype(np.float64) - values)
        assert off.max() <= step * (1 + 2**-20) + float(SMALLEST), unit


def test_tiny_and_huge_blocks_lie_side_by_side() -> None:
    values = np.concatenate([gaussian(64) * np.float32(unit) for unit in (1e-42, 1e30, 1, 1e-30, 0)])
    decoded = round_trip(build(CodecSpec(bits=8, block=64), 320), values).reshape(5, 64)
    largest = np.abs(values.reshape(5, 64)).max(axis=1).astype(np.float64)
    off = np.abs(decoded.astype(np.float64) - values.reshape(5, 64)).max(axis=1)
    assert (off <= largest / 127 * 1.001 + float(SMALLEST)).all()
    assert (off[:4] > 0).all()


@pytest.mark.parametrize("spec", [CodecSpec(scale="l2"), CodecSpec(block="all", scale="l2"), CodecSpec(name="paper")])
def test_an_l2_scale_beyond_float32_is_refused(spec: CodecSpec) -> None:
    values = np.full(16, 3e38, np.float32)
    with pytest.raises(CodecError, match="expected an l2 norm within float32, got scale=inf"):
        encode(build(spec, 16), values)


@pytest.mark.parametrize(("name", "fits", "too_large"), [("fp16", 65519.0, 65520.0), ("bf16", 3.389e38, 3.4e38)])
def test_a_value_that_would_round_to_infinity_is_refused(name: str, fits: float, too_large: float) -> None:
    codec = build(CodecSpec(name=name), 9)
    values = np.ones(9, np.float32)
    values[5] = fits
    assert np.isfinite(round_trip(codec, values)).all()
    for bad in (too_large, -too_large):
        values[5] = bad
        with pytest.raises(
            CodecError, match=rf"within the range of {name}, got element 5={np.float32(bad)!s}".replace("+", r"\+")
        ):
            codec.encode(values, 0, KEY)


@settings(max_examples=200, deadline=None)
@given(word=st.integers(0, 2**32 - 1), name=st.sampled_from(["fp16", "bf16"]))
def test_narrow_floats_round_to_the_nearest_and_ties_to_even(word: int, name: str) -> None:
    value = np.array([word], np.uint32).view(np.float32)
    if not np.isfinite(value[0]) or abs(value[0]) > {"fp16": 65000, "bf16": 3.38e38}[name]:
        return
    codec = build(CodecSpec(name=name), 1)
    pattern = int.from_bytes(bytes(codec.encode(value, 0, KEY).payload), "little")
    neighbours = np.array([max((pattern & 0x7FFF) - 1, 0), pattern & 0x7FFF, (pattern & 0x7FFF) + 1], np.uint16)
    if name == "fp16":
        magnitudes = neighbours.view(np.float16).astype(np.float64)
    else:
        magnitudes = (neighbours.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    below, at, above = np.abs(magnitudes - abs(float(value[0])))
    assert at <= min(below, above)
    assert pattern % 2 == 0 or at < min(below, above)
    assert bool(pattern >> 15) == bool(word >> 31)
