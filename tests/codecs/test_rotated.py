"""The rotated quantizer: its bytes, that it is unbiased whatever the vector, and its error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.codecs import Float32, RandomKey
from common.codecs.cpu import hadamard as transform
from common.codecs.cpu import signs as random_signs
from common.codecs.cpu.compile import kernel
from common.codecs.rotated import RotatedCodec
from common.errors import CodecError
from tests.codecs.numpy_reference import rotated as reference
from tests.codecs.table import KEY, SIZES, VALUES, bytes_of, exact_vector, gaussian

BITS = (1, 2, 3, 4)
every_width = pytest.mark.parametrize("bits", BITS)
QUANTIZER = {1: 0.570796, 2: 0.133121, 3: 0.035784, 4: 0.0095921}
"""Squared error relative to the vector's square: 1 / (1 - D) - 1, D the distortion of Lloyd-Max for the normal."""
LIMIT = 4.0
"""Standard errors."""


def build(stop: int, bits: int, block: int = 512, start: int = 0) -> RotatedCodec:
    return RotatedCodec(start=start, stop=stop, block=block, bits=bits, wire_name=f"rotated/{bits}/{block}")


def round_trip(codec: RotatedCodec, values: Float32, key: RandomKey = KEY, start: int = 0) -> Float32:
    encoded = codec.encode(values, start, key)
    codec.check(encoded, start, len(values))
    out = np.empty(len(values), np.float32)
    codec.decode(encoded, start, out, add=False, key=key)
    return out


def assert_same_as_the_reference(values: Float32, bits: int, block: int, start: int = 0, key: RandomKey = KEY) -> None:
    codec = build(start + len(values), bits, block, start)
    encoded, expected = codec.encode(values, start, key), reference.encode(values, start, key, bits, block)
    assert bytes_of(encoded) == bytes_of(expected)
    decoded = reference.decode(expected, start, len(values), key, bits, block)
    for add in (False, True):
        out = gaussian(len(values), seed=9)
        wanted = out + decoded if add else decoded
        codec.decode(encoded, start, out, add=add, key=key)
        assert out.tobytes() == wanted.tobytes()


# Bytes


@pytest.mark.parametrize(("bits", "block"), [(1, 64), (1, 512), (2, 8192), (3, 64), (3, 8192), (4, 512)])
def test_bytes_and_values_are_those_of_the_numpy_reference(bits: int, block: int) -> None:
    for n in (*SIZES[:-4], 127, 128, block + block // 2 + block // 4 + 77):
        assert_same_as_the_reference(gaussian(n), bits, block)
    for make in VALUES.values():
        assert_same_as_the_reference(make(1003), bits, block)


@every_width
def test_bytes_at_other_places_and_keys_are_those_of_the_reference(bits: int) -> None:
    assert_same_as_the_reference(gaussian(5000), bits, 512, start=7 * 512)
    assert_same_as_the_reference(gaussian(512), bits, 512, start=2**32 - 512)
    assert_same_as_the_reference(gaussian(1100), bits, 512, key=RandomKey(seed=2**63, round=10**9, source=2**32 - 1))
    assert_same_as_the_reference(gaussian(1 << 15), bits, 1 << 15)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**110), max_value=2.0**110),
        min_size=1,
        max_size=5,
    ),
    bits=st.sampled_from(BITS),
)
def test_bytes_are_those_of_the_reference_for_any_numbers(values: list[float], bits: int) -> None:
    assert_same_as_the_reference(np.resize(np.array(values, np.float32), 200), bits, 128)


GOLDEN = {1: "d1791f1ef66c3cbf", 2: "45c534b7219df39e", 3: "4dd00602ade6d59c", 4: "a7bb68c60f3b31d8"}
"""SHA-256, first 16 digits, of scales and payload of `exact_vector(10_007)`."""


@every_width
def test_bytes_never_change(bits: int) -> None:
    encoded = build(10_007, bits).encode(exact_vector(10_007), 0, KEY)
    assert hashlib.sha256(b"".join(bytes_of(encoded))).hexdigest()[:16] == GOLDEN[bits]


def test_transform_and_signs_are_those_of_their_definition() -> None:
    """Written in vector instructions, and once more in Python for people."""

    @kernel("void", "float32[]")
    def transformed(values: Float32) -> None:
        transform.hadamard(values)

    for n in (64, 128, 256, 512, 1024, 4096):
        values = gaussian(n)
        compiled, plain = values.copy(), values.copy()
        transformed(compiled)
        transform.hadamard(plain)
        assert compiled.tobytes() == plain.tobytes() == reference.hadamard(values).tobytes()
    out = np.zeros(32, np.float32)
    word = np.uint32(0b1000_0000_0000_0001 << 8)
    random_signs.set_run(np.arange(32, dtype=np.float32), out, 16, word, np.float32(2).view(np.uint32))
    assert out[16:].tolist() == [-32.0, *(2.0 * i for i in range(17, 31)), -62.0]


