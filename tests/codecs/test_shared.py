"""Shared scales: integers that servers add without decoding them, and the average that follows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from common.codecs import BlockScales, Encoded, Float32, SharedCodec, make_codec, make_sum_codec
from common.codecs.blocks import FixedBlocks
from common.codecs.shared import SumCodec, average_of_sums
from common.config import CodecSpec, JobSpec
from common.errors import CodecError, SpecError
from common.spec_sources import load_job_spec
from tests.codecs.numpy_reference import shared as reference
from tests.codecs.numpy_reference.packing import pack, signed, unpack
from tests.codecs.table import KEY, VALUES, gaussian

BITS = (2, 3, 4, 5, 6, 7, 8)
every_width = pytest.mark.parametrize("bits", BITS)
LIMIT = 4.0
"""Standard errors."""


def build(stop: int, bits: int, block: int = 64) -> SharedCodec:
    return SharedCodec(start=0, stop=stop, block=block, bits=bits, wire_name=f"shared/{bits}/{block}")


def agreed(codec: SharedCodec, vectors: list[Float32]) -> BlockScales:
    """What the round of the scales gives all workers."""
    return BlockScales(first_block=0, values=np.max([codec.local_scales(values, 0) for values in vectors], axis=0))


def contributions(codec: SharedCodec, vectors: list[Float32], shared: BlockScales, round_: int = 0) -> list[Encoded]:
    keys = [replace(KEY, source=worker, round=round_) for worker in range(len(vectors))]
    return [codec.encode(values, 0, key, shared) for values, key in zip(vectors, keys, strict=True)]


def average(vectors: list[Float32], bits: int, round_: int = 0, block: int = 64) -> Float32:
    """All that workers and server do."""
    n, workers = len(vectors[0]), len(vectors)
    codec = build(n, bits, block)
    shared, total = agreed(codec, vectors), np.zeros(n, np.float32)
    for encoded in contributions(codec, vectors, shared, round_):
        codec.check(encoded, 0, n)
        codec.decode(encoded, 0, total, add=True)
    pull = make_sum_codec(CodecSpec(name="shared", bits=bits), workers)
    sums = pull.encode(total, 0, KEY)
    pull.check(sums, 0, n)
    out = np.empty(n, np.float32)
    pull.decode(sums, 0, out, add=False)
    average_of_sums(codec, out, 0, shared, workers)
    return out


def reference_fields(values: Float32, bits: int, shared: BlockScales, worker: int) -> NDArray[np.int32]:
    blocks = FixedBlocks(start=0, stop=len(values), length=64)
    return reference.fields(values, 0, replace(KEY, source=worker, round=0), blocks, bits, shared)


@every_width
@pytest.mark.parametrize("kind", VALUES)
def test_bytes_sums_and_averages_are_those_of_the_numpy_reference(kind: str, bits: int) -> None:
    n, workers, levels = 1003, 5, 2 ** (bits - 1) - 1
    vectors = [VALUES[kind](n) * np.float32(1 - 0.1 * worker) for worker in range(workers)]
    codec = build(n, bits)
    shared = agreed(codec, vectors)
    expected = [reference_fields(values, bits, shared, worker) for worker, values in enumerate(vectors)]
    for encoded, fields in zip(contributions(codec, vectors, shared), expected, strict=True):
        assert bytes(encoded.payload) == pack(fields, bits)
        assert len(encoded.payload) == codec.wire_bytes(0, n)
    unit = np.float32(1 / (workers * levels))
    wanted = (np.sum(expected, axis=0).astype(np.float32) * unit) * np.repeat(shared.values, 64)[:n]
    assert np.array_equal(average(vectors, bits), wanted)


@pytest.mark.parametrize("largest", [1, 3, 4, 7, 8, 31, 42, 63, 64, 127, 128, 762, 32767])
def test_sums_travel_in_as_few_bits_as_hold_them(largest: int) -> None:
    codec = SumCodec(largest=largest)
    bits = int(codec.wire_name.split("/")[1])
    assert codec.wire_name == f"sums/{bits}/{largest}"
    assert largest <= 2 ** (bits - 1) - 1
    assert bits in (2, 16) or largest > 2 ** (bits - 2) - 1
    rng = np.random.default_rng(largest)
    for n in (0, 1, 7, 8, 2049, 5000):
        sums = rng.integers(-largest, largest + 1, n).astype(np.float32)
        encoded = codec.encode(sums, 8, KEY)
        codec.check(encoded, 8, n)
        assert len(encoded.payload) == codec.wire_bytes(8, n)
        assert bytes(encoded.payload) == pack(sums.astype(np.int32), bits)
        for add in (False, True):
            out = np.ones(n, np.float32)
            codec.decode(encoded, 8, out, add=add)
            assert np.array_equal(out, sums + 1 if add else sums)


def test_order_of_the_contributions_does_not_matter() -> None:
    n, workers = 5000, 7
    vectors = [gaussian(n, seed=worker) for worker in range(workers)]
    codec = build(n, 4)
    encoded, totals = contributions(codec, vectors, agreed(codec, vectors)), []
    for order in (range(workers), reversed(range(workers)), [3, 1, 4, 0, 5, 2, 6]):
        totals.append(np.zeros(n, np.float32))
        for worker in order:
            codec.decode(encoded[worker], 0, totals[-1], add=True)
    assert totals[0].tobytes() == totals[1].tobytes() == totals[2].tobytes()


@every_width
def test_average_is_unbiased_within_four_standard_errors(bits: int) -> None:
    n, copies = 192, 600  # side by side: at each place in the flat vector the draws are others
    vectors = [gaussian(n, seed=worker) * np.float32(worker + 1) for worker in range(3)]
    exact = np.mean(vectors, axis=0, dtype=np.float64)
    estimates = average([np.tile(values, copies) for values in vectors], bits).reshape(copies, n).astype(np.float64)
    errors = estimates.std(axis=0) / copies**0.5 + 1e-6
    off = (estimates.mean(axis=0) - exact) / errors
    assert ((off**2).sum() - n) / (2 * n) ** 0.5 < LIMIT
    assert np.abs(off).max() < LIMIT + 1


def test_a_block_of_zeros_and_the_largest_element_are_exact() -> None:
    zeros, other = np.zeros(128, np.float32), np.zeros(128, np.float32)
    other[64:] = gaussian(64)
    place = 64 + int(np.abs(other[64:]).argmax())
    for minus in (1, -1):
        found = average([zeros * minus, other, zeros], 8)
        assert found[:64].tobytes() == np.zeros(64, np.float32).tobytes()
        assert found[place] == pytest.approx(other[place] / 3, rel=1e-6)
    same = average([other, other], 8)
    assert same[place] == pytest.approx(other[place], rel=1e-6)


# What cannot happen


@every_width
def test_the_one_field_beyond_the_levels_is_refused(bits: int) -> None:
    codec = build(3000, bits)
    values = np.zeros(3000, np.int32)
    values[2500] = -(2 ** (bits - 1))
    encoded = Encoded(scales=np.empty(0, np.float32), payload=pack(values, bits))
    with pytest.raises(CodecError, match=rf"expected integers of magnitude {codec.levels} at most, got magnitude="):
        codec.check(encoded, 0, 3000)
    values[2500] = codec.levels
    codec.check(Encoded(scales=np.empty(0, np.float32), payload=pack(values, bits)), 0, 3000)


@pytest.mark.parametrize("largest", [42, 100, 762])
def test_sums_beyond_the_largest_are_refused_both_ways(largest: int) -> None:
    codec, n = SumCodec(largest=largest), 3000
    for wrong in (largest + 1, -largest - 1, 0.5, np.nan, np.inf, 1e30):
        sums = np.zeros(n, np.float32)
        sums[2900] = wrong
        with pytest.raises(CodecError, match="element 2908="):
            codec.encode(sums, 8, KEY)
    bits = int(codec.wire_name.split("/")[1])
    fields = np.zeros(n, np.int32)
    fields[2900] = -largest - 1
    with pytest.raises(CodecError, match=rf"magnitude {largest} at most, got magnitude={largest + 1}"):
        codec.check(Encoded(scales=np.empty(0, np.float32), payload=pack(fields, bits)), 8, n)
    assert signed(unpack(pack(fields, bits), n, bits), bits)[2900] == -largest - 1


def test_scales_are_checked_before_they_are_used() -> None:
    values, codec = gaussian(128), build(128, 4)
    with pytest.raises(CodecError, match="expected scales measured ahead, got measured=None"):
        codec.encode(values, 0, KEY)
    small = BlockScales(first_block=0, values=np.array([9, 0.1], np.float32))
    with pytest.raises(CodecError, match=r"expected values within the measured scale 0\.1"):
        codec.encode(values, 0, KEY, small)
    with pytest.raises(CodecError, match="expected a finite value, got element 70=nan"):
        codec.local_scales(np.where(np.arange(128) == 70, np.nan, values).astype(np.float32), 0)
    for bad in (np.inf, np.nan, -1):
        scales = BlockScales(first_block=0, values=np.array([1, bad], np.float32))
        with pytest.raises(CodecError, match="finite scale"):
            average_of_sums(codec, np.zeros(128, np.float32), 0, scales, 3)
    plain = make_codec(CodecSpec(), start=0, stop=128, layer_edges=(0, 128))
    with pytest.raises(CodecError, match="expected codec shared, got codec=randomized/8/512/linf"):
        average_of_sums(plain, np.zeros(128, np.float32), 0, small, 3)


def test_a_job_whose_sums_could_overflow_is_refused_with_both_numbers() -> None:
    assert JobSpec(workers=258, codec=CodecSpec(name="shared", bits=8)).workers * 127 <= 32767
    with pytest.raises(SpecError, match=r"expected sums of at most 32767 .*, got sum=259 \* 127 = 32893"):
        load_job_spec(settings=["workers=259", "codec.name=shared", "codec.bits=8"])
    with pytest.raises(SpecError, match="expected another codec"):
        load_job_spec(settings=["exchange.topology=collective", "codec.name=shared"])
    with pytest.raises(CodecError, match="expected sums of at most 32767, got largest sum=32768"):
        SumCodec(largest=32768)
