"""The layout: both vectors are cut into shards and buckets without gap or overlap, evenly, within the message limit."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from common.codecs import Codec, Encoded, Float32, RandomKey
from common.config import MAXIMAL_BLOCK, BlockName, CodecName, CodecSpec, ExchangeSpec, JobSpec, ScaleNorm, Topology
from common.errors import SpecError
from common.layout import (
    MAXIMAL_ELEMENTS,
    Bucket,
    BucketKind,
    Layout,
    TensorSpec,
    plan_layout,
    pull_codec,
    push_codec,
    state_codec,
)
from common.wire.v1 import ps_pb2 as wire

RECEIVE_LIMIT = 4 << 20
FRAMING = 256
"""Bytes of a message beside scales and payload, and more; see `test_fields_beside_the_content_fit_the_framing`."""
LARGEST_BUCKET = (4 << 20) - (1 << 16)


def parameter(*shape: int, name: str = "p") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, buffer=False)


def buffer(*shape: int, name: str = "b") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, buffer=True)


def job(*, servers: int = 1, bucket_bytes: int = 1 << 20, **codec: object) -> JobSpec:
    spec = CodecSpec.model_validate(codec)
    return JobSpec(servers=servers, codec=spec, exchange=ExchangeSpec(bucket_bytes=bucket_bytes))


def alignment_of(layout: Layout, spec: JobSpec) -> int:
    return push_codec(layout, spec).alignment


codecs = st.one_of(
    st.builds(
        CodecSpec,
        name=st.sampled_from([CodecName.NONE, CodecName.FP16, CodecName.BF16, CodecName.PAPER]),
        bits=st.sampled_from([2, 8, 16]),
        two_sided=st.booleans(),
    ),
    st.builds(
        CodecSpec,
        bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8, 16]),
        block=st.sampled_from([8, 40, 512, 4096, MAXIMAL_BLOCK, BlockName.LAYER, BlockName.ALL]),
        scale=st.sampled_from(ScaleNorm),
        two_sided=st.booleans(),
    ),
)
bucket_sizes = st.one_of(st.sampled_from([1 << 10, 1 << 20, LARGEST_BUCKET]), st.integers(1 << 10, LARGEST_BUCKET))


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors of a few to tens of millions of elements, scalars and empty ones among them."""
    sides = st.one_of(st.integers(0, 9), st.integers(10, 3000))
    shapes = draw(st.lists(st.lists(sides, max_size=2).map(tuple), max_size=12))
    tensors = [TensorSpec(name=f"t{i}", shape=shape, buffer=draw(st.booleans())) for i, shape in enumerate(shapes)]
    huge = draw(st.sampled_from([0, 0, 1, 30_000_001]))
    return [*tensors, parameter(huge, name="huge")] if huge else [*tensors, parameter(draw(st.integers(1, 20)))]


@st.composite
def jobs(draw: st.DrawFn, servers: st.SearchStrategy[int] = st.integers(1, 9)) -> JobSpec:  # noqa: B008
    bucket_bytes = draw(bucket_sizes)
    return JobSpec(servers=draw(servers), codec=draw(codecs), exchange=ExchangeSpec(bucket_bytes=bucket_bytes))


@st.composite
def plans(draw: st.DrawFn) -> tuple[Layout, JobSpec]:
    """Layouts of at most a few thousand buckets."""
    tensors, spec = draw(tensor_lists()), draw(jobs())
    assume(few_buckets(tensors, spec))
    try:
        return plan_layout(tensors, spec), spec
    except SpecError:  # more servers than units: see `test_more_servers_than_units_are_refused_naming_both`
        assume(False)
        raise


def few_buckets(tensors: list[TensorSpec], spec: JobSpec) -> bool:
    return sum(tensor.elements for tensor in tensors) * 4 < 2000 * spec.exchange.bucket_bytes


# Cuts; what holds for every layout is put to the test by `test_every_layout_keeps_all_of_this`


