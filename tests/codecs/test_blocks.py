"""Which blocks a bucket overlaps, how scales are measured, and what the factory builds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.codecs import make_codec
from common.codecs.blocks import Blocks, EdgedBlocks, FixedBlocks
from common.codecs.cpu.scales import block_end
from common.codecs.scales import block_scales
from common.config import CodecSpec, ScaleNorm
from common.errors import CodecError
from tests.codecs import reference
from tests.codecs.numpy_reference.scales import level_factors, sums_of_squares
from tests.codecs.table import KEY, gaussian


def ends_of(blocks: Blocks, start: int, n: int) -> list[int]:
    """Where the blocks of a bucket end, as kernels are told."""
    return [block_end(k, start, n, *blocks.bounds(start)) for k in range(len(blocks.numbers(start, n)))]


def test_fixed_blocks_count_from_flat_index_zero() -> None:
    blocks = FixedBlocks(start=64, stop=1000, length=32)
    assert blocks.numbers(64, 64) == range(2, 4)
    assert blocks.numbers(960, 40) == range(30, 32)
    assert ends_of(blocks, 960, 40) == [32, 40]


def test_layers_are_clipped_to_the_range_and_empty_ones_vanish() -> None:
    blocks = EdgedBlocks.of_layers(16, 90, (0, 3, 20, 20, 50, 90, 100))
    assert blocks.edges == (16, 20, 50, 90)
    assert blocks.numbers(16, 8) == range(2)
    assert blocks.numbers(24, 24) == range(1, 2)
    assert ends_of(blocks, 16, 48) == [4, 34, 48]


@given(st.data())
def test_ends_cover_each_element_once_with_its_own_block(data: st.DataObject) -> None:
    d = data.draw(st.integers(1, 400))
    edges = tuple(sorted({0, d, *data.draw(st.sets(st.integers(0, d), max_size=5))}))
    lengths = [FixedBlocks(start=0, stop=d, length=8), FixedBlocks(start=0, stop=d, length=48)]
    blocks = data.draw(st.sampled_from([*lengths, EdgedBlocks(edges=edges)]))
    start = data.draw(st.integers(0, (d - 1) // blocks.alignment)) * blocks.alignment
    ends = ends_of(blocks, start, d - start)
    assert (ends[-1], ends) == (d - start, sorted(set(ends)))
    for number, begin, end in zip(blocks.numbers(start, d - start), [0, *ends], ends, strict=False):
        for element in range(start + begin, start + end):
            if isinstance(blocks, FixedBlocks):
                assert element // blocks.length == number
            else:
                assert edges[number] <= element < edges[number + 1]
        assert end - begin <= blocks.longest(d - start)


@pytest.mark.parametrize(
    ("start", "n", "rule"),
    [
        (8, 8, "a bucket between multiples of 64"),
        (64, 65, "a bucket between multiples of 64"),
        (0, 2000, r"a bucket within \[0, 1000\)"),
    ],
)
def test_a_bucket_off_the_grid_is_refused(start: int, n: int, rule: str) -> None:
    codec = make_codec(CodecSpec(block=64), start=0, stop=1000, layer_edges=(0, 1000))
    with pytest.raises(CodecError, match=f"expected {rule}"):
        codec.encode(gaussian(n), start, KEY)
    with pytest.raises(CodecError, match=f"expected {rule}"):
        codec.wire_bytes(start, n)


def test_scales_are_measured_over_whole_blocks_only() -> None:
    codec = make_codec(CodecSpec(block="layer"), start=0, stop=100, layer_edges=(0, 30, 100))
    measured = codec.measure(gaussian(100)[30:], 30)
    assert measured is not None
    assert (measured.first_block, measured.values.tolist()) == (1, [np.abs(gaussian(100)[30:]).max()])
    with pytest.raises(CodecError, match="expected a stretch of whole blocks, got end of the stretch=32"):
        codec.measure(gaussian(100)[32:], 32)
    with pytest.raises(CodecError, match="expected scales measured ahead, got measured=None"):
        codec.encode(gaussian(100), 0, KEY)
    with pytest.raises(CodecError, match="expected scales of the blocks 0 to 1, got blocks=1 to 1"):
        codec.encode(gaussian(100), 0, KEY, measured)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 63, 64, 65, 100, 4095, 4096, 4097, 8192, 3 * 4096 + 1, 70_000])
def test_l2_scales_follow_the_defined_order_bit_for_bit(n: int) -> None:
    values = gaussian(n) * np.float32(1e-3)
    blocks = EdgedBlocks(edges=(0, n))
    assert block_scales(values, 0, blocks, ScaleNorm.L2)[0] == reference.norm(list(values), "l2")
    assert sums_of_squares(values[None])[0] == pytest.approx(math.fsum(float(x) ** 2 for x in values), rel=1e-14)


@given(
    st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=30)
)
def test_no_magnitude_exceeds_its_l2_scale(values: list[float]) -> None:
    vector = np.array(values, np.float32)
    (scale,) = block_scales(vector, 0, EdgedBlocks(edges=(0, len(vector))), ScaleNorm.L2)
    exact = math.sqrt(math.fsum(float(x) ** 2 for x in vector))
    assert np.abs(vector).max() <= scale
    assert exact * (1 - 1e-15) <= float(scale) <= exact * (1 + 2**-22) + 2**-149


@given(
    scale=st.floats(width=32, min_value=0, allow_nan=False, allow_infinity=False),
    levels=st.sampled_from([1, 3, 7, 15, 31, 63, 127, 32767, 4, 256, 65536]),
)
def test_the_scale_itself_reaches_the_highest_level(scale: float, levels: int) -> None:
    scales = np.array([scale], np.float32)
    first, second = level_factors(scales, levels)
    top = (scales * first) * second
    assert np.isfinite([first, second]).all()
    assert top[0] == 0 if scale == 0 else levels <= top[0] <= levels * (1 + 2**-22)


def test_wire_names_and_alignments() -> None:
    cases = {
        CodecSpec(name="none"): ("none", 1, False),
        CodecSpec(name="fp16"): ("fp16", 1, False),
        CodecSpec(name="bf16"): ("bf16", 1, False),
        CodecSpec(): ("randomized/8/512/linf", 512, False),
        CodecSpec(bits=3, block="layer"): ("randomized/3/layer/linf", 8, True),
        CodecSpec(bits=4, block="all", scale="l2"): ("randomized/4/all/l2", 8, True),
        CodecSpec(name="paper", bits=8): ("paper/8", 8, True),
    }
    for spec, expected in cases.items():
        codec = make_codec(spec, start=0, stop=4096, layer_edges=(0, 4096))
        found = (codec.wire_name, codec.alignment, codec.needs_whole_vector)
        assert found == expected


def test_a_vector_beyond_32_bit_indices_is_refused() -> None:
    make_codec(CodecSpec(), start=0, stop=2**32, layer_edges=(0, 2**32))
    with pytest.raises(CodecError, match=r"expected a range within \[0, 2\^32\]"):
        make_codec(CodecSpec(), start=0, stop=2**32 + 1, layer_edges=(0, 2**32 + 1))
