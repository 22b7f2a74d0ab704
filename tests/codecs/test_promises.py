"""What `base.py` promises, for the codecs that need a key to decode, error feedback or shared scales."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from common.codecs import BlockScales, Codec, Encoded, Float32, RandomKey, SharedCodec, make_codec, make_sum_codec
from common.config import CodecSpec
from common.errors import CodecError
from tests.codecs.table import KEY, SIZES, bytes_of, exact_vector, gaussian

SPECS = [
    *(CodecSpec(name="rotated", bits=bits, block=128) for bits in (1, 2, 3, 4)),
    CodecSpec(name="rotated", bits=2, block=4096),
    CodecSpec(name="sign", block=64),
    CodecSpec(name="sign", block=5000),
    CodecSpec(name="topk", block=64),
    CodecSpec(name="topk", block=1000, density=0.1),
    CodecSpec(name="topk", block=8, density=1),
    *(CodecSpec(name="shared", bits=bits, block=64) for bits in (2, 3, 4, 8)),
]
D = 20_003
every_codec = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda spec: make_codec(spec, start=0, stop=8, layer_edges=(0, 8)).wire_name
)


def build(spec: CodecSpec, stop: int = D, start: int = 0) -> Codec:
    return make_codec(spec, start=start, stop=stop, layer_edges=(0, stop))


def scales_of(codec: Codec, values: Float32, start: int = 0) -> BlockScales | None:
    """The shared scales of one worker, where the codec needs any."""
    if not isinstance(codec, SharedCodec):
        return None
    return BlockScales(first_block=codec.blocks(start, len(values)).start, values=codec.local_scales(values, start))


def encode(codec: Codec, values: Float32, cuts: Sequence[int] = (), start: int = 0) -> list[Encoded]:
    measured = scales_of(codec, values, start)
    edges = (start, *cuts, start + len(values))
    return [codec.encode(values[a - start : b - start], a, KEY, measured) for a, b in pairwise(edges)]


def decode(codec: Codec, buckets: Sequence[Encoded], n: int, cuts: Sequence[int] = (), start: int = 0) -> Float32:
    out = np.full(n, np.nan, np.float32)
    for encoded, (a, b) in zip(buckets, pairwise((start, *cuts, start + n)), strict=True):
        codec.check(encoded, a, b - a)
        codec.decode(encoded, a, out[a - start : b - start], add=False, key=KEY)
    return out


@every_codec
def test_wire_bytes_are_the_bytes_sent(spec: CodecSpec) -> None:
    for d in (*SIZES, 127, 128, 129, 191, 192, 4096 + 4032 + 5):
        codec = build(spec, d)
        (encoded,) = encode(codec, gaussian(d))
        assert codec.scale_count(0, d) == len(encoded.scales)
        assert codec.payload_bytes(0, d) == len(encoded.payload)
        assert codec.wire_bytes(0, d) == encoded.scales.nbytes + len(encoded.payload)
        assert np.isfinite(decode(codec, [encoded], d)).all()


@every_codec
def test_neither_cuts_nor_shards_change_a_decoded_value(spec: CodecSpec) -> None:
    codec, values, unit = build(spec), exact_vector(D), build(spec).alignment
    whole = decode(codec, encode(codec, values), D)
    for cuts in ([unit], [2 * unit, 3 * unit], list(range(unit, D, unit))):
        buckets = encode(codec, values, cuts)
        assert np.array_equal(decode(codec, buckets, D, cuts), whole)
        for bucket, (a, b) in zip(buckets, pairwise((0, *cuts, D)), strict=True):
            assert codec.wire_bytes(a, b - a) == bucket.scales.nbytes + len(bucket.payload)
    shard = build(spec, D, start=2 * unit)
    encoded = encode(shard, values[2 * unit :], start=2 * unit)
    assert np.array_equal(decode(shard, encoded, D - 2 * unit, start=2 * unit), whole[2 * unit :])


@every_codec
def test_decode_adds_or_sets_and_writes_into_its_slice_only(spec: CodecSpec) -> None:
    codec, values = build(spec), gaussian(D)
    (encoded,) = encode(codec, values)
    decoded = decode(codec, [encoded], D)
    out = np.full(D + 20, 9, np.float32)
    codec.decode(encoded, 0, out[10 : 10 + D], add=True, key=KEY)
    assert np.array_equal(out[10 : 10 + D], np.float32(9) + decoded)
    codec.decode(encoded, 0, out[10 : 10 + D], add=False, key=KEY)
    assert out[10 : 10 + D].tobytes() == decoded.tobytes()
    assert (out[:10] == 9).all()
    assert (out[10 + D :] == 9).all()


@every_codec
def test_memory_may_lie_anywhere_and_what_is_read_may_be_read_only(spec: CodecSpec) -> None:
    codec, values = build(spec), gaussian(D)
    (expected,) = encode(codec, values)
    values.flags.writeable = False
    size = codec.payload_bytes(0, D)
    message = np.full(size + 20, 0xA5, np.uint8)
    encoded = codec.encode(values, 0, KEY, scales_of(codec, values), payload=message[3 : 3 + size])
    assert bytes_of(encoded) == bytes_of(expected)
    assert (message[:3] == 0xA5).all()
    assert (message[3 + size :] == 0xA5).all()
    scales, payload = bytes_of(encoded)
    text = b"x" + scales + payload
    received = Encoded(
        scales=np.frombuffer(text, "<f4", len(encoded.scales), 1), payload=memoryview(text)[1 + len(scales) :]
    )
    out = np.zeros(D + 1, np.float32)[1:]
    codec.check(received, 0, D)
    codec.decode(received, 0, out, add=True, key=KEY)
    assert np.array_equal(out, decode(codec, [expected], D))


@every_codec
def test_threads_encode_and_decode_different_buckets_at_once(spec: CodecSpec) -> None:
    codec, values = build(spec), gaussian(D)
    cuts = range(codec.alignment, D, codec.alignment)
    edges, measured, out = list(pairwise((0, *cuts, D))), scales_of(codec, values), np.zeros(D, np.float32)

    def bucket(edge: tuple[int, int]) -> Encoded:
        a, b = edge
        encoded = codec.encode(values[a:b], a, KEY, measured)
        codec.decode(encoded, a, out[a:b], add=True, key=KEY)
        return encoded

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(bucket, edges))
    assert np.array_equal(out, decode(codec, found, D, cuts))
    assert np.array_equal(out, decode(codec, encode(codec, values), D))


@every_codec
def test_a_bucket_of_another_size_is_refused(spec: CodecSpec) -> None:
    codec = build(spec)
    (encoded,) = encode(codec, gaussian(D))
    shorter = replace(encoded, payload=bytes(encoded.payload)[:-1])
    more = replace(encoded, scales=np.append(encoded.scales, np.float32(1)))
    for wrong in (shorter, more):
        with pytest.raises(CodecError, match=r"expected .*, got"):
            codec.check(wrong, 0, D)
        with pytest.raises(CodecError, match=r"expected .* bytes, .* scales, got bucket="):
            codec.decode(wrong, 0, np.zeros(D, np.float32), add=False, key=KEY)
    for payload in (np.empty(3, np.uint8), np.empty(2 * codec.payload_bytes(0, D), np.uint8)[::2]):
        with pytest.raises(CodecError, match="expected writable uint8"):
            codec.encode(gaussian(D), 0, KEY, scales_of(codec, gaussian(D)), payload=payload)


@every_codec
def test_scales_that_no_encoder_sends_are_refused(spec: CodecSpec) -> None:
    codec = build(spec)
    (encoded,) = encode(codec, gaussian(D))
    for bad in (np.nan, np.inf, -1.0, -0.0) if len(encoded.scales) else ():
        scales = encoded.scales.copy()
        scales[-1] = bad
        with pytest.raises(CodecError, match=rf"finite scale.*scales\[{len(scales) - 1}\]={bad}"):
            codec.check(replace(encoded, scales=scales), 0, D)


@every_codec
def test_a_value_that_is_not_finite_is_refused_by_flat_index_and_value(spec: CodecSpec) -> None:
    codec, finite = build(spec), gaussian(D)
    measured = scales_of(codec, finite)
    for bad, place in product([np.nan, np.inf, -np.inf], [0, 15_007, D - 1]):
        values = finite.copy()
        values[place:] = bad
        with pytest.raises(CodecError, match=rf"expected a finite value, got element {place}={bad}"):
            codec.encode(values, 0, KEY, measured)


@every_codec
def test_values_of_another_kind_are_refused(spec: CodecSpec) -> None:
    codec, measured = build(spec), scales_of(build(spec), gaussian(D))
    with pytest.raises(CodecError, match=r"expected float32 of shape \(n,\), got values=float64"):
        codec.encode(gaussian(D).astype(np.float64), 0, KEY, measured)
    with pytest.raises(CodecError, match=r"expected contiguous values, got strides=\(8,\)"):
        codec.encode(gaussian(2 * D)[::2], 0, KEY, measured)
    with pytest.raises(CodecError, match="expected a bucket"):
        codec.encode(gaussian(D), codec.alignment, KEY, measured)


@every_codec
def test_zeros_are_exact_and_input_is_not_changed(spec: CodecSpec) -> None:
    codec = build(spec)
    for zero in (0.0, -0.0):
        (encoded,) = encode(codec, np.full(D, zero, np.float32))
        out = np.full(D, -0.0, np.float32)
        codec.decode(encoded, 0, out, add=False, key=KEY)
        assert not out.any()
        if spec.name not in ("topk", "rotated"):  # which send some elements as they are
            assert not np.signbit(out).any()
    values = gaussian(D)
    encode(codec, values)
    assert np.array_equal(values, gaussian(D))


@every_codec
def test_a_codec_says_what_it_needs(spec: CodecSpec) -> None:
    codec = build(spec)
    assert codec.biased is (spec.name in ("sign", "topk"))
    assert codec.needs_shared_scales is (spec.name == "shared")
    assert not codec.needs_whole_vector
    assert not make_sum_codec(CodecSpec(name="shared"), 3).needs_shared_scales


GOLDEN = {
    "sign/64": "bc47c19fc842a891",
    "sign/5000": "5c3230f35df1b2b1",
    "topk/1:32/64": "b0a854aacaeb0eba",
    "topk/1:10/1000": "4761bfdda0357085",
    "topk/1:1/8": "b07060d00fdcd3a6",
    "shared/2/64": "6bcdf4519115ece0",
    "shared/3/64": "3d926a2fab537c97",
    "shared/4/64": "7b3be0272a593a18",
    "shared/8/64": "cb3b2e95f4fa3d9f",
}
"""SHA-256, first 16 digits, of scales and payload of `exact_vector(10_007)`; for `rotated` see `test_rotated.py`."""


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.name != "rotated"], ids=lambda spec: spec.name)
def test_bytes_never_change(spec: CodecSpec) -> None:
    codec = build(spec, 10_007)
    (encoded,) = encode(codec, exact_vector(10_007))
    digest = hashlib.sha256(b"".join(bytes_of(encoded))).hexdigest()[:16]
    assert digest == GOLDEN[codec.wire_name]


@pytest.mark.parametrize("spec", [SPECS[1], SPECS[-2]])
def test_random_codecs_follow_the_key_and_others_do_not(spec: CodecSpec) -> None:
    codec, values = build(spec), gaussian(D)
    (encoded,) = encode(codec, values)
    for key in (replace(KEY, seed=8), replace(KEY, round=4), replace(KEY, source=2)):
        other = codec.encode(values, 0, key, scales_of(codec, values))
        assert bytes(other.payload) != bytes(encoded.payload)
    again = codec.encode(values.copy(), 0, RandomKey(seed=7, round=3, source=1), scales_of(codec, values))
    assert bytes_of(again) == bytes_of(encoded)
