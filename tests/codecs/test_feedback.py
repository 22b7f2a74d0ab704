"""Error feedback: residual + sent = gradient + old residual, exactly; and what it does for biased codecs."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.codecs import Codec, Float32, make_codec
from common.config import CodecSpec
from common.errors import CheckpointError, CodecError
from tests.codecs.table import KEY, gaussian
from worker.exchange.feedback import ErrorFeedback

SPECS = [CodecSpec(name="sign", block=64), CodecSpec(name="topk", block=64), CodecSpec(name="sign", block=512)]
every_codec = pytest.mark.parametrize("spec", SPECS, ids=["sign/64", "topk/64", "sign/512"])


def build(spec: CodecSpec, d: int) -> Codec:
    return make_codec(spec, start=0, stop=d, layer_edges=(0, d))


def one_round(feedback: ErrorFeedback, codec: Codec, gradient: Float32, cuts: tuple[int, ...] = ()) -> Float32:
    """Encodes a gradient in buckets; returns what was sent, as everybody decodes it."""
    sent, d = np.empty_like(gradient), len(gradient)
    for a, b in zip((0, *cuts), (*cuts, d), strict=True):
        encoded = feedback.encode(codec, gradient[a:b], a, KEY)
        codec.decode(encoded, a, sent[a:b], add=False)
    return sent


def fractions(values: NDArray[np.floating]) -> list[Fraction]:
    return [Fraction(float(value)) for value in values]


def assert_exact(spec: CodecSpec, gradients: list[Float32]) -> None:
    """In exact arithmetic, after each of several rounds."""
    codec, feedback = build(spec, len(gradients[0])), ErrorFeedback(len(gradients[0]))
    for gradient in gradients:
        before = fractions(feedback.residual)
        sent = fractions(one_round(feedback, codec, gradient))
        for r, s, g, old in zip(fractions(feedback.residual), sent, fractions(gradient), before, strict=True):
            assert r + s == g + old


def within_range(values: NDArray[np.floating], low: int) -> Float32:
    """Float32 of magnitude 2^low to 2^(low + 20), or zero: sums of some dozens stay below 2^(low + 30)."""
    magnitudes = np.abs(values).clip(2.0**low, 2.0 ** (low + 20))
    return np.where(values == 0, 0, np.copysign(magnitudes, values)).astype(np.float32)


@every_codec
@pytest.mark.parametrize("low", [-120, -40, -20, 0, 60])
def test_the_identity_is_exact_for_random_gradients(spec: CodecSpec, low: int) -> None:
    rng = np.random.default_rng(low + 200)
    exponents = rng.uniform(low, low + 20, (8, 130))
    assert_exact(spec, [within_range(rng.choice([-1, 0, 1], 130) * 2.0**row, low) for row in exponents])


@every_codec
@settings(max_examples=15, deadline=None)
@given(
    gradients=st.lists(
        st.lists(st.floats(-(2.0**10), 2.0**10, width=32), min_size=1, max_size=9), min_size=1, max_size=5
    )
)
def test_the_identity_is_exact_for_adversarial_gradients(spec: CodecSpec, gradients: list[list[float]]) -> None:
    assert_exact(spec, [within_range(np.resize(gradient, 70), -10) for gradient in gradients])


@every_codec
def test_the_identity_is_exact_at_the_edges_of_its_range(spec: CodecSpec) -> None:
    """Smallest and largest magnitudes side by side, all bits of the significands set, signs against each other."""
    full = np.float32(2 - 2.0**-23)
    column = np.array([full, -full * np.float32(2.0**20), full * np.float32(2.0**20), 1, -1, 0], np.float32)
    gradients = [np.resize(np.roll(column, shift) * np.float32(2.0**-30), 130) for shift in range(8)]
    assert_exact(spec, gradients)


def test_denormal_numbers_are_multiples_of_the_smallest() -> None:
    """So sums below 2^-96 are exact whatever they are made of."""
    rng = np.random.default_rng(0)
    gradients = [rng.integers(0, 2**23, 100).astype(np.uint32).view(np.float32) for _ in range(6)]
    assert_exact(SPECS[0], gradients)
    assert_exact(SPECS[1], gradients)


def test_beyond_its_range_the_loss_is_that_of_two_roundings() -> None:
    """An element far below its block's mean under `sign`: 1e-20 beside 1."""
    values = np.ones(64, np.float32)
    values[5] = 1e-20
    codec, feedback = build(SPECS[0], 64), ErrorFeedback(64)
    inexact = 0
    for _ in range(20):
        before = feedback.residual.copy()
        sent = one_round(feedback, codec, values)
        rows = zip(*(fractions(v) for v in (feedback.residual, sent, values, before)), strict=True)
        for r, s, g, old in rows:
            off = abs((r + s) - (g + old))
            assert off <= Fraction(2) ** -52 * max(abs(g), abs(old), abs(s), abs(r))
            inexact += off > 0
    assert inexact > 0


