"""The codecs against a naive second implementation, byte for byte, and against digests that must never move."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.codecs import Encoded, Float32
from common.config import CodecSpec
from tests.codecs import reference
from tests.codecs.numpy_reference.randomness import uniforms
from tests.codecs.table import KEY, QUANTIZERS, build, bytes_of, decode, encode, exact_vector, layers, name_of

every_quantizer = pytest.mark.parametrize("spec", QUANTIZERS, ids=name_of)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)
vectors = st.lists(st.one_of(finite, st.floats(-1, 1, width=32)), min_size=1, max_size=70)


def blocks_of(spec: CodecSpec, d: int) -> list[int]:
    """The block number of each element of the vector."""
    if isinstance(spec.block, int) and spec.name == "randomized":
        return [i // spec.block for i in range(d)]
    edges = layers(d)[1:-1] if spec.name == "randomized" and spec.block == "layer" else ()
    return [sum(edge <= i for edge in edges) for i in range(d)]


def encode_naively(spec: CodecSpec, values: Float32, cuts: Sequence[int]) -> list[Encoded]:
    d, numbers = len(values), blocks_of(spec, len(values))
    kind = "l2" if spec.name == "paper" else spec.scale
    scales = {
        number: reference.norm([values[i] for i in range(d) if numbers[i] == number], kind) for number in set(numbers)
    }
    buckets = []
    for a, b in zip((0, *cuts), (*cuts, d), strict=True):
        if spec.name == "paper":
            scale, payload = reference.encode_paper(values[a:b], a, KEY.words(), spec.bits, scales[0])
            buckets.append(Encoded(scales=np.array([scale], np.float32), payload=payload))
        else:
            arguments = (values[a:b], a, KEY.words(), spec.bits, numbers[a:b], scales)
            bucket_scales, payload = reference.encode_randomized(*arguments)
            buckets.append(Encoded(scales=np.array(bucket_scales, np.float32), payload=payload))
    return buckets


def decode_naively(spec: CodecSpec, buckets: Sequence[Encoded], d: int, cuts: Sequence[int]) -> Float32:
    numbers, decoded = blocks_of(spec, d), []
    for bucket, a, b in zip(buckets, (0, *cuts), (*cuts, d), strict=True):
        if spec.name == "paper":
            decoded += reference.decode_paper(bucket.scales[0], bytes(bucket.payload), b - a, spec.bits)
        else:
            decoded += reference.decode_randomized(bucket.scales, bytes(bucket.payload), spec.bits, numbers[a:b])
    return np.array(decoded, np.float32)


def assert_same_bytes(spec: CodecSpec, values: Float32, cuts: Sequence[int] = ()) -> None:
    codec, d = build(spec, len(values)), len(values)
    buckets, expected = encode(codec, values, cuts=cuts), encode_naively(spec, values, cuts)
    for bucket, naive in zip(buckets, expected, strict=True):
        assert bucket.scales.tobytes() == naive.scales.tobytes()
        assert bytes(bucket.payload) == naive.payload
    assert decode(codec, buckets, d, cuts).tobytes() == decode_naively(spec, buckets, d, cuts).tobytes()


@every_quantizer
def test_bytes_equal_those_of_the_naive_reference(spec: CodecSpec) -> None:
    assert_same_bytes(spec, exact_vector(1003))


@every_quantizer
def test_bytes_of_buckets_equal_those_of_the_naive_reference(spec: CodecSpec) -> None:
    alignment = build(spec, 803).alignment
    assert_same_bytes(spec, exact_vector(803), cuts=[cut for cut in (alignment, 3 * alignment) if cut < 803])


@pytest.mark.parametrize("spec", [CodecSpec(bits=3, block="all", scale="l2"), CodecSpec(name="paper")], ids=name_of)
def test_bytes_over_several_segments_equal_those_of_the_naive_reference(spec: CodecSpec) -> None:
    assert_same_bytes(spec, exact_vector(2 * 4096 + 77), cuts=[8, 5000])


@every_quantizer
@settings(max_examples=8, deadline=None)
@given(values=vectors)
@example(values=[0.0, -0.0])
@example(values=[1e-45, 1e-45, -1e-45, 3e-45])
@example(values=[1e-38, 1e-45])
@example(values=[2.0**-64, 2.0**-65, 2.0**-100])
@example(values=[2.0**64, 2.0**65, -1.0, 1e30])
@example(values=[1e30, 1e-30])
def test_bytes_equal_those_of_the_naive_reference_for_any_vector(spec: CodecSpec, values: list[float]) -> None:
    assert_same_bytes(spec, np.array(values, np.float32))


def test_draws_equal_those_of_the_naive_reference() -> None:
    for start in (0, 1, 2**31 - 3, 2**32 - 40):
        expected = [reference.draw(KEY.words(), start + i) for i in range(40)]
        assert uniforms(KEY, start, 40).tolist() == [float(u) for u in expected]


GOLDEN = {
    "randomized/2/64/linf": "1f3061a9000e5316",
    "randomized/3/64/linf": "83debfa5a8d45a60",
    "randomized/4/64/linf": "42e8240441fd64e5",
    "randomized/5/64/linf": "4854eeb62a9848e2",
    "randomized/6/64/linf": "deea03a1d195b605",
    "randomized/7/64/linf": "49853bfd0b9270f2",
    "randomized/8/64/linf": "9d12a13d9d5edbdf",
    "randomized/16/64/linf": "85a603b19c10f212",
    "randomized/8/512/linf": "ca918d5411263eca",
    "randomized/8/8/linf": "b5cf8c762451b4b3",
    "randomized/3/40/l2": "43f557fd9c478bef",
    "randomized/8/64/l2": "889c0b69d2fc1cb8",
    "randomized/4/layer/linf": "d95714fcb572fda4",
    "randomized/5/layer/l2": "68896d47619170d1",
    "randomized/8/all/linf": "fcd78315f5546c23",
    "randomized/3/all/l2": "f6bfc57c349a15de",
    "paper/2": "2cf2db24ee684f2b",
    "paper/3": "f89f87f52e8472b8",
    "paper/8": "7a725ad4ee5d4815",
    "paper/16": "5287e8fe2f0e9710",
}
"""SHA-256, first 16 digits, of scales and payload of `exact_vector(10_007)`; the l2 ones span several segments."""


@every_quantizer
def test_bytes_never_change(spec: CodecSpec) -> None:
    """A kernel, another NumPy or another machine gives these bytes; a change of them is a change of the protocol."""
    (encoded,) = encode(build(spec, 10_007), exact_vector(10_007))
    digest = hashlib.sha256(b"".join(bytes_of(encoded))).hexdigest()[:16]
    assert digest == GOLDEN[name_of(spec)]