def buckets_tile_both_vectors_and_lie_in_the_right_shard(layout: Layout, spec: JobSpec) -> None:
    assert layout.d == sum(tensor.elements for tensor in layout.tensors if not tensor.buffer)
    assert layout.e == sum(tensor.elements for tensor in layout.tensors if tensor.buffer)
    assert [bucket.number for bucket in layout.buckets] == list(range(len(layout.buckets)))
    assert all(bucket.n >= 1 for bucket in layout.buckets)
    assert {bucket.shard for bucket in layout.of_kind(BucketKind.GRADIENT)} == set(range(spec.servers))
    for kind, length in ((BucketKind.GRADIENT, layout.d), (BucketKind.STATE, layout.e)):
        edges = sorted((bucket.start, bucket.stop) for bucket in layout.of_kind(kind))
        assert edges[0][0] == 0 if edges else length == 0
        assert all(left[1] == right[0] for left, right in pairwise(edges))
        assert not edges or edges[-1][1] == length
    for bucket in layout.of_kind(BucketKind.GRADIENT):
        low, high = layout.encoder_range(bucket.shard)
        assert low <= bucket.start < bucket.stop <= high


def shards_take_turns_unless_the_scales_of_an_average_span_them(layout: Layout, spec: JobSpec) -> None:
    gradient = layout.of_kind(BucketKind.GRADIENT)
    assert layout.dealt is not pull_codec(layout, spec, 0).needs_whole_vector
    if layout.dealt:
        assert [bucket.shard for bucket in gradient] == [number % spec.servers for number in range(len(gradient))]
    else:
        by_place = sorted(gradient, key=lambda bucket: bucket.start)
        assert [bucket.shard for bucket in by_place] == sorted(bucket.shard for bucket in gradient)
    assert [bucket.shard for bucket in gradient[: spec.servers]] == list(range(spec.servers))


def inner_cuts_fall_on_multiples_of_the_alignment(layout: Layout, spec: JobSpec) -> None:
    unit = alignment_of(layout, spec)
    assert pull_codec(layout, spec, 0).alignment in (1, unit)
    gradient = [bucket for bucket in layout.buckets if bucket.kind is BucketKind.GRADIENT]
    assert all(bucket.start % unit == 0 for bucket in gradient)


def shards_differ_by_at_most_one_alignment_unit_per_bucket(layout: Layout, spec: JobSpec) -> None:
    """Buckets of one vector differ by a unit at most; every shard has as many of them, if there are enough units."""
    for kind, unit in ((BucketKind.GRADIENT, alignment_of(layout, spec)), (BucketKind.STATE, 1)):
        of_shard = [[b.n for b in layout.of_shard(shard) if b.kind is kind] for shard in range(spec.servers)]
        counts, sizes = [len(each) for each in of_shard], [sum(each) for each in of_shard]
        as_small_as_can_be = all(n <= unit for each in of_shard for n in each)
        assert max(counts) - min(counts) <= (1 if as_small_as_can_be or not layout.dealt else 0)
        assert max(sizes) - min(sizes) <= unit * max(counts)


def test_one_huge_layer_is_cut_inside_and_balances() -> None:
    spec = job(servers=4, bits=8, two_sided=True)
    layout = plan_layout([parameter(3, name="a"), parameter(4096, 25088, name="fc"), parameter(10, name="z")], spec)
    sizes = [sum(bucket.n for bucket in layout.of_shard(shard)) for shard in range(4)]
    assert max(sizes) - min(sizes) <= 25 * 512
    assert {len(layout.of_shard(shard)) for shard in range(4)} == {25}


def test_buckets_of_a_shard_are_of_nearly_equal_size() -> None:
    layout = plan_layout([parameter(10_000)], job(bits=8, block=8, two_sided=True, bucket_bytes=4096))
    sizes = [bucket.n for bucket in layout.buckets]
    assert len(sizes) > 2
    assert max(sizes) - min(sizes) <= 8


# The size of messages


def content_bytes(layout: Layout, spec: JobSpec, bucket: Bucket) -> tuple[int, int]:
    """Scales and payload of a bucket in the two directions."""
    if bucket.kind is BucketKind.STATE:
        codec: Codec = state_codec(layout)
        return codec.wire_bytes(bucket.start, bucket.n), codec.wire_bytes(bucket.start, bucket.n)
    push, pull = push_codec(layout, spec), pull_codec(layout, spec, bucket.shard)
    return push.wire_bytes(bucket.start, bucket.n), pull.wire_bytes(bucket.start, bucket.n)


def holds_one_unit(layout: Layout, spec: JobSpec, bucket: Bucket) -> bool:
    return bucket.kind is BucketKind.GRADIENT and bucket.n <= alignment_of(layout, spec)


