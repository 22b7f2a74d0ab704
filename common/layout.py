"""Layout: tensors -> flat vectors -> shards -> buckets, and a digest of it.

A model's parameters form the flat gradient vector of d elements, in the order in which backward finishes them; its
floating-point buffers and the round's metrics form the state vector of e elements, which is averaged uncompressed.
Buckets are numbered in the order in which they are pushed: the gradient's from its start, then the state's. They are
cut evenly, on multiples of the codec's alignment, so that no quantizer block is split, and dealt to the S shards like
cards: shards balance by bytes whatever the sizes of the layers, and all of them have work as soon as backward starts.
Where the average's scales span a shard (`needs_whole_vector`), each shard is one contiguous piece instead.

Server and workers plan the layout from the same tensors and the same job spec; equal digests mean equal layouts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from common.codecs import Codec, make_codec, make_sum_codec
from common.config import CodecName, CodecSpec, ExchangeSpec, JobSpec, Topology
from common.errors import SpecError, refusal

MAXIMAL_ELEMENTS = 1 << 32
"""Elements of one flat vector; the codecs' randomness is indexed with 32 bits."""

UNCOMPRESSED = CodecSpec(name=CodecName.NONE)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor of the model: a parameter, or a buffer that is averaged over the workers."""

    name: str
    shape: tuple[int, ...]
    buffer: bool

    @property
    def elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class BucketKind(StrEnum):
    """Which flat vector a bucket is cut from; the scales are those of the gradient's blocks, one for all workers."""

    GRADIENT = "gradient"
    STATE = "state"
    SCALES = "scales"


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A contiguous run of one flat vector that travels as one message.

    Attributes:
        number: 0 ... B-1 over all shards.
        shard: the shard that aggregates it.
        kind: the vector it is cut from.
        start: its first element in that vector.
        n: its number of elements, at least 1.
    """

    number: int
    shard: int
    kind: BucketKind
    start: int
    n: int

    @property
    def stop(self) -> int:
        """One past its last element."""
        return self.start + self.n


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the vectors of one model are cut.

    Attributes:
        tensors: the model's tensors, parameters and buffers, in order.
        d: elements of the gradient vector.
        e: elements of the state vector.
        layer_edges: 0, the ends of the parameters in the gradient vector, the last being d.
        buckets: by number.
        shards: S.
        dealt: True if the gradient's buckets are dealt to the shards in turn, False if each shard is one piece.
    """

    tensors: tuple[TensorSpec, ...]
    d: int
    e: int
    layer_edges: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    shards: int
    dealt: bool

    def of_shard(self, shard: int) -> tuple[Bucket, ...]:
        """The buckets that one shard aggregates."""
        return tuple(bucket for bucket in self.buckets if bucket.shard == shard)

    def of_kind(self, kind: BucketKind) -> tuple[Bucket, ...]:
        """The buckets of one vector, in order."""
        return tuple(bucket for bucket in self.buckets if bucket.kind is kind)

    def scales_of(self, bucket: Bucket) -> Bucket:
        """The bucket of the scales of a gradient bucket; or the gradient bucket of a bucket of scales."""
        gradient, scales = self.of_kind(BucketKind.GRADIENT), self.of_kind(BucketKind.SCALES)
        if bucket.kind is BucketKind.SCALES:
            return gradient[bucket.number - scales[0].number]
        return scales[bucket.number]

    def encoder_range(self, shard: int) -> tuple[int, int]:
        """The part of the gradient vector that the encoder of one shard's averages is made for: [start, stop)."""
        if self.dealt:
            return 0, self.d
        own = [bucket for bucket in self.of_shard(shard) if bucket.kind is BucketKind.GRADIENT]
        return own[0].start, own[-1].stop

    def layer_at(self, index: int) -> str:
        """Name of the parameter that holds element `index` of the gradient vector."""
        offset = 0
        for tensor in self.tensors:
            if not tensor.buffer:
                offset += tensor.elements
                if index < offset:
                    return tensor.name
        raise IndexError(refusal(f"an index below d={self.d}", "index", index))

    def digest(self) -> bytes:
        """SHA-256 over tensors and cuts."""
        content = [
            [[t.name, list(t.shape), t.buffer] for t in self.tensors],
            [[b.shard, b.kind.value, b.start, b.n] for b in self.buckets],
        ]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).digest()


