"""One suite for all codecs: what `base.py` promises, whatever the codec."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import SERVER, Codec, Encoded, RandomKey
from common.config import CodecSpec
from common.errors import CodecError
from tests.codecs.table import (
    FLOATS,
    KEY,
    QUANTIZERS,
    ROTATED,
    SHARED,
    SIGN,
    SPECS,
    build,
    bytes_of,
    decode,
    encode,
    gaussian,
    measured_by,
    name_of,
    round_trip,
)

D = 1003
SHARD = 2560
"""A multiple of all alignments in the table."""
every_codec = pytest.mark.parametrize("spec", SPECS, ids=name_of)
with_scales = pytest.mark.parametrize("spec", [*QUANTIZERS, *ROTATED, *SIGN], ids=name_of)
"""Not `shared` and `topk`: no scale of theirs travels with a bucket."""
floats = pytest.mark.parametrize("spec", FLOATS, ids=name_of)
with_levels = pytest.mark.parametrize("spec", [*FLOATS, *QUANTIZERS, *SHARED], ids=name_of)
"""Not `rotated`, whose error spreads over a block, nor `sign` and `topk`, which do not keep each element."""
random = pytest.mark.parametrize("spec", [*QUANTIZERS, *SHARED, *ROTATED], ids=name_of)
"""Not floats, `sign` and `topk`: they draw nothing."""


def step_bound(codec: Codec, values: np.ndarray) -> float:
    """No decoded value is further off than one level of the widest scale, or half a unit of the narrowest float."""
    if codec.wire_name in ("none", "fp16", "bf16"):
        return float(np.abs(values).max()) * {"none": 0, "fp16": 2**-11, "bf16": 2**-8}[codec.wire_name] + 2**-25
    name, bits, *_ = codec.wire_name.split("/")
    if name == "shared":
        scales = measured_by(codec, values).values
    else:
        scales = np.concatenate([bucket.scales for bucket in encode(codec, values)])
    levels = 2 ** int(bits) if name == "paper" else 2 ** (int(bits) - 1) - 1
    return float(np.abs(scales).max()) / levels * (1 + 2**-20)


@with_levels
def test_round_trip_stays_within_one_level(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(D)
    assert np.abs(round_trip(codec, values) - values).max() <= step_bound(codec, values)


@every_codec
def test_wire_bytes_are_the_bytes_sent(spec: CodecSpec) -> None:
    for d in (0, 1, 7, 8, 9, 63, 64, 65, 512, 513, 1003):
        codec = build(spec, d)
        (encoded,) = encode(codec, gaussian(d))
        assert codec.scale_count(0, d) == len(encoded.scales)
        assert codec.payload_bytes(0, d) == len(encoded.payload)
        assert codec.wire_bytes(0, d) == encoded.scales.nbytes + len(encoded.payload)


@every_codec
def test_payload_may_be_any_buffer(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(D)
    (encoded,) = encode(codec, values)
    expected = decode(codec, [encoded], D)
    for wrap in (bytes, bytearray, memoryview, lambda payload: memoryview(b"xyz" + bytes(payload))[3:]):
        assert np.array_equal(decode(codec, [replace(encoded, payload=wrap(encoded.payload))], D), expected)


@every_codec
def test_payload_is_written_where_it_shall_be_and_nowhere_else(spec: CodecSpec) -> None:
    for d in (D, 64, 7, 1, 0):
        codec, values = build(spec, d), gaussian(d)
        (expected,) = encode(codec, values)
        size = codec.payload_bytes(0, d)
        for offset in (0, 1, 3, 8):
            message = np.full(size + 20, 0xA5, np.uint8)
            payload = message[offset : offset + size]
            encoded = codec.encode(values, 0, KEY, measured_by(codec, values), payload=payload)
            assert encoded.payload is payload
            assert bytes_of(encoded) == bytes_of(expected)
            assert (message[:offset] == 0xA5).all()
            assert (message[offset + size :] == 0xA5).all()


@every_codec
def test_payload_memory_of_another_size_is_refused(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(D)
    size = codec.payload_bytes(0, D)
    for payload in (np.empty(size - 1, np.uint8), np.empty(size + 1, np.uint8), np.empty(2 * size, np.uint8)[::2]):
        with pytest.raises(CodecError, match=rf"expected writable uint8\[{size}\]"):
            codec.encode(values, 0, KEY, measured_by(codec, values), payload=payload)


@every_codec
def test_what_is_read_may_be_read_only_and_at_any_address(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(D)
    (expected,) = encode(codec, values)
    values.flags.writeable = False
    encoded = codec.encode(values, 0, KEY, measured_by(codec, values))
    assert bytes_of(encoded) == bytes_of(expected)
    scales, payload = bytes_of(encoded)
    message = b"x" + scales + payload
    received = Encoded(
        scales=np.frombuffer(message, "<f4", len(encoded.scales), 1), payload=memoryview(message)[1 + len(scales) :]
    )
    out = np.zeros(D + 1, np.float32)[1:]
    codec.check(received, 0, D)
    codec.decode(received, 0, out, add=True, key=KEY)
    assert np.array_equal(out, decode(codec, [expected], D))


@every_codec
def test_decode_refuses_a_bucket_of_another_size_even_without_check(spec: CodecSpec) -> None:
    codec = build(spec, D)
    (encoded,) = encode(codec, gaussian(D))
    out = np.zeros(D, np.float32)
    shorter = replace(encoded, payload=bytes(encoded.payload)[:-1])
    more = replace(encoded, scales=np.append(encoded.scales, np.float32(1)))
    for wrong in (shorter, more):
        with pytest.raises(CodecError, match=r"expected .* bytes, .* scales, got bucket="):
            codec.decode(wrong, 0, out, add=False, key=KEY)
    assert not out.any()


@every_codec
def test_threads_encode_and_decode_different_buckets_at_once(spec: CodecSpec) -> None:
    d = 40 * SHARD
    codec, values = build(spec, d), gaussian(d)
    cuts = range(SHARD, d, SHARD)
    expected = encode(codec, values, cuts=cuts)
    decoded = decode(codec, expected, d, cuts)
    measured, out = measured_by(codec, values), np.zeros(d, np.float32)

    def bucket(a: int) -> Encoded:
        encoded = codec.encode(values[a : a + SHARD], a, KEY, measured)
        codec.decode(encoded, a, out[a : a + SHARD], add=True, key=KEY)
        return encoded

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(bucket, (0, *cuts)))
    assert [bytes_of(encoded) for encoded in found] == [bytes_of(encoded) for encoded in expected]
    assert np.array_equal(out, decoded)


@every_codec
def test_check_refuses_a_payload_that_is_too_short_or_too_long(spec: CodecSpec) -> None:
    codec = build(spec, D)
    (encoded,) = encode(codec, gaussian(D))
    for payload in (b"", bytes(encoded.payload[:-1]), bytes(encoded.payload) + b"\0"):
        with pytest.raises(
            CodecError, match=rf"expected {len(encoded.payload)} bytes, got payload={len(payload)} bytes"
        ):
            codec.check(replace(encoded, payload=payload), 0, D)


@every_codec
def test_check_refuses_a_wrong_number_of_scales(spec: CodecSpec) -> None:
    codec = build(spec, D)
    (encoded,) = encode(codec, gaussian(D))
    longer = np.append(encoded.scales, np.float32(1))
    for scales in (longer, encoded.scales[1:] if len(encoded.scales) else longer, longer[None], longer.astype(float)):
        with pytest.raises(CodecError, match=f"expected {len(encoded.scales)} float32 scales, got scales="):
            codec.check(replace(encoded, scales=scales), 0, D)


@with_scales
def test_check_refuses_a_scale_that_is_not_finite_or_negative(spec: CodecSpec) -> None:
    codec = build(spec, D)
    (encoded,) = encode(codec, gaussian(D))
    scales = encoded.scales.copy()
    last = len(scales) - 1
    for bad in (np.nan, np.inf, -np.inf, -1.0, -0.0):
        scales[last] = bad
        if spec.name == "paper" and np.isfinite(bad):
            codec.check(replace(encoded, scales=scales), 0, D)
            continue
        with pytest.raises(CodecError, match=rf"finite scale.*scales\[{last}\]={bad}"):
            codec.check(replace(encoded, scales=scales), 0, D)


@floats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_check_refuses_a_payload_that_is_not_finite(spec: CodecSpec, bad: float) -> None:
    codec = build(spec, 2 * D)
    encoded = codec.encode(gaussian(D), D, KEY)
    words = {"none": np.float32(bad).view(np.uint32), "fp16": np.float16(bad).view(np.uint16)}
    word = words.get(spec.name, np.uint16(int(np.float32(bad).view(np.uint32)) >> 16))
    payload = bytearray(encoded.payload)
    payload[5 * word.nbytes : 6 * word.nbytes] = word.tobytes()
    with pytest.raises(CodecError, match=rf"expected a finite value, got element {D + 5}={bad}"):
        codec.check(replace(encoded, payload=payload), D, D)


@every_codec
def test_input_that_is_not_finite_is_refused_by_flat_index_and_value(spec: CodecSpec) -> None:
    codec = build(spec, 2 * SHARD + 3)
    values = gaussian(2 * SHARD + 3)
    measured = measured_by(codec, values)
    for bad in (np.nan, np.inf, -np.inf):
        values[[SHARD + 700, SHARD + 900]] = bad
        with pytest.raises(CodecError, match=rf"expected a finite value, got element {SHARD + 700}={bad}"):
            codec.encode(values[SHARD:], SHARD, KEY, measured)
        if codec.needs_whole_vector:
            with pytest.raises(CodecError, match=rf"expected a finite value, got element {SHARD + 700}={bad}"):
                codec.measure(values, 0)


@every_codec
def test_input_with_elements_apart_is_refused(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(2 * D)[::2]
    with pytest.raises(CodecError, match=r"expected contiguous values, got strides=\(8,\)"):
        codec.encode(values, 0, KEY, measured_by(codec, values.copy()))


@every_codec
def test_only_sign_and_topk_are_biased(spec: CodecSpec) -> None:
    assert build(spec, D).biased is (spec.name in ("sign", "topk"))


@every_codec
def test_input_that_is_not_float32_is_refused(spec: CodecSpec) -> None:
    with pytest.raises(CodecError, match=r"expected float32 of shape \(n,\), got values=float64\[1003\]"):
        encode(build(spec, D), gaussian(D).astype(np.float64))


@random
def test_bytes_follow_from_the_key_alone(spec: CodecSpec) -> None:
    values = gaussian(D)
    (encoded,) = encode(build(spec, D), values)
    (again,) = encode(build(spec, D), values.copy(), RandomKey(seed=KEY.seed, round=KEY.round, source=KEY.source))
    assert bytes_of(again) == bytes_of(encoded)
    for other in (replace(KEY, seed=8), replace(KEY, round=4), replace(KEY, source=2), replace(KEY, source=SERVER)):
        (different,) = encode(build(spec, D), values, other)
        assert bytes(different.payload) != bytes(encoded.payload)


@every_codec
def test_input_is_not_changed_and_not_kept(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(D)
    (encoded,) = encode(codec, values)
    assert np.array_equal(values, gaussian(D))
    before = bytes(encoded.payload)
    values[:] = 0
    assert bytes(encoded.payload) == before


@every_codec
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_cutting_into_aligned_buckets_changes_no_decoded_value(spec: CodecSpec, data: st.DataObject) -> None:
    codec, values = build(spec, D), gaussian(D)
    inner = range(codec.alignment, D, codec.alignment)
    cuts = sorted(data.draw(st.sets(st.sampled_from(inner), max_size=6))) if inner else []
    whole, buckets = encode(codec, values), encode(codec, values, cuts=cuts)
    assert np.array_equal(decode(codec, buckets, D, cuts), decode(codec, whole, D))
    if spec.name not in ("paper", "topk"):  # whose buckets have two parts
        assert b"".join(bytes(bucket.payload) for bucket in buckets) == bytes(whole[0].payload)
    for bucket, a, b in zip(buckets, (0, *cuts), (*cuts, D), strict=True):
        assert codec.wire_bytes(a, b - a) == bucket.scales.nbytes + len(bucket.payload)


@every_codec
def test_a_shard_encodes_elements_as_the_whole_vector_does(spec: CodecSpec) -> None:
    """Blocks and draws refer to the flat vector. Only l2 scales of clipped blocks differ; the linf ones are all 2."""
    values = np.clip(gaussian(2 * SHARD), -2, 2)
    codec = build(spec, 2 * SHARD)
    whole = decode(codec, encode(codec, values), 2 * SHARD)
    shard = build(spec, 2 * SHARD, start=SHARD)
    out = np.empty(SHARD, np.float32)
    encoded = shard.encode(values[SHARD:], SHARD, KEY, measured_by(shard, values[SHARD:], SHARD))
    shard.decode(encoded, SHARD, out, add=False, key=KEY)
    clipped_l2 = spec.name == "paper" or (spec.block in ("layer", "all") and spec.scale == "l2")
    assert np.array_equal(out, whole[SHARD:]) is not clipped_l2


@every_codec
def test_decode_adds_or_sets(spec: CodecSpec) -> None:
    codec, values, base = build(spec, D), gaussian(D), gaussian(D, seed=5)
    (encoded,) = encode(codec, values)
    decoded = decode(codec, [encoded], D)
    accumulator = base.copy()
    codec.decode(encoded, 0, accumulator, add=True, key=KEY)
    assert np.array_equal(accumulator, base + decoded)
    codec.decode(encoded, 0, accumulator, add=False, key=KEY)
    assert np.array_equal(accumulator.view(np.uint32), decoded.view(np.uint32))


@every_codec
def test_decode_writes_into_its_slice_only(spec: CodecSpec) -> None:
    codec, values = build(spec, D), gaussian(D)
    (encoded,) = encode(codec, values)
    out = np.full(D + 20, 9, np.float32)
    codec.decode(encoded, 0, out[10 : 10 + D], add=False, key=KEY)
    assert np.array_equal(out[10 : 10 + D], decode(codec, [encoded], D))
    assert (out[:10] == 9).all()
    assert (out[10 + D :] == 9).all()


@every_codec
def test_an_empty_bucket_takes_no_bytes(spec: CodecSpec) -> None:
    codec = build(spec, 0)
    (encoded,) = encode(codec, gaussian(0))
    assert (encoded.scales.nbytes, len(encoded.payload)) == (0, 0)
    assert decode(codec, [encoded], 0).shape == (0,)
