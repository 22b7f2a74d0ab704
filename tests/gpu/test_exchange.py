"""Rounds with a gradient on a device: kernels push the bytes and give the averages of the CPU, beside computing."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from tests.gpu.conftest import SECONDS, Outcome
from tests.gpu.exchanges import KERNEL_CODECS, ROUNDS, Arrays, OnHost, job_of, refusal_at

pytestmark = pytest.mark.timeout(SECONDS)

every_codec = pytest.mark.parametrize("codec", KERNEL_CODECS)


@pytest.fixture(params=["late", "at once", "streams"])
def program(request: pytest.FixtureRequest) -> Outcome:
    """What a program of `exchanges.py` returns on a machine of `queues.py`."""
    outcome = request.getfixturevalue("native" if request.param == "streams" else "interpreted")
    return lambda name: outcome(f"{name} {request.param}")


@pytest.fixture(params=["late", "streams"])
def long_program(request: pytest.FixtureRequest) -> Outcome:
    """The same, where what happens at once would tell nothing."""
    outcome = request.getfixturevalue("native" if request.param == "streams" else "interpreted")
    return lambda name: outcome(f"{name} {request.param}")


@cache
def on_the_host(codec: str) -> Arrays:
    """The same job with all gradients on the host."""
    return job_of(codec, OnHost())


def assert_same(got: Arrays, expected: Arrays) -> None:
    assert got.keys() == expected.keys()
    assert {name for name in expected if not np.array_equal(got[name], expected[name])} == set()


@every_codec
def test_a_gradient_on_a_device_is_pushed_and_averaged_to_the_bytes_of_the_host(codec: str, program: Outcome) -> None:
    expected = on_the_host(codec)
    assert sum(name.startswith("0 payload 1 ") for name in expected) > 2
    assert_same(program(f"bytes_of_job {codec}"), expected)


@every_codec
def test_an_average_is_decoded_while_the_device_computes_the_next_buckets(codec: str, long_program: Outcome) -> None:
    arrays, expected = long_program(f"decoded_while_computing {codec}"), on_the_host(codec)
    assert arrays.pop("still computing").tolist() == [True] * ROUNDS
    for round_ in range(ROUNDS):
        first = arrays.pop(f"first bucket {round_}")
        assert len(first)
        assert np.array_equal(first, expected[f"0 average {round_}"][: len(first)])
    assert_same(arrays, expected)


@every_codec
def test_a_gradient_that_is_not_finite_is_refused_in_the_words_of_the_host(codec: str, long_program: Outcome) -> None:
    expected = refusal_at(OnHost(), KERNEL_CODECS[codec])
    assert "element 2000=inf" in expected
    assert expected.endswith("worker-0, round 0, layer fc.weight")
    assert long_program(f"refusal_of_job {codec}")["refusal"] == expected
