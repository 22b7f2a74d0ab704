"""The quantizers are unbiased, (A5)-(A6), with the variance of the theory; biased ones would be noticed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from common.codecs import Codec, Float32, RandomKey
from common.config import CodecSpec
from tests.codecs.numpy_reference import codecs as numpy_codecs
from tests.codecs.numpy_reference import make_reference
from tests.codecs.table import KEY, build, encode, gaussian, name_of, round_trip

Float64 = NDArray[np.float64]
Decode = Callable[[Codec, Float32, RandomKey], Float32]

DRAWS = 2000
LIMIT = 4.0
"""Standard errors."""

SPECS = [
    *(CodecSpec(bits=bits, block=64) for bits in (2, 3, 4, 5, 6, 7, 8, 16)),
    CodecSpec(bits=3, block=24, scale="l2"),
    CodecSpec(bits=4, block="layer", scale="l2"),
    CodecSpec(bits=8, block="all"),
    CodecSpec(name="paper", bits=2),
    CodecSpec(name="paper", bits=8),
]


def steps_of(codec: Codec, spec: CodecSpec, values: Float32) -> Float64:
    """c / s of each element in float64."""
    levels = 2**spec.bits if spec.name == "paper" else 2 ** (spec.bits - 1) - 1
    scales = np.abs(np.concatenate([encode(codec, values)[0].scales])).astype(np.float64) / levels
    if spec.name == "paper" or spec.block == "all":
        return np.full(len(values), scales[0])
    if spec.block == "layer":
        return np.repeat(scales, np.diff((0, 8, 13, 14, len(values))))
    return np.repeat(scales, spec.block)[: len(values)]


def variances(values: Float32, steps: Float64) -> Float64:
    """Variance of each element's estimate: step^2 f (1 - f), f the fraction of its level."""
    fractions = np.abs(values.astype(np.float64)) / steps % 1
    return steps**2 * fractions * (1 - fractions)


def estimate(spec: CodecSpec, values: Float32, decode: Decode) -> Float64:
    """Mean of DRAWS estimates of a vector: over rounds, or where blocks are short over copies side by side."""
    d = len(values)
    if isinstance(spec.block, int) and spec.name != "paper":
        copies = np.tile(values, DRAWS)
        return decode(build(spec, len(copies)), copies, KEY).reshape(DRAWS, d).mean(axis=0, dtype=np.float64)
    codec, total = build(spec, d), np.zeros(d)
    for number in range(DRAWS):
        total += decode(codec, values, replace(KEY, round=number))
    return total / DRAWS


def standard_errors_off(spec: CodecSpec, decode: Decode = round_trip) -> float:
    """The worst of three statistics of the mean of DRAWS estimates, each on the scale of one normal variable.

    Shrinking or growing of all magnitudes together; the sum of all squared deviations; the largest deviation, counted
    as one of as many as there are elements (Sidak).
    """
    values = gaussian(192, seed=3)
    errors = np.sqrt(variances(values, steps_of(build(spec, len(values)), spec, values)) / DRAWS)
    errors += np.abs(values) * 2.0**-22  # rounding to float32
    off = (estimate(spec, values, decode) - values) / errors
    together = abs((off * np.sign(values)).sum()) / len(off) ** 0.5
    squares = max((off**2).sum() - len(off), 0) / (2 * len(off)) ** 0.5
    alone = 2 * NormalDist().cdf(-float(np.abs(off).max()))
    as_one = -NormalDist().inv_cdf(max(1 - (1 - alone) ** len(off), 1e-16) / 2)
    return float(max(together, squares, as_one))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_estimate_is_unbiased_within_four_standard_errors(spec: CodecSpec) -> None:
    assert standard_errors_off(spec) < LIMIT


def _half_a_level_too_much(codec: Codec, values: Float32, key: RandomKey) -> Float32:
    """What the paper's released code decodes: half a level more for each positive element."""
    decoded = round_trip(codec, values, key)
    return decoded + (decoded > 0) * np.float32(0.5 * np.abs(values).max() / 7)


NEAREST = ("rounded to nearest", lambda draws: np.full_like(draws, 0.5))
OFTEN_UP = ("probability of rounding up 2% too large", lambda draws: draws * np.float32(1 / 1.02))
ONE_ZERO = ("one of 64 draws is zero", lambda draws: np.where(np.arange(len(draws)) % 64 == 20, np.float32(0), draws))


