"""A model of cost: what a round takes, from measured kernel rates, message costs and link rates. PURE.

A round moves N steps through a pipeline, a step being one bucket of every shard. Every resource r (a link in one
direction, a thread, a node's cores) is busy for L_r seconds of a round, and the pipeline for F seconds before its
slowest resource gets its first work and after that has done its last. So

    T = F + (1 - 1/N) * max_r L_r                                                                        (pipeline)

With d elements, M workers, S shards, B buckets, P bytes pushed and Q bytes pulled by a worker, R payload bytes per
second of a link (rate / 8 * goodput), CPU seconds per element e (encode), c (decode), a (decode and add), f (average
and encode), per message m and per byte b at one of its two ends (m' and b' where they are the collectives', and u per
bucket):

    worker CPU    W = d (e + c) + 2 B m + (P + Q) b
    shard CPU     H = d (M a + f) / S + 2 M B m / S + M (P + Q) b / S
    dedicated     links: worker P / R out, Q / R in; server M P / (S R) in, M Q / (S R) out
    colocated     links: (M - 1) / M (P + Q) / R each way; a node's CPU: W + H with S = M
    all-reduce    link: V / R each way, V = 2 (M - 1) / M 4 d; CPU: d a + B (u + 4 (M - 1) m') + 2 V b'
    all-gather    link: V / R each way, V = (M - 1) P; CPU: d (e + c + (M - 1) a) + B (u + 2 (M - 1) m') + 2 V b'

Where workers share scales (codec `shared`), those of a bucket go all the way and back before it is encoded, in messages
of their own: with C bytes of scales each way, P + C and Q + C stand for P and Q, 4 B for 2 B, and two messages for each
of a step's in F.

F is one step alone: the first bucket is encoded, the step is pushed, its last contribution added and averaged, the step
pulled, its last bucket decoded; pushing and pulling take what their slowest resource does. `alpha`, the latency of a
message from one process to the next, enters F twice, and for rings also L: the 2 (M - 1) or M - 1 hops of a bucket
follow one another, as many buckets at once as are under way. Threads bound a round too: a worker encodes on one, a
shard adds on one, each handles messages on one. A node's CPU time is divided by its cores. Where all nodes are
processes of one machine, the sum of all CPU time over its cores is one more bound (`cores_shared`), and what a node
does alone in F takes longer by as many times as more nodes than cores want to do it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

FLOAT32_BYTES = 4


class Kind(StrEnum):
    """What exchanges."""

    DEDICATED = "dedicated"
    COLOCATED = "colocated"
    ALL_REDUCE = "all-reduce"
    ALL_GATHER = "all-gather"


@dataclass(frozen=True, kw_only=True)
class KernelRates:
    """CPU seconds per element of one codec: encode, decode, decode and add, average and encode (the way back)."""

    encode_s: float
    decode_s: float
    add_s: float
    finish_s: float


@dataclass(frozen=True, kw_only=True)
class WireRates:
    """What it takes to move a message; CPU seconds are of one end.

    Attributes:
        message_s, byte_s: of a gRPC message of ours, per message and per byte of it.
        ring_bucket_s: of a collective, per bucket and worker.
        ring_message_s, ring_byte_s: of its hops, as above.
        latency_s, ring_latency_s: alpha of either, from one process to the next, for a message without content.
        goodput: payload bits that a link carries, as a share of its rate.
    """

    message_s: float
    byte_s: float
    ring_bucket_s: float
    ring_message_s: float
    ring_byte_s: float
    latency_s: float
    ring_latency_s: float
    goodput: float = 1448 / 1514


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a round has to move.

    Attributes:
        elements: d.
        pushed_bytes, pulled_bytes: P and Q, payload of one worker.
        bucket_bytes: largest payload of a message, in the wider direction.
        scale_bytes: C, of one worker and way; 0: no scales travel ahead.
    """

    elements: int
    pushed_bytes: int
    pulled_bytes: int
    bucket_bytes: int
    scale_bytes: int = 0

    def buckets(self, shards: int) -> int:
        """B: as few buckets, a multiple of the shards, as keep each within `bucket_bytes`."""
        wider = max(self.pushed_bytes, self.pulled_bytes)
        return shards * max(1, math.ceil(wider / self.bucket_bytes / shards))


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where a round runs.

    Attributes:
        kind: topology.
        workers: M.
        shards: S; only dedicated has another number than M.
        rate_bps: of every link, each way; None: messages cross no link.
        cores_per_node: that a node's processes share.
        cores_shared: of the one machine that all nodes share; None: every node is a machine.
        window_bytes: of a ring, what is under way at once.
    """

    kind: Kind
    workers: int
    shards: int
    rate_bps: float | None
    cores_per_node: int
    cores_shared: int | None = None
    window_bytes: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a round, and what bounds it.

    Attributes:
        round_s: T.
        fill_s: F, to fill the pipeline and to drain it.
        loads_s: L by resource.
        bound: the resource with the largest L.
    """

    round_s: float
    fill_s: float
    loads_s: dict[str, float]
    bound: str


