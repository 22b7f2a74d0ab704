"""The counter-based draws: uniform, and independent between elements, rounds, workers and seeds.

They are those of the NumPy reference; kernels that drew others would give other bytes (`test_backends.py`).

All tests are deterministic. Statistics are on the scale of one normal variable; a good generator stays below 5 in the
few hundred of them in this file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from common.codecs import SERVER, Float32, RandomKey
from tests.codecs.numpy_reference.randomness import uniforms
from tests.codecs.table import KEY

N = 1 << 18
LIMIT = 5.0
KEYS = [replace(KEY, round=number) for number in range(4)]


@dataclass(frozen=True, kw_only=True)
class WordsKey(RandomKey):
    """A key with chosen words, to look for the worst pairs."""

    chosen: tuple[int, int]

    def words(self) -> tuple[int, int]:
        return self.chosen


def chosen_key(first: int, second: int) -> WordsKey:
    return WordsKey(seed=0, round=0, source=0, chosen=(first % 2**32, second % 2**32))


def chi_square(cells: NDArray[np.intp], count: int) -> float:
    """Deviation from equal counts in standard deviations of chi-square."""
    counts = np.bincount(cells, minlength=count)
    expected = len(cells) / count
    return float((((counts - expected) ** 2).sum() / expected - (count - 1)) / (2 * (count - 1)) ** 0.5)


def cell(draws: Float32, count: int) -> NDArray[np.intp]:
    return (draws * np.float32(count)).astype(np.intp)


def dependence(first: Float32, second: Float32, count: int = 64) -> float:
    """Chi-square of pairs on a grid: notices any dependence, not just a linear one."""
    return chi_square(cell(first, count) * count + cell(second, count), count**2)


def test_draws_are_odd_multiples_of_the_unit_strictly_between_zero_and_one() -> None:
    draws = uniforms(KEY, 0, N)
    numerators = draws.astype(np.float64) * 2**24
    assert draws.dtype == np.float32
    assert (numerators % 2 == 1).all()
    assert 0 < numerators.min() < 2**7 * 100
    assert 2**24 - 2**7 * 100 < numerators.max() < 2**24


def test_draws_depend_on_the_flat_index_only() -> None:
    whole = uniforms(KEY, 100, 1000)
    parts = [uniforms(KEY, 100, 1), uniforms(KEY, 101, 500), uniforms(KEY, 601, 499)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert uniforms(KEY, 2**32 - 1, 1).shape == (1,)


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"round {key.round}")
def test_draws_are_uniform(key: RandomKey) -> None:
    draws = uniforms(key, 0, 4 * N)
    assert abs(chi_square(cell(draws, 1 << 12), 1 << 12)) < LIMIT
    lower_bits = (draws.astype(np.float64) * 2**12 % 1 * 2**11).astype(np.intp)
    assert abs(chi_square(lower_bits, 1 << 11)) < LIMIT
    assert abs(float(draws.astype(np.float64).mean()) - 0.5) * (12 * len(draws)) ** 0.5 < LIMIT


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"round {key.round}")
@pytest.mark.parametrize("block", [8, 64, 512, 4096])
def test_sums_over_blocks_spread_as_those_of_independent_draws(key: RandomKey, block: int) -> None:
    sums = (uniforms(key, 0, 4 * N).reshape(-1, block).astype(np.float64) - 0.5).sum(axis=1) / (block / 12) ** 0.5
    assert abs((sums**2).sum() - len(sums)) / (2 * len(sums)) ** 0.5 < LIMIT
    assert np.abs(sums).max() < LIMIT + 0.5


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16, 64, 128, 256, 512, 513, 1024, 2304, 4096, 65536, 1 << 24, 1 << 31])
def test_elements_are_independent_of_those_at_a_distance(lag: int) -> None:
    for key in KEYS:
        assert abs(dependence(uniforms(key, 0, N), uniforms(key, lag, N))) < LIMIT


@pytest.mark.parametrize(
    "other",
    [
        *(replace(KEY, round=KEY.round + step) for step in (1, 2, 1 << 16, 1 << 32)),
        *(replace(KEY, source=source) for source in (0, 2, 3, 15, SERVER)),
        *(replace(KEY, seed=seed) for seed in (0, 6, 8, 1 << 40)),
    ],
    ids=lambda key: f"seed {key.seed} round {key.round} source {key.source}",
)
def test_rounds_workers_and_seeds_are_independent_at_any_shift(other: RandomKey) -> None:
    for shift in (0, 1, -1, 512):
        assert abs(dependence(uniforms(KEY, 1024, N), uniforms(other, 1024 + shift, N))) < LIMIT


def test_two_keys_are_independent_even_where_their_sequences_agree_but_for_a_shift() -> None:
    """The first word is an offset: here the second sequence is moved so that both start from the same states."""
    words = [replace(key, source=source).words() for key in KEYS for source in (1, 9, 10)]
    for (first, second), (_, other) in pairwise(words):
        shift = 12345
        pair = uniforms(chosen_key(first, second), shift, N), uniforms(chosen_key(first + shift, other), 0, N)
        assert abs(dependence(*pair)) < LIMIT


def _two_rounds(key: RandomKey, start: int, n: int, other_word: int | None = None) -> Float32:
    """The shorter mix that was tried first."""
    first, second = key.words()
    x = np.arange(n, dtype=np.uint32) + np.uint32((start + first) % 2**32)
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x21F0AAAD)
    x ^= x >> np.uint32(15)
    x ^= np.uint32(second if other_word is None else other_word)
    x *= np.uint32(0x735A2D97)
    x ^= x >> np.uint32(15)
    return ((x >> np.uint32(8)) | np.uint32(1)).astype(np.float32) * np.float32(2**-24)


def test_two_rounds_would_not_be_enough() -> None:
    """Shows that the tests above can fail, and why the third round is there."""
    for lag in (512, 1024, 4096):
        worst = max(abs(dependence(_two_rounds(key, 0, N), _two_rounds(key, lag, N))) for key in KEYS)
        assert worst > 2 * LIMIT