def plan_layout(tensors: Sequence[TensorSpec], spec: JobSpec) -> Layout:
    """Cuts the vectors of `tensors` for the codec, bucket size and topology of a job.

    Raises:
        SpecError: no parameters, two tensors of one name, too many elements, or more shards than the gradient vector
            can be cut into.
    """
    counts = Counter(tensor.name for tensor in tensors)
    if len(counts) != len(tensors):
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise SpecError(refusal("distinct tensor names", "tensors", twice[:5]))
    edges = [0]
    for tensor in tensors:
        if not tensor.buffer:
            edges.append(edges[-1] + tensor.elements)
    d, e = edges[-1], sum(tensor.elements for tensor in tensors if tensor.buffer)
    if not 1 <= d <= MAXIMAL_ELEMENTS or e > MAXIMAL_ELEMENTS:
        name, count = ("parameters", d) if not 1 <= d <= MAXIMAL_ELEMENTS else ("buffer elements", e)
        raise SpecError(refusal(f"1 to {MAXIMAL_ELEMENTS} {name}", name, count, "model"))
    push = make_codec(spec.codec, start=0, stop=d, layer_edges=edges)
    unit = push.alignment
    if math.ceil(d / unit) < spec.shards:
        rule = f"servers of at most {math.ceil(d / unit)} ({d} parameters in units of {unit})"
        raise SpecError(refusal(rule, "servers", spec.shards))
    dealt = not _pull_codec(spec, 0, d, edges).needs_whole_vector
    cuts = _dealt(d, edges, spec) if dealt else _contiguous(d, edges, spec)
    pieces = [(BucketKind.GRADIENT, *cut) for cut in cuts]
    pieces += [(BucketKind.STATE, *cut) for cut in _state_cuts(e, spec)]
    if push.needs_shared_scales:
        pieces += [(BucketKind.SCALES, *cut) for cut in _scale_cuts(cuts, spec)]
    return Layout(
        tensors=tuple(tensors),
        d=d,
        e=e,
        layer_edges=tuple(edges),
        buckets=tuple(
            Bucket(number=number, kind=kind, shard=shard, start=start, n=stop - start)
            for number, (kind, shard, start, stop) in enumerate(pieces)
        ),
        shards=spec.shards,
        dealt=dealt,
    )


def bucket_bytes_of(exchange: ExchangeSpec) -> int:
    """`bucket_bytes`, or what it is where absent: shards at every node make many streams of few buckets each."""
    if exchange.bucket_bytes is not None:
        return exchange.bucket_bytes
    return 1 << 20 if exchange.topology is Topology.COLOCATED else 512 << 10


def push_codec(layout: Layout, spec: JobSpec) -> Codec:
    """The codec of the workers' contributions: one worker sees the whole gradient vector."""
    return make_codec(spec.codec, start=0, stop=layout.d, layer_edges=layout.layer_edges)


def pull_codec(layout: Layout, spec: JobSpec, shard: int) -> Codec:
    """The codec of one shard's averages: float32 unless the job is two-sided."""
    return _pull_codec(spec, *layout.encoder_range(shard), layout.layer_edges)


def state_codec(layout: Layout) -> Codec:
    """The codec of the state vector, in both directions: float32."""
    return make_codec(UNCOMPRESSED, start=0, stop=layout.e, layer_edges=(0, layout.e))