def predict(cluster: Cluster, load: Load, kernel: KernelRates, wire: WireRates) -> Prediction:
    """The round's time by the formulas above."""
    if cluster.kind in (Kind.ALL_REDUCE, Kind.ALL_GATHER):
        return _ring(cluster, load, kernel, wire)
    return _parameter_server(cluster, load, kernel, wire)


def bytes_per_s(cluster: Cluster, wire: WireRates) -> float:
    """R: payload bytes that a link carries each way; infinite where there is no link."""
    return math.inf if cluster.rate_bps is None else cluster.rate_bps / 8 * wire.goodput


@dataclass(frozen=True, kw_only=True)
class _Half:
    """One half of a round's way for one step: pushing, or pulling; seconds of CPU and of links.

    Attributes:
        worker_s, shard_s: CPU of one worker and of one shard.
        arithmetic_s: of the shard's, what its adding thread does.
        link_s: of the busiest link.
    """

    worker_s: float
    shard_s: float
    arithmetic_s: float
    link_s: float

    def seconds(self, cluster: Cluster, s: int) -> float:
        """Of the slowest resource, all of them being busy at once."""
        node_s = self.worker_s + self.shard_s if cluster.kind is Kind.COLOCATED else max(self.worker_s, self.shard_s)
        bounds = [self.link_s, node_s / cluster.cores_per_node, self.arithmetic_s, self.shard_s - self.arithmetic_s]
        if cluster.cores_shared is not None:
            bounds.append((cluster.workers * self.worker_s + s * self.shard_s) / cluster.cores_shared)
        return max(bounds)


def _parameter_server(cluster: Cluster, load: Load, kernel: KernelRates, wire: WireRates) -> Prediction:
    m, s = cluster.workers, cluster.workers if cluster.kind is Kind.COLOCATED else cluster.shards
    buckets = load.buckets(s)
    n, messages = load.elements / buckets, 2 if load.scale_bytes else 1
    p, q = ((payload + load.scale_bytes) / buckets for payload in (load.pushed_bytes, load.pulled_bytes))
    push_s, pull_s = messages * wire.message_s + p * wire.byte_s, messages * wire.message_s + q * wire.byte_s
    links = _links(cluster, s, p, q, bytes_per_s(cluster, wire))
    push = _Half(
        worker_s=s * (n * kernel.encode_s + push_s),
        shard_s=m * (n * kernel.add_s + push_s),
        arithmetic_s=m * n * kernel.add_s,
        link_s=max(links[0].values()),
    )
    pull = _Half(
        worker_s=s * (n * kernel.decode_s + pull_s),
        shard_s=n * kernel.finish_s + m * pull_s,
        arithmetic_s=n * kernel.finish_s,
        link_s=max(links[1].values()),
    )
    steps, both = buckets // s, links[0] | links[1]
    if cluster.kind is Kind.COLOCATED:  # both halves cross the same links
        both = {"link": sum(seconds for half in links for seconds in half.values())}
    worker_s, shard_s = push.worker_s + pull.worker_s, push.shard_s + pull.shard_s
    arithmetic_s = push.arithmetic_s + pull.arithmetic_s
    per_step = {
        **both,
        "encode thread": s * n * kernel.encode_s,
        "worker's messages": s * (push_s + pull_s),
        "add thread": arithmetic_s,
        "server's messages": shard_s - arithmetic_s,
    }
    if cluster.kind is Kind.COLOCATED:
        per_step["node's cores"] = (worker_s + shard_s) / cluster.cores_per_node
    else:
        per_step["worker's cores"] = worker_s / cluster.cores_per_node
        per_step["server's cores"] = shard_s / cluster.cores_per_node
    if cluster.cores_shared is not None:
        per_step["shared cores"] = (m * worker_s + s * shard_s) / cluster.cores_shared
    first_s = n * kernel.encode_s + push_s
    turn_s = push_s + n * (kernel.add_s + kernel.finish_s) + pull_s
    last_s = pull_s + n * kernel.decode_s
    fill_s = _crowd(m, cluster) * (first_s + last_s) + _crowd(s, cluster) * turn_s + 2 * messages * wire.latency_s
    fill_s += push.seconds(cluster, s) + pull.seconds(cluster, s)
    return _pipeline({resource: steps * seconds for resource, seconds in per_step.items()}, fill_s, steps)