def test_first_sums_and_last_differences_are_rounded_to_float64_and_only_the_codecs_input_to_float32() -> None:
    values, codec, feedback = gaussian(640), build(SPECS[0], 640), ErrorFeedback(640)
    for _ in range(3):
        e = values.astype(np.float64) + feedback.residual
        sent = np.empty(640, np.float32)
        codec.decode(codec.encode(e.astype(np.float32), 0, KEY), 0, sent, add=False)
        assert np.array_equal(one_round(feedback, codec, values), sent)
        assert np.array_equal(feedback.residual, e - sent)


@every_codec
def test_buckets_give_what_the_whole_vector_gives(spec: CodecSpec) -> None:
    d, codec = 5000, build(spec, 5000)
    whole, cut = ErrorFeedback(d), ErrorFeedback(d)
    for round_ in range(4):
        sent = one_round(whole, codec, gaussian(d, seed=round_))
        assert np.array_equal(one_round(cut, codec, gaussian(d, seed=round_), (512, 1536, 4608)), sent)
        assert np.array_equal(whole.residual, cut.residual)


@every_codec
def test_sum_of_what_is_sent_follows_the_sum_of_the_gradients(spec: CodecSpec) -> None:
    """After T rounds the mean is off by a T-th part of the residual; without feedback it never arrives."""
    d, rounds = 4096, 200
    codec, feedback, gradient = build(spec, d), ErrorFeedback(d), gaussian(d)
    total, alone = np.zeros(d), np.zeros(d, np.float32)
    for _ in range(rounds):
        total += one_round(feedback, codec, gradient)
    codec.decode(codec.encode(gradient, 0, KEY), 0, alone, add=False)
    norm = float(np.linalg.norm(gradient))
    with_feedback = float(np.linalg.norm(total / rounds - gradient)) / norm
    without = float(np.linalg.norm(alone - gradient)) / norm
    assert with_feedback < 0.2 < 0.5 < without
    assert with_feedback == pytest.approx(float(np.linalg.norm(feedback.residual)) / rounds / norm, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_refused_gradient_leaves_the_residual_as_it_was(bad: float) -> None:
    d, codec, feedback = 640, build(SPECS[0], 640), ErrorFeedback(640)
    one_round(feedback, codec, gaussian(d))
    before, wrong = feedback.residual.copy(), gaussian(d)
    wrong[70] = bad
    with pytest.raises(CodecError, match=f"expected a finite value, got element 70={bad}"):
        feedback.encode(codec, wrong, 0, KEY)
    assert np.array_equal(feedback.residual, before)
    huge = ErrorFeedback(64)
    huge.load(np.full(64, 3e38))
    with pytest.raises(CodecError, match="expected a finite value, got element 0=inf"):
        huge.encode(build(SPECS[0], 64), np.full(64, 3e38, np.float32), 0, KEY)


def test_payload_is_written_into_the_message() -> None:
    codec, memory = build(SPECS[0], 640), np.zeros(80, np.uint8)
    encoded = ErrorFeedback(640).encode(codec, gaussian(640), 0, KEY, payload=memory)
    assert encoded.payload is memory
    assert memory.any()


def test_a_residual_goes_on_where_it_was() -> None:
    d, codec = 1003, build(SPECS[1], 1003)
    whole, first = ErrorFeedback(d), ErrorFeedback(d)
    for round_ in range(3):
        one_round(first, codec, gaussian(d, seed=round_))
        one_round(whole, codec, gaussian(d, seed=round_))
    second = ErrorFeedback(d)
    second.load(first.residual.copy())
    for round_ in range(3, 6):
        sent = one_round(second, codec, gaussian(d, seed=round_))
        assert np.array_equal(sent, one_round(whole, codec, gaussian(d, seed=round_)))
    assert np.array_equal(second.residual, whole.residual)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (np.zeros(9), r"expected float64\[10\], got residual=float64\[9\]"),
        (np.zeros(10, np.float32), r"expected float64\[10\], got residual=float32\[10\]"),
        (np.full(10, np.nan), "expected finite numbers, got residual=nan"),
    ],
)
def test_a_residual_of_another_gradient_is_refused(residual: NDArray[np.floating], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ErrorFeedback(10).load(residual)
    with pytest.raises(ValueError, match="read-only"):
        ErrorFeedback(10).residual[0] = 1
