"""Layout: tensors -> flat vectors -> shards -> buckets, and a digest of it.

A model's parameters form the flat gradient vector of d elements, in the model's order; its floating-point buffers and
the round's metrics form the state vector of e elements, which is averaged uncompressed. Both vectors are cut evenly
into S shards, so shards balance by bytes whatever the sizes of the layers, and each shard's part into buckets. Cuts
fall on multiples of the codec's alignment, so no quantizer block is split.

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

from common.codecs import Codec, make_codec
from common.config import CodecName, CodecSpec, JobSpec
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
    """Which flat vector a bucket is cut from."""

    GRADIENT = "gradient"
    STATE = "state"


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
        shard_edges: S + 1 cuts of the gradient vector.
        buckets: by number.
        servers: S.
    """

    tensors: tuple[TensorSpec, ...]
    d: int
    e: int
    layer_edges: tuple[int, ...]
    shard_edges: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    servers: int

    def of_shard(self, shard: int) -> tuple[Bucket, ...]:
        """The buckets that one shard aggregates."""
        return tuple(bucket for bucket in self.buckets if bucket.shard == shard)

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
    """Cuts the vectors of `tensors` for the codec, bucket size and number of servers of a job.

    Raises:
        SpecError: no parameters, two tensors of one name, too many elements, or more servers than the gradient
            vector can be cut into.
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
    alignment = make_codec(spec.codec, start=0, stop=d, layer_edges=edges).alignment
    shard_edges = _even_cuts(0, d, spec.servers, alignment)
    if len(set(shard_edges)) <= spec.servers:
        rule = f"servers of at most {math.ceil(d / alignment)} ({d} parameters in units of {alignment})"
        raise SpecError(refusal(rule, "servers", spec.servers))
    return Layout(
        tensors=tuple(tensors),
        d=d,
        e=e,
        layer_edges=tuple(edges),
        shard_edges=shard_edges,
        buckets=_cut_buckets(shard_edges, _even_cuts(0, e, spec.servers, 1), edges, spec),
        servers=spec.servers,
    )


def push_codec(layout: Layout, spec: JobSpec) -> Codec:
    """The codec of the workers' contributions: one worker sees the whole gradient vector."""
    return make_codec(spec.codec, start=0, stop=layout.d, layer_edges=layout.layer_edges)


def pull_codec(layout: Layout, spec: JobSpec, shard: int) -> Codec:
    """The codec of one shard's averages: float32 unless the job is two-sided."""
    start, stop = layout.shard_edges[shard], layout.shard_edges[shard + 1]
    return make_codec(_pull_spec(spec), start=start, stop=stop, layer_edges=layout.layer_edges)


def state_codec(layout: Layout) -> Codec:
    """The codec of the state vector, in both directions: float32."""
    return make_codec(UNCOMPRESSED, start=0, stop=layout.e, layer_edges=(0, layout.e))


def _pull_spec(spec: JobSpec) -> CodecSpec:
    return spec.codec if spec.codec.two_sided else UNCOMPRESSED


def _cut_buckets(
    shard_edges: tuple[int, ...], state_edges: tuple[int, ...], layer_edges: Sequence[int], spec: JobSpec
) -> tuple[Bucket, ...]:
    d, e = shard_edges[-1], state_edges[-1]
    push = make_codec(spec.codec, start=0, stop=d, layer_edges=layer_edges)
    state = make_codec(UNCOMPRESSED, start=0, stop=e, layer_edges=(0, e))
    buckets: list[Bucket] = []
    for shard in range(spec.servers):
        start, stop = shard_edges[shard], shard_edges[shard + 1]
        pull = make_codec(_pull_spec(spec), start=start, stop=stop, layer_edges=layer_edges)
        for kind, edges, codecs in (
            (BucketKind.GRADIENT, shard_edges, (push, pull)),
            (BucketKind.STATE, state_edges, (state,)),
        ):
            inner = _cuts_within(edges[shard], edges[shard + 1], codecs, spec.exchange.bucket_bytes)
            for first, last in itertools.pairwise(inner):
                buckets.append(Bucket(number=len(buckets), shard=shard, kind=kind, start=first, n=last - first))
    return tuple(buckets)


def _cuts_within(start: int, stop: int, codecs: Sequence[Codec], bucket_bytes: int) -> tuple[int, ...]:
    """Even cuts into as few parts as keep all of a part's scales and payload, by each codec, within `bucket_bytes`.

    A part of one alignment unit may exceed it. `start` must be a multiple of the unit, which is the first codec's.
    """
    unit = codecs[0].alignment
    units, parts = math.ceil((stop - start) / unit), 1
    if not units:
        return ()
    while True:
        cuts = _even_cuts(start, stop, parts, unit)
        largest = max(codec.wire_bytes(a, b - a) for codec in codecs for a, b in itertools.pairwise(cuts))
        if largest <= bucket_bytes or parts == units:
            return cuts
        parts = min(units, math.ceil(parts * largest / bucket_bytes))


def _even_cuts(start: int, stop: int, parts: int, unit: int) -> tuple[int, ...]:
    """`parts` + 1 edges from start to stop, inner ones on multiples of `unit`, part sizes within one unit of equal.

    `start` must be a multiple of `unit`.
    """
    units = math.ceil((stop - start) / unit)
    return tuple(min(stop, start + unit * (units * part // parts)) for part in range(parts + 1))