@pytest.mark.parametrize(
    ("spec", "name", "biased"),
    [
        *((CodecSpec(bits=4, block=64), *bias) for bias in (NEAREST, OFTEN_UP, ONE_ZERO)),
        (CodecSpec(name="paper", bits=2), *OFTEN_UP),
    ],
)
def test_a_biased_quantizer_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, spec: CodecSpec, name: str, biased: Callable[[Float32], Float32]
) -> None:
    """Shows that the test above can fail, on the reference, whose draws can be replaced."""
    honest = numpy_codecs.uniforms
    monkeypatch.setattr(numpy_codecs, "uniforms", lambda key, start, n: biased(honest(key, start, n)))
    assert standard_errors_off(spec, _with_the_reference) > LIMIT, name


def _with_the_reference(codec: Codec, values: Float32, key: RandomKey) -> Float32:
    bits, d = int(codec.wire_name.split("/")[1]), len(values)
    spec = CodecSpec(name="paper", bits=bits) if codec.wire_name.startswith("paper") else CodecSpec(bits=bits, block=64)
    return round_trip(make_reference(spec, start=0, stop=d, layer_edges=(0, d)), values, key)


def test_the_reference_is_as_unbiased_as_the_kernels() -> None:
    assert standard_errors_off(CodecSpec(bits=4, block=64), _with_the_reference) < LIMIT


def test_the_released_codes_decoder_would_be_noticed() -> None:
    assert standard_errors_off(CodecSpec(bits=4, block="all"), _half_a_level_too_much) > LIMIT


def test_draws_that_ignore_the_round_would_be_noticed() -> None:
    spec = CodecSpec(bits=4, block="all")
    assert standard_errors_off(spec, lambda codec, values, _: round_trip(codec, values)) > LIMIT


VECTORS = {
    "gaussian": gaussian(512),
    "all equal": np.full(512, 0.25, np.float32),
    "heavy tailed": gaussian(512) ** 5,
    "one-hot": np.eye(1, 512, 100, dtype=np.float32)[0] * -3,
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize(
    "spec",
    [
        *(CodecSpec(bits=bits, block="all", scale="l2") for bits in (2, 4, 8)),
        *(CodecSpec(name="paper", bits=bits) for bits in (2, 4, 8)),
    ],
    ids=name_of,
)
def test_l2_variance_is_that_of_the_theory_and_within_its_bound(spec: CodecSpec, name: str) -> None:
    """E|Q(x) - x|^2 <= min(d / s^2, sqrt(d) / s) |x|^2 (Alistarh et al., 2017, Lemma 3.1)."""
    values = VECTORS[name]
    codec, d = build(spec, len(values)), len(values)
    levels = 2**spec.bits if spec.name == "paper" else 2 ** (spec.bits - 1) - 1
    norm_squared = float((values.astype(np.float64) ** 2).sum())
    squares = [
        float(((round_trip(codec, values, replace(KEY, round=number)).astype(np.float64) - values) ** 2).sum())
        for number in range(60)
    ]
    expected = float(variances(values, steps_of(codec, spec, values)).sum())
    assert expected <= min(d / levels**2, d**0.5 / levels) * norm_squared
    error = float(np.std(squares)) / len(squares) ** 0.5
    assert abs(float(np.mean(squares)) - expected) <= LIMIT * error + 1e-5 * expected + 1e-12 * norm_squared


def relative_error(spec: CodecSpec, values: Float32) -> float:
    """NMSE: |Q(x) - x|^2 / |x|^2."""
    error = round_trip(build(spec, len(values)), values).astype(np.float64) - values
    return float((error**2).sum() / (values.astype(np.float64) ** 2).sum())


def test_one_norm_for_all_costs_a_thousand_times_the_error_of_blocks() -> None:
    """A Gaussian vector of 100 000 elements; sqrt(2 d / pi) / s - 1 where hardly any element reaches level 1."""
    d = 100_000
    values = gaussian(d)
    assert relative_error(CodecSpec(name="paper", bits=4), values) == pytest.approx(
        (2 * d / np.pi) ** 0.5 / 16 - 1, rel=0.02
    )
    paper, blocks = CodecSpec(name="paper", bits=8), CodecSpec(bits=8, block=512)
    norm_squared = float((values.astype(np.float64) ** 2).sum())
    predicted = {
        name_of(spec): float(variances(values, steps_of(build(spec, d), spec, values)).sum() / norm_squared)
        for spec in (paper, blocks)
    }
    assert relative_error(paper, values) == pytest.approx(predicted["paper/8"], rel=0.02)
    assert relative_error(blocks, values) == pytest.approx(predicted["randomized/8/512/linf"], rel=0.02)
    assert predicted["paper/8"] <= min(d / 256**2, d**0.5 / 256)
    assert predicted["randomized/8/512/linf"] < 0.01
    assert predicted["paper/8"] / predicted["randomized/8/512/linf"] > 1000
