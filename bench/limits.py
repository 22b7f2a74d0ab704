"""The physical limit of a round: the bytes that must cross the busiest link, over the link's rate.

Only payload counts, as `wire_bytes` gives it: no message, HTTP/2, TCP or Ethernet headers. So no real exchange reaches
the limit; on Ethernet with 1500-byte packets TCP itself leaves 1448 of 1514 bytes, 95.6 per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench.settings import Topology, TopologyKind
from common.config import CodecName, JobSpec
from common.layout import BucketKind, Layout, pull_codec, push_codec, state_codec

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ShardBytes:
    """Payload that one worker exchanges with one shard in a round."""

    pushed: int
    pulled: int


@dataclass(frozen=True, kw_only=True)
class NodeBytes:
    """Payload that crosses one node's link in a round, each way."""

    sent: int
    received: int


def shard_bytes(layout: Layout, spec: JobSpec) -> list[ShardBytes]:
    """By shard, from the codecs' exact sizes."""
    push, state = push_codec(layout, spec), state_codec(layout)
    result = []
    for shard in range(1 + max(bucket.shard for bucket in layout.buckets)):
        pull, pushed, pulled = pull_codec(layout, spec, shard), 0, 0
        for bucket in layout.of_shard(shard):
            is_gradient = bucket.kind is BucketKind.GRADIENT  # the rest, scales too, is float32
            pushed += (push if is_gradient else state).wire_bytes(bucket.start, bucket.n)
            pulled += (pull if is_gradient else state).wire_bytes(bucket.start, bucket.n)
        result.append(ShardBytes(pushed=pushed, pulled=pulled))
    return result


def parameter_server_bytes(topology: Topology, shards: Sequence[ShardBytes]) -> list[NodeBytes]:
    """By node; what a worker exchanges with a server on its own node crosses no link."""
    sent, received = [0] * topology.nodes, [0] * topology.nodes
    for worker in range(topology.workers):
        for shard, size in enumerate(shards):
            server = topology.node_of_shard(shard)
            if server == worker:
                continue
            sent[worker] += size.pushed
            received[server] += size.pushed
            sent[server] += size.pulled
            received[worker] += size.pulled
    return [NodeBytes(sent=s, received=r) for s, r in zip(sent, received, strict=True)]


def node_bytes(topology: Topology, layout: Layout, spec: JobSpec) -> list[NodeBytes]:
    """By node, of any topology of ours."""
    if topology.kind is TopologyKind.COLLECTIVE:
        return collective_bytes(layout, spec)
    return parameter_server_bytes(topology, shard_bytes(layout, spec))


def collective_bytes(layout: Layout, spec: JobSpec) -> list[NodeBytes]:
    """By node, of ring collectives, the same for all.

    Codec `none`: an all-reduce of the gradient; other codecs: an all-gather, in which the M - 1 contributions of the
    others cross every link. The state vector is gathered too.
    """
    workers, push = spec.workers, push_codec(layout, spec)
    gathered = state_codec(layout).wire_bytes(0, layout.e) if layout.e else 0
    reduced = 0
    if spec.codec.name is CodecName.NONE:
        reduced = ring_bytes(workers, layout.d)[0].sent
    else:
        gathered += sum(push.wire_bytes(b.start, b.n) for b in layout.of_kind(BucketKind.GRADIENT))
    size = reduced + (workers - 1) * gathered
    return [NodeBytes(sent=size, received=size)] * workers


def ring_bytes(workers: int, elements: int) -> list[NodeBytes]:
    """By node, of a ring all-reduce in float32: 2 (M - 1) / M * 4 d, the same for all up to rounding."""
    size = round(2 * (workers - 1) / workers * FLOAT32_BYTES * elements)
    return [NodeBytes(sent=size, received=size)] * workers


def limit_s(nodes: Sequence[NodeBytes], rate_bps: int) -> float:
    """Seconds: the largest number of bytes over nodes and directions, over the rate."""
    return 8 * max(max(node.sent, node.received) for node in nodes) / rate_bps