def _links(cluster: Cluster, s: int, p: float, q: float, r: float) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the links in a step, pushing and pulling; p, q: bytes of a bucket; r: bytes per second."""
    m = cluster.workers
    if cluster.kind is Kind.COLOCATED:
        return {"link": (m - 1) * p / r}, {"link": (m - 1) * q / r}
    return (
        {"worker's link out": s * p / r, "server's link in": m * p / r},
        {"worker's link in": s * q / r, "server's link out": m * q / r},
    )


def _ring(cluster: Cluster, load: Load, kernel: KernelRates, wire: WireRates) -> Prediction:
    d, m, r = load.elements, cluster.workers, bytes_per_s(cluster, wire)
    if m == 1:  # there is no ring, nothing is sent
        alone_s = 0.0 if cluster.kind is Kind.ALL_REDUCE else d * (kernel.encode_s + kernel.decode_s)
        return _pipeline({"worker's cores": 0.0}, alone_s, 1)
    if cluster.kind is Kind.ALL_REDUCE:
        hops, size, whole = 2 * (m - 1), 2 * (m - 1) / m * FLOAT32_BYTES * d, FLOAT32_BYTES * d
        encode_s, decode_s = 0.0, d * kernel.add_s
        load = replace(load, pushed_bytes=whole, pulled_bytes=whole)
    else:
        hops, size = m - 1, float((m - 1) * load.pushed_bytes)
        encode_s, decode_s = d * kernel.encode_s, d * (kernel.decode_s + (m - 1) * kernel.add_s)
    buckets = load.buckets(1)
    at_once = max(1, min(buckets, cluster.window_bytes // max(1, load.pushed_bytes // buckets)))
    hop_s, turn_s = 2 * wire.ring_message_s, wire.ring_bucket_s
    worker_s = encode_s + decode_s + buckets * (turn_s + hops * hop_s) + 2 * size * wire.ring_byte_s
    loads = {
        "link": size / r,
        "latency of hops": hops * buckets * wire.ring_latency_s / at_once,
        "worker's cores": worker_s / cluster.cores_per_node,
        "decode thread": decode_s,
    }
    if cluster.cores_shared is not None:
        loads["shared cores"] = m * worker_s / cluster.cores_shared
    crowd = _crowd(m, cluster)
    fill_s = crowd * ((encode_s + decode_s) / buckets + turn_s)
    fill_s += hops * (size / hops / buckets / r + wire.ring_latency_s + crowd * hop_s)
    return _pipeline(loads, fill_s, buckets)


def _crowd(nodes: int, cluster: Cluster) -> float:
    """By how much longer a step of CPU work takes that so many nodes do at once."""
    return 1.0 if cluster.cores_shared is None else max(1.0, nodes / cluster.cores_shared)


def _pipeline(loads: dict[str, float], fill_s: float, steps: int) -> Prediction:
    bound = max(loads, key=lambda resource: loads[resource])
    return Prediction(round_s=fill_s + (1 - 1 / steps) * loads[bound], fill_s=fill_s, loads_s=dict(loads), bound=bound)