def planned(tensors: list[TensorSpec], spec: JobSpec) -> tuple[Layout, JobSpec]:
    return plan_layout(tensors, spec), spec


MANY_SMALL_LAYERS = [parameter(2_000_000, name="big"), *(parameter(1, name=f"bias{i}") for i in range(3000))]


def no_message_exceeds_bucket_bytes_unless_it_holds_one_unit(layout: Layout, spec: JobSpec) -> None:
    for bucket in layout.buckets:
        largest = max(content_bytes(layout, spec, bucket))
        assert largest + FRAMING < RECEIVE_LIMIT
        assert largest <= spec.exchange.bucket_bytes or holds_one_unit(layout, spec, bucket)


@given(plans())
@settings(max_examples=200, deadline=None)
@example(planned([parameter(40_000_000)], job(bits=2, block=8, two_sided=True, bucket_bytes=LARGEST_BUCKET)))
@example(planned([parameter(40_000_000)], job(bits=2, block=512, two_sided=True, bucket_bytes=LARGEST_BUCKET)))
@example(planned([parameter(5_000_000)], job(bits=16, block=MAXIMAL_BLOCK, bucket_bytes=1024)))
@example(planned(MANY_SMALL_LAYERS, job(bits=2, block="layer", two_sided=True, bucket_bytes=1 << 14)))
def test_every_layout_keeps_all_of_this(plan: tuple[Layout, JobSpec]) -> None:
    buckets_tile_both_vectors_and_lie_in_the_right_shard(*plan)
    shards_take_turns_unless_the_scales_of_an_average_span_them(*plan)
    inner_cuts_fall_on_multiples_of_the_alignment(*plan)
    shards_differ_by_at_most_one_alignment_unit_per_bucket(*plan)
    no_message_exceeds_bucket_bytes_unless_it_holds_one_unit(*plan)


def test_buckets_are_no_smaller_than_they_need_to_be() -> None:
    """8 bits in blocks of 512 need 516 bytes a block: 2032 blocks a MiB, 4 MiB of elements in five messages."""
    layout = plan_layout([parameter(4 << 20)], job(bits=8, two_sided=True))
    assert len(layout.buckets) == 5
    assert len(plan_layout([parameter(2032 * 512)], job(bits=8, two_sided=True)).buckets) == 1


@pytest.mark.parametrize(("topology", "most_bytes"), [("dedicated", 512 << 10), ("colocated", 1 << 20)])
def test_where_nothing_is_said_buckets_of_shards_at_every_node_are_twice_as_large(
    topology: str, most_bytes: int
) -> None:
    exchange = ExchangeSpec(topology=Topology(topology))
    spec = JobSpec(workers=6, exchange=exchange, codec=CodecSpec(bits=8, two_sided=True))
    layout = plan_layout([parameter(25_000_000)], spec)
    largest = max(max(content_bytes(layout, spec, bucket)) for bucket in layout.buckets)
    assert most_bytes * 3 / 4 < largest <= most_bytes


def test_wider_direction_decides_the_size_of_a_bucket() -> None:
    one_sided = plan_layout([parameter(1 << 20)], job(bits=8))
    both_sides = plan_layout([parameter(1 << 20)], job(bits=8, two_sided=True))
    assert len(one_sided.buckets) == 4
    assert len(both_sides.buckets) == 2


def test_fields_beside_the_content_fit_the_framing() -> None:
    name = push_codec(plan_layout([parameter(8)], job()), job(bits=16, block=MAXIMAL_BLOCK)).wire_name
    numbers = {"view": (1 << 64) - 1, "round": (1 << 64) - 1, "bucket": (1 << 32) - 1, "incarnation": (1 << 64) - 1}
    content = {"codec": name, "scales": b"", "payload": b""}
    contribution = wire.Contribution(parameter_digest=bytes(16), **numbers, **content)  # type: ignore[arg-type]
    average = wire.Average(**numbers, **content)  # type: ignore[arg-type]
    lengths = 2 * (1 + 4) + 4  # of scales, payload and the outer message, which grow with their content
    for message in (wire.WorkerMessage(contribution=contribution), wire.ServerMessage(average=average)):
        assert message.ByteSize() + lengths < FRAMING


# Refusals


