"""Every implementation of the codecs gives the bytes of the NumPy reference, and its values back."""

from __future__ import annotations

import numpy as np
import pytest

from common.codecs import Float32, make_codec
from common.config import CodecSpec
from tests.codecs.numpy_reference import make_reference
from tests.codecs.table import GROUPS, Case, bytes_of, gaussian

every_codec = pytest.mark.parametrize("name", GROUPS)


@every_codec
def test_bytes_are_those_of_the_numpy_reference(name: str) -> None:
    for case in GROUPS[name]:
        encoded = [bytes_of(bucket) for bucket in case.encode(case.codec(make_codec))]
        assert encoded == [bytes_of(bucket) for bucket in case.encode(case.codec(make_reference))], case.name


@every_codec
def test_decoded_values_are_those_of_the_numpy_reference(name: str) -> None:
    for case in GROUPS[name]:
        codec, reference = case.codec(make_codec), case.codec(make_reference)
        buckets = case.encode(reference)
        for add in (False, True):
            found, expected = gaussian(case.n, seed=9), gaussian(case.n, seed=9)
            for bucket, (a, values) in zip(buckets, case.buckets(), strict=True):
                part = slice(a - case.start, a - case.start + len(values))
                codec.check(bucket, a, len(values))
                codec.decode(bucket, a, found[part], add=add, key=case.key)
                reference.decode(bucket, a, expected[part], add=add, key=case.key)
            assert bits_of(found) == bits_of(expected), (case.name, add)


def bits_of(values: Float32) -> bytes:
    return values.view(np.uint32).tobytes()


def test_levels_by_integers_are_those_of_the_definition() -> None:
    """floor(y) + [u < y - floor(y)] is -floor((r - t) / 2^24), see `cpu.levels`: at and about all ties of r and t."""
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.uniform(0, 127, 200_000), rng.uniform(0, 1, 200_000), np.arange(128), np.arange(256) / 2])
    y = np.concatenate([y, 2.0 ** -rng.uniform(0, 40, 200_000)]).astype(np.float32)
    y = np.concatenate([y, np.nextafter(y, np.float32(0)), np.nextafter(y, np.float32(128))]).clip(0, 127)
    fractions = y - np.floor(y)
    t = np.ceil(y * np.float32(2**24)).astype(np.int32)
    near = np.floor(fractions * np.float32(2**24)).astype(np.int32)
    for r in (near - 2, near - 1, near, near + 1, near + 2, rng.integers(0, 2**24, len(y))):
        odd = np.clip(r, 1, 2**24 - 1).astype(np.int32) | np.int32(1)
        draws = odd.astype(np.float32) * np.float32(2**-24)
        assert np.array_equal(-((odd - t) >> np.int32(24)), np.floor(y) + (draws < fractions))


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_all_narrow_floats_and_all_ties_between_them_are_rounded_as_by_numpy(name: str) -> None:
    words = np.arange(2**16, dtype=np.uint16)
    halves = words.view(np.float16) if name == "fp16" else (words.astype(np.uint32) << 16).view(np.float32)
    positive = halves[: 2**15][np.isfinite(halves[: 2**15])].astype(np.float32)
    ties = positive[:-1] + np.diff(positive) / 2
    values = np.concatenate([positive, ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf))])
    values = np.concatenate([values, -values])
    case = Case(name=name, spec=CodecSpec(name=name), values=values)
    (encoded,), (expected,) = (case.encode(case.codec(make)) for make in (make_codec, make_reference))
    assert bytes_of(encoded) == bytes_of(expected)
    decoded = np.zeros_like(values)
    case.codec(make_codec).decode(encoded, 0, decoded, add=False)
    assert bits_of(decoded[: len(positive)]) == bits_of(positive)