@pytest.mark.parametrize(("n", "scales", "raw"), [(512, 1, 0), (513, 1, 1), (1003, 4, 43), (448, 3, 0), (63, 0, 63)])
def test_a_short_block_is_cut_into_powers_of_two_and_single_numbers(n: int, scales: int, raw: int) -> None:
    codec = build(n, 2)
    assert codec.scale_count(0, n) == scales
    assert codec.payload_bytes(0, n) == (n - raw) // 4 + 4 * raw
    if raw:
        assert np.array_equal(round_trip(codec, gaussian(n))[-raw:], gaussian(n)[-raw:])


# Statistics


def two_large(n: int) -> Float32:
    values = np.zeros(n, np.float32)
    values[[3, n // 2]] = 1, 0.9
    return values


VECTORS: dict[str, Callable[[int], Float32]] = {
    "gaussian": gaussian,
    "heavy tailed": lambda n: np.random.default_rng(1).standard_t(2, n).astype(np.float32),
    "one-hot": lambda n: np.eye(1, n, 5, dtype=np.float32)[0],
    "two large": two_large,
    "all equal": lambda n: np.full(n, 0.3, np.float32),
}


def standard_errors_off(estimates: NDArray[np.float64], values: Float32) -> float:
    """The worst of two statistics of the mean of estimates (rows), each on the scale of one normal variable.

    The sum of all squared deviations, and the largest deviation, counted as one of as many as there are elements.
    """
    errors = estimates.std(axis=0) / len(estimates) ** 0.5 + 1e-6 * np.abs(values).max()
    off = (estimates.mean(axis=0) - values) / errors
    squares = max((off**2).sum() - len(off), 0) / (2 * len(off)) ** 0.5
    alone = 2 * NormalDist().cdf(-float(np.abs(off).max()))
    return float(max(squares, -NormalDist().inv_cdf(max(1 - (1 - alone) ** len(off), 1e-16) / 2)))


def estimates_of(values: Float32, bits: int, copies: int) -> NDArray[np.float64]:
    """Independent estimates of one block, one per row: at each place in the flat vector the rotation is another."""
    n = len(values)
    return round_trip(build(copies * n, bits, n), np.tile(values, copies)).reshape(copies, n).astype(np.float64)


@every_width
@pytest.mark.parametrize(("name", "n"), [*((name, 512) for name in VECTORS), ("gaussian", 64), ("heavy tailed", 64)])
def test_estimate_is_unbiased_within_four_standard_errors(name: str, n: int, bits: int) -> None:
    values = VECTORS[name](n)
    assert standard_errors_off(estimates_of(values, bits, 500), values) < LIMIT


@pytest.mark.parametrize(("n", "bound"), [(64, 0.01), (128, 0.0025), (256, 0.0007)])
def test_the_bias_that_is_left_for_the_worst_vectors_falls_with_the_square_of_the_block(n: int, bound: float) -> None:
    """Two large elements, 1 bit; after one pass the squared bias would be 81% of |x|^2 for all n."""
    values, copies = two_large(n), 200_000 // n
    estimates, square = estimates_of(values, 1, copies), float((values.astype(np.float64) ** 2).sum())
    variance = ((estimates - estimates.mean(axis=0)) ** 2).sum() / copies / square
    bias = ((estimates.mean(axis=0) - values) ** 2).sum() / square - variance / copies
    assert abs(bias) < bound


@pytest.mark.parametrize("name", ["two large", "heavy tailed"])
def test_a_single_pass_would_be_noticed(name: str) -> None:
    """Shows that these tests can fail: EDEN's one pass of signs and transform, on vectors with few large elements."""
    n, copies = 256, 500
    values = np.tile(VECTORS[name](n), copies)
    encoded = reference.encode(values, 0, KEY, 1, n, passes=1)
    estimates = reference.decode(encoded, 0, len(values), KEY, 1, n, passes=1).reshape(copies, n).astype(np.float64)
    assert standard_errors_off(estimates, values[:n]) > 2 * LIMIT


@every_width
@pytest.mark.parametrize("name", VECTORS)
def test_error_is_that_of_the_quantizer_whatever_the_vector(name: str, bits: int) -> None:
    n, copies = 512, 300
    values = VECTORS[name](n)
    estimates = estimates_of(values, bits, copies)
    errors = ((estimates - values) ** 2).sum(axis=1) / (values.astype(np.float64) ** 2).sum()
    # After the first pass the coordinates of one-hot vectors have one magnitude; after the second they are binomial.
    assert errors.mean() == pytest.approx(QUANTIZER[bits], rel=0.06 if name in ("one-hot", "two large") else 0.02)
    mean = ((estimates.reshape(-1, 6, n).mean(axis=1) - values) ** 2).sum(axis=1)
    assert mean.mean() / (values.astype(np.float64) ** 2).sum() == pytest.approx(errors.mean() / 6, rel=0.03)


@every_width
def test_estimate_along_the_vector_is_exact(bits: int) -> None:
    """Which makes it unbiased: <estimate, x> = |x|^2 for each block."""
    values = np.random.default_rng(1).standard_t(2, 64 * 512).astype(np.float32)
    rows, decoded = (v.astype(np.float64).reshape(64, 512) for v in (values, round_trip(build(64 * 512, bits), values)))
    assert (rows * decoded).sum(axis=1) == pytest.approx((rows**2).sum(axis=1), rel=1e-5)


def test_signs_are_fair_and_independent() -> None:
    draws = reference.signs(KEY, 0, 1 << 20, 0)
    second = reference.signs(KEY, 0, 1 << 20, 2**31)
    other = reference.signs(replace(KEY, source=2), 0, 1 << 20, 0)
    error = 2.0**-10
    for product in (draws, second, draws * second, draws * other):
        assert abs(product.mean()) < LIMIT * error
    for lag in (1, 2, 7, 8, 15, 16, 17, 32, 64, 512, 1024, 4096):
        assert abs((draws[:-lag] * draws[lag:]).mean()) < LIMIT * error, lag
    by_bit = draws.reshape(-1, 16).mean(axis=0)
    assert np.abs(by_bit).max() < LIMIT * 2.0**-8


# Edges


def test_decoding_without_the_key_is_refused() -> None:
    codec = build(512, 2)
    with pytest.raises(CodecError, match="expected the key of the encoding, got key=None"):
        codec.decode(codec.encode(gaussian(512), 0, KEY), 0, np.empty(512, np.float32), add=False)


@every_width
@pytest.mark.parametrize("unit", [1e-45, 1e-41, 1e-38, 1e-30, 2.0**-64, 2.0**64, 1e30])
def test_tiny_and_huge_vectors_keep_their_error(bits: int, unit: float) -> None:
    values = (np.clip(gaussian(4096), -4, 4) * np.float32(unit)).astype(np.float32)
    error = round_trip(build(4096, bits), values).astype(np.float64) - values
    rounding = 1e-45 if unit < 1e-37 else 0.0
    bound = QUANTIZER[bits] * 1.1 * (values.astype(np.float64) ** 2).sum() + 4096 * (4 * rounding) ** 2
    assert (error**2).sum() <= bound


def test_a_refused_block_is_told_by_its_own_largest_magnitude() -> None:
    """Not by that of the whole bucket: here the first block has a larger element, and is fine."""
    values, limit = np.zeros(1024, np.float32), np.float32(2.0**120)
    values[5] = 8 * limit
    values[512:] = 2 * limit
    message = rf"got largest magnitude={2 * limit!s} \(from element 512\)".replace("+", r"\+")
    with pytest.raises(CodecError, match=message):
        build(1024, 2).encode(values, 0, KEY)


@pytest.mark.parametrize("block", [64, 512, 1 << 15])
def test_blocks_that_could_overflow_are_refused_by_encoder_and_check(block: int) -> None:
    codec = build(2 * block, 4, block)
    limit = 2.0 ** (125 - (block.bit_length()) // 2)
    values = gaussian(2 * block)
    values[block:] *= np.float32(limit * 1.5)
    with pytest.raises(CodecError, match=rf"expected blocks with a root mean square .* \(from element {block}\)"):
        codec.encode(values, 0, KEY)
    values[block:] *= np.float32(0.5)
    encoded = codec.encode(values, 0, KEY)
    codec.check(encoded, 0, len(values))
    worst = replace(encoded, scales=np.full(2, limit, np.float32))
    codec.check(worst, 0, len(values))
    out = np.empty(len(values), np.float32)
    codec.decode(worst, 0, out, add=False, key=KEY)
    assert np.isfinite(out).all()
    scales = np.full(2, np.nextafter(np.float32(limit), np.float32(np.inf)))
    with pytest.raises(CodecError, match="expected scales of at most"):
        codec.check(replace(encoded, scales=scales), 0, len(values))


def test_single_numbers_that_are_not_finite_are_refused_by_check() -> None:
    codec = build(3, 2)
    payload = np.array([1, np.inf, 2], "<f4").tobytes()
    with pytest.raises(CodecError, match="expected a finite value, got element 1=inf"):
        codec.check(replace(codec.encode(gaussian(3), 0, KEY), payload=payload), 0, 3)