@given(tensor_lists(), jobs(st.integers(1, 256)))
@settings(max_examples=100, deadline=None)
def test_more_servers_than_units_are_refused_naming_both(tensors: list[TensorSpec], spec: JobSpec) -> None:
    assume(few_buckets(tensors, spec))
    one = spec.model_copy(update={"servers": 1})
    layout = plan_layout(tensors, one)
    unit = alignment_of(layout, spec)
    units = math.ceil(layout.d / unit)
    if spec.servers <= units:
        assert plan_layout(tensors, spec).shards == spec.servers
        return
    with pytest.raises(SpecError) as caught:
        plan_layout(tensors, spec)
    rule = f"servers of at most {units} ({layout.d} parameters in units of {unit})"
    assert str(caught.value) == f"expected {rule}, got servers={spec.servers}"


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(SpecError, match=r"expected distinct tensor names, got tensors=\['p'\]"):
        plan_layout([parameter(3), parameter(4), buffer(4)], JobSpec())


@pytest.mark.parametrize("tensors", [[], [buffer(4)], [parameter(0)], [parameter(1 << 17, (1 << 15) + 1)]])
def test_too_few_or_too_many_parameters_are_refused(tensors: list[TensorSpec]) -> None:
    d = sum(tensor.elements for tensor in tensors if not tensor.buffer)
    with pytest.raises(SpecError, match=rf"expected 1 to {MAXIMAL_ELEMENTS} parameters, got parameters={d} \(model\)"):
        plan_layout(tensors, JobSpec())


# The digest

TENSORS = (parameter(40, 100, name="w"), parameter(100, name="v"), buffer(7, name="mean"), buffer(name="count"))
SPEC = job(servers=2, bucket_bytes=2048, block=8)


def digest(*tensors: TensorSpec, spec: JobSpec = SPEC) -> bytes:
    return plan_layout(tensors or TENSORS, spec).digest()


def test_equal_tensors_and_job_give_the_equal_digest() -> None:
    assert digest() == digest(*TENSORS)
    assert digest() == digest(spec=SPEC.model_copy(update={"seed": 5}))
    assert len(digest()) == 32


@pytest.mark.parametrize(
    "tensors",
    [
        (parameter(100, 40, name="w"), *TENSORS[1:]),
        (parameter(4000, name="w"), *TENSORS[1:]),
        (parameter(40, 100, name="u"), *TENSORS[1:]),
        (TENSORS[1], TENSORS[0], *TENSORS[2:]),
        (*TENSORS[:2], TENSORS[3], TENSORS[2]),
        (TENSORS[2], TENSORS[0], TENSORS[1], TENSORS[3]),
        (*TENSORS[:2], buffer(8, name="mean"), TENSORS[3]),
        (*TENSORS[:2], parameter(7, name="mean"), TENSORS[3]),
        TENSORS[:3],
    ],
    ids=["shape", "flattened", "name", "order", "buffers", "across", "length", "kind", "fewer"],
)
def test_digest_differs_with_the_tensors(tensors: tuple[TensorSpec, ...]) -> None:
    assert digest(*tensors) != digest()


def test_digest_tells_parameters_from_buffers_of_the_same_shape() -> None:
    one, other = (parameter(8, name="a"), buffer(8, name="b")), (buffer(8, name="a"), parameter(8, name="b"))
    assert digest(*one, spec=JobSpec()) != digest(*other, spec=JobSpec())


@pytest.mark.parametrize(
    "other",
    [
        job(servers=3, bucket_bytes=2048, block=8),
        job(servers=2, bucket_bytes=1024, block=8),
        job(servers=2, bucket_bytes=2048, block=8, two_sided=True),
        job(servers=2, bucket_bytes=2048, block=512),
    ],
    ids=["servers", "bucket_bytes", "two_sided", "block"],
)
def test_digest_differs_with_the_cuts(other: JobSpec) -> None:
    assert digest(spec=other) != digest()


@given(plans(), jobs())
@settings(max_examples=60, deadline=None)
def test_digests_are_equal_exactly_if_the_buckets_are(plan: tuple[Layout, JobSpec], other: JobSpec) -> None:
    layout, spec = plan
    assume(few_buckets(list(layout.tensors), other))
    second = plan_layout(layout.tensors, other.model_copy(update={"servers": 1}))
    assert (layout.digest() == second.digest()) == (layout.buckets == second.buckets)
    assert plan_layout(layout.tensors, spec).digest() == layout.digest()


