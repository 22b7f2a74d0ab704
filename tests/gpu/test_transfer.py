"""Transfers keep the order that streams and pinned memory ask for, be the work done late, at once or by a GPU."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from common.codecs import Encoded, make_codec
from common.config import CodecSpec, ScaleNorm
from common.errors import CodecError
from tests.gpu.conftest import SECONDS, Outcome
from tests.gpu.programs import other_values
from tests.gpu.scenarios import BITS, BLOCK, BUCKET, HOST_MACHINES, SPANS, D, gradient_values
from tests.gpu.table import KEY

pytestmark = pytest.mark.timeout(SECONDS)


@pytest.fixture(params=[*HOST_MACHINES, "streams"])
def scenario(request: pytest.FixtureRequest) -> Outcome:
    """What a scenario of `scenarios.py` returns on a machine of `queues.py`."""
    outcome = request.getfixturevalue("native" if request.param == "streams" else "interpreted")
    return lambda name: outcome(f"{name} {request.param}")


@cache
def expected() -> list[Encoded]:
    """The buckets as the CPU encodes them."""
    codec, values = cpu_codec(), gradient_values()
    return [codec.encode(values[a:b], a, KEY) for a, b in SPANS]


def cpu_codec(norm: str = "linf"):
    return make_codec(CodecSpec(bits=BITS, block=BLOCK, scale=norm), start=0, stop=D, layer_edges=(0, D))


def test_buckets_are_encoded_while_the_gradient_is_computed(scenario: Outcome) -> None:
    arrays = scenario("encode_as_computed")
    for with_events in (True, False):
        for number, bucket in enumerate(expected()):
            assert np.array_equal(arrays[f"{with_events} scales {number}"], bucket.scales)
            assert arrays[f"{with_events} payload {number}"].tobytes() == bytes(bucket.payload)


def test_buckets_are_decoded_after_the_gradient_is_free_and_before_it_is_read(scenario: Outcome) -> None:
    arrays = scenario("decode_in_a_ring")
    for name, add in (("added", True), ("set", False)):
        gradient = other_values(D)
        for bucket, (a, b) in zip(expected(), SPANS, strict=True):
            cpu_codec().decode(bucket, a, gradient[a:b], add=add)
        assert np.array_equal(arrays[name].view(np.int32), gradient.view(np.int32))


@pytest.mark.parametrize("machine", HOST_MACHINES)
def test_gradients_are_kept_until_their_last_use(machine: str, interpreted: Outcome) -> None:
    lengths = [b - a for a, b in SPANS]
    assert interpreted(f"encode_as_computed {machine}")["kept"].tolist() == 2 * lengths
    assert interpreted(f"decode_in_a_ring {machine}")["kept"].tolist() == 3 * lengths


def test_views_of_a_bucket_are_valid_until_its_release(scenario: Outcome) -> None:
    arrays = scenario("reuse_memory")
    assert arrays["before"].tobytes() == arrays["after"].tobytes() == bytes(expected()[0].payload)
    assert np.array_equal(arrays["scales"], expected()[0].scales)


def test_memory_of_a_released_bucket_serves_the_next_one_and_only_that(scenario: Outcome) -> None:
    first, second, third, fourth, fifth = scenario("reuse_memory")["addresses"]
    assert fourth == first
    assert len({first, second, third, fifth}) == 4


def test_a_released_bucket_has_no_result(scenario: Outcome) -> None:
    assert scenario("reuse_memory")["released"] == "expected a bucket that is not released, got start=0"


@pytest.mark.parametrize(
    ("name", "norm", "bad"), [("nan", "linf", np.nan), ("infinity", "l2", -np.inf), ("overflow", "l2", 3e38)]
)
def test_values_are_refused_in_the_words_of_the_cpu(name: str, norm: str, bad: float, scenario: Outcome) -> None:
    arrays, values = scenario("refuse_values"), gradient_values()
    values[[BUCKET + 70, BUCKET + 71]] = bad
    with pytest.raises(CodecError) as refused:
        cpu_codec(norm).encode(values[BUCKET : 2 * BUCKET], BUCKET, KEY)
    assert arrays[name] == str(refused.value)
    bucket = cpu_codec(norm).encode(values[:BUCKET], 0, KEY)
    assert np.array_equal(arrays[f"{name} scales"], bucket.scales)
    assert arrays[f"{name} payload"].tobytes() == bytes(bucket.payload)


@pytest.mark.parametrize("machine", HOST_MACHINES)
def test_memory_of_a_refused_bucket_is_released(machine: str, interpreted: Outcome) -> None:
    assert interpreted(f"refuse_values {machine}")["pinned"] == 3  # one per encoder, of two buckets each


def test_a_bucket_of_other_sizes_is_refused() -> None:
    from common.codecs.gpu.transfer import DeviceDecoder, DeviceEncoder
    from tests.gpu.queues import HostQueue

    form = {"elements": 128, "block": 64, "bits": 4, "queue": HostQueue(late=True)}
    encoder = DeviceEncoder(torch.device("cpu"), norm=ScaleNorm.LINF, **form)
    decoder = DeviceDecoder(torch.device("cpu"), **form)
    scales, payload = np.ones(2, np.float32), bytes(64)
    with pytest.raises(CodecError, match="expected a bucket of at most 128 elements, got elements=192"):
        encoder.encode(torch.zeros(192), 0, KEY.words())
    with pytest.raises(CodecError, match="expected a bucket of at most 128 elements, got elements=192"):
        decoder.decode(scales, payload, 0, torch.zeros(192), add=True)
    for wrong in ((scales[:1], payload), (scales, payload[:1])):
        with pytest.raises(CodecError, match="expected 2 scales, 64 bytes, got bucket="):
            decoder.decode(*wrong, 0, torch.zeros(128), add=True)