def _pull_codec(spec: JobSpec, start: int, stop: int, layer_edges: Sequence[int]) -> Codec:
    if spec.codec.name is CodecName.SHARED:
        return make_sum_codec(spec.codec, spec.workers)
    pull = spec.codec if spec.codec.two_sided else UNCOMPRESSED
    return make_codec(pull, start=start, stop=stop, layer_edges=layer_edges)


_Cut = tuple[int, int, int]
"""Shard, start, stop."""


def _dealt(d: int, layer_edges: Sequence[int], spec: JobSpec) -> list[_Cut]:
    """Even buckets, as many for each shard, dealt in turn."""
    codecs = (make_codec(spec.codec, start=0, stop=d, layer_edges=layer_edges), _pull_codec(spec, 0, d, layer_edges))
    edges = _cuts_within(0, d, codecs, bucket_bytes_of(spec.exchange), spec.shards)
    return [(number % spec.shards, *cut) for number, cut in enumerate(itertools.pairwise(edges))]


def _contiguous(d: int, layer_edges: Sequence[int], spec: JobSpec) -> list[_Cut]:
    """Each shard one piece, cut into buckets; the first buckets of all shards come first."""
    push = make_codec(spec.codec, start=0, stop=d, layer_edges=layer_edges)
    cuts: list[tuple[int, _Cut]] = []
    for shard, (start, stop) in enumerate(itertools.pairwise(_even_cuts(0, d, spec.shards, push.alignment))):
        pull = _pull_codec(spec, start, stop, layer_edges)
        inner = itertools.pairwise(_cuts_within(start, stop, (push, pull), bucket_bytes_of(spec.exchange), 1))
        cuts += [(place, (shard, *cut)) for place, cut in enumerate(inner)]
    return [cut for _, cut in sorted(cuts)]


def _state_cuts(e: int, spec: JobSpec) -> list[_Cut]:
    codec = make_codec(UNCOMPRESSED, start=0, stop=e, layer_edges=(0, e))
    edges = _cuts_within(0, e, (codec,), bucket_bytes_of(spec.exchange), min(spec.shards, max(e, 1)))
    return [(number % spec.shards, *cut) for number, cut in enumerate(itertools.pairwise(edges))]


def _scale_cuts(gradient: Sequence[_Cut], spec: JobSpec) -> list[_Cut]:
    """One bucket of scales for each of the gradient's, at the same shard; counted in blocks."""
    block = spec.codec.block
    assert isinstance(block, int)
    return [(shard, start // block, -(-stop // block)) for shard, start, stop in gradient]


def _cuts_within(start: int, stop: int, codecs: Sequence[Codec], bucket_bytes: int, multiple: int) -> tuple[int, ...]:
    """Even cuts into as few parts as keep all of a part's scales and payload, by each codec, within `bucket_bytes`.

    The number of parts is a multiple of `multiple` where there are that many alignment units. A part of one unit may
    exceed `bucket_bytes`. `start` must be a multiple of the unit, which is the first codec's.
    """
    unit = codecs[0].alignment
    units, parts = math.ceil((stop - start) / unit), multiple
    if not units:
        return ()
    while True:
        parts = min(units, math.ceil(parts / multiple) * multiple)
        cuts = _even_cuts(start, stop, parts, unit)
        largest = max(codec.wire_bytes(a, b - a) for codec in codecs for a, b in itertools.pairwise(cuts))
        if largest <= bucket_bytes or parts == units:
            return cuts
        parts = max(parts + 1, math.ceil(parts * largest / bucket_bytes))


def _even_cuts(start: int, stop: int, parts: int, unit: int) -> tuple[int, ...]:
    """`parts` + 1 edges from start to stop, inner ones on multiples of `unit`, part sizes within one unit of equal.

    `start` must be a multiple of `unit`.
    """
    units = math.ceil((stop - start) / unit)
    return tuple(min(stop, start + unit * (units * part // parts)) for part in range(parts + 1))