def test_layer_at_names_the_parameter_of_an_element() -> None:
    layout = plan_layout(
        [parameter(2, name="a"), buffer(5), parameter(0, name="none"), parameter(3, name="c")], JobSpec()
    )
    assert [layout.layer_at(index) for index in range(5)] == ["a", "a", "c", "c", "c"]
    with pytest.raises(IndexError, match="expected an index below d=5, got index=5"):
        layout.layer_at(5)


# Bytes do not depend on the cuts

KEY = RandomKey(seed=11, round=2, source=3)


def travelled(layout: Layout, codec: Codec, vector: Float32) -> tuple[Float32, list[Encoded]]:
    """Encodes the whole vector bucket by bucket and decodes it."""
    measured = codec.measure(vector, 0) if codec.needs_whole_vector else None
    out, sent = np.full_like(vector, np.nan), []
    for bucket in layout.buckets:
        encoded = codec.encode(vector[bucket.start : bucket.stop], bucket.start, KEY, measured)
        codec.check(encoded, bucket.start, bucket.n)
        assert encoded.scales.nbytes + len(encoded.payload) == codec.wire_bytes(bucket.start, bucket.n)
        codec.decode(encoded, bucket.start, out[bucket.start : bucket.stop], add=False)
        sent.append(encoded)
    return out, sent


CUT_CODECS = [
    {"name": "none"},
    {"name": "fp16"},
    {"name": "bf16"},
    {"name": "paper", "bits": 3},
    {"name": "paper", "bits": 8},
    *({"bits": bits, "block": 8} for bits in (2, 5, 16)),
    {"bits": 8, "block": 64, "scale": "l2"},
    {"bits": 4, "block": "layer"},
    {"bits": 7, "block": "all", "scale": "l2"},
]


@pytest.mark.parametrize("codec", CUT_CODECS, ids=lambda codec: "-".join(map(str, codec.values())))
@given(
    lengths=st.lists(st.integers(1, 900), min_size=1, max_size=5),
    servers=st.integers(1, 5),
    bucket_bytes=st.integers(1 << 10, 1 << 12),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=12, deadline=None)
def test_decoded_vector_does_not_depend_on_buckets_and_servers(
    codec: dict[str, object], lengths: list[int], servers: int, bucket_bytes: int, seed: int
) -> None:
    tensors = [parameter(length, name=f"p{i}") for i, length in enumerate(lengths)]
    whole_spec, cut_spec = job(**codec), job(servers=servers, bucket_bytes=bucket_bytes, **codec)  # type: ignore[arg-type]
    whole = plan_layout(tensors, whole_spec)
    assume(servers <= math.ceil(whole.d / alignment_of(whole, whole_spec)))
    cut = plan_layout(tensors, cut_spec)
    assert len(whole.buckets) == 1
    vector = np.random.default_rng(seed).standard_normal(whole.d).astype(np.float32)
    expected, (at_once,) = travelled(whole, push_codec(whole, whole_spec), vector)
    decoded, sent = travelled(cut, push_codec(cut, cut_spec), vector)
    assert decoded.tobytes() == expected.tobytes()
    if codec.get("block") in (8, 64):  # then scales and bytes, too, are the same ones cut up
        assert b"".join(bytes(encoded.payload) for encoded in sent) == bytes(at_once.payload)
        assert np.concatenate([encoded.scales for encoded in sent]).tobytes() == at_once.scales.tobytes()


@pytest.mark.parametrize("codec", CUT_CODECS[5:9], ids=lambda codec: "-".join(map(str, codec.values())))
def test_average_does_not_depend_on_the_number_of_servers(codec: dict[str, object]) -> None:
    """True of blocks of a fixed length; `layer` and `all` end where a shard does."""
    specs = [job(servers=servers, two_sided=True, **codec) for servers in (1, 2, 3)]  # type: ignore[arg-type]
    layouts = [plan_layout([parameter(1003)], spec) for spec in specs]
    vector = np.random.default_rng(5).standard_normal(1003).astype(np.float32)
    decoded = []
    for layout, spec in zip(layouts, specs, strict=True):
        out = np.empty_like(vector)
        for bucket in layout.buckets:
            pull = pull_codec(layout, spec, bucket.shard)
            encoded = pull.encode(vector[bucket.start : bucket.stop], bucket.start, KEY)
            pull.decode(encoded, bucket.start, out[bucket.start : bucket.stop], add=False)
        decoded.append(out.tobytes())
    assert decoded[0] == decoded[1] == decoded[2]
