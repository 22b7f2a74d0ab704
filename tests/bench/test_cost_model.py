"""The model of cost: closed forms at its edges, and that it grows and shrinks where it must."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench.cost_model import Cluster, KernelRates, Kind, Load, WireRates, bytes_per_s, predict

D = 1_000_000
GBIT = 10**9
FREE_KERNEL = KernelRates(encode_s=0.0, decode_s=0.0, add_s=0.0, finish_s=0.0)
FREE_WIRE = WireRates(
    message_s=0.0,
    byte_s=0.0,
    ring_bucket_s=0.0,
    ring_message_s=0.0,
    ring_byte_s=0.0,
    latency_s=0.0,
    ring_latency_s=0.0,
)
KERNEL = KernelRates(encode_s=1e-9, decode_s=3e-10, add_s=5e-10, finish_s=2e-9)
WIRE = WireRates(
    message_s=2e-4,
    byte_s=5e-10,
    ring_bucket_s=2e-4,
    ring_message_s=2e-5,
    ring_byte_s=3e-10,
    latency_s=1e-4,
    ring_latency_s=5e-5,
)
LOAD = Load(elements=D, pushed_bytes=D, pulled_bytes=D, bucket_bytes=1 << 14)
KINDS = [*Kind]


def cluster(kind: Kind = Kind.DEDICATED, **changes: object) -> Cluster:
    values = {"kind": kind, "workers": 6, "shards": 1, "rate_bps": GBIT, "cores_per_node": 2}
    return Cluster(**{**values, **changes})  # type: ignore[arg-type]


def seconds(where: Cluster, load: Load = LOAD, kernel: KernelRates = KERNEL, wire: WireRates = WIRE) -> float:
    return predict(where, load, kernel, wire).round_s


def test_rate_leaves_room_for_headers() -> None:
    assert bytes_per_s(cluster(), FREE_WIRE) == GBIT / 8 * 1448 / 1514
    assert bytes_per_s(cluster(rate_bps=None), FREE_WIRE) == math.inf


@pytest.mark.parametrize(
    ("kind", "link_bytes"),
    [
        (Kind.DEDICATED, 6 * D),
        (Kind.COLOCATED, 5 / 6 * 2 * D),
        (Kind.ALL_REDUCE, 2 * 5 / 6 * 4 * D),
        (Kind.ALL_GATHER, 5 * D),
    ],
)
def test_with_free_processors_and_small_messages_a_round_takes_what_the_busiest_link_does(
    kind: Kind, link_bytes: float
) -> None:
    said = predict(cluster(kind), replace(LOAD, bucket_bytes=100), FREE_KERNEL, FREE_WIRE)
    assert said.loads_s[said.bound] == pytest.approx(link_bytes / bytes_per_s(cluster(), FREE_WIRE))
    assert said.round_s == pytest.approx(said.loads_s[said.bound], rel=0.01)
    assert "link" in said.bound


def test_one_step_cannot_overlap_with_itself() -> None:
    said = predict(cluster(), replace(LOAD, bucket_bytes=D), FREE_KERNEL, FREE_WIRE)
    assert said.round_s == pytest.approx(2 * 6 * D / bytes_per_s(cluster(), FREE_WIRE))  # all in, then all out


def test_more_servers_share_the_load_until_the_workers_own_links_are_the_limit() -> None:
    load = replace(LOAD, bucket_bytes=100)
    own = D / bytes_per_s(cluster(), FREE_WIRE)
    taken = [seconds(cluster(shards=shards), load, FREE_KERNEL, FREE_WIRE) / own for shards in (1, 2, 6, 12)]
    assert taken == pytest.approx([6, 3, 1, 1], rel=0.01)


def test_without_links_the_busiest_processor_is_the_limit() -> None:
    load = replace(LOAD, bucket_bytes=100)
    said = predict(cluster(rate_bps=None), load, KERNEL, FREE_WIRE)
    assert said.bound == "add thread"
    assert said.round_s == pytest.approx(D * (6 * KERNEL.add_s + KERNEL.finish_s), rel=0.01)


def test_processes_of_one_machine_share_its_cores() -> None:
    load = replace(LOAD, bucket_bytes=100)
    said = predict(cluster(Kind.COLOCATED, rate_bps=None, cores_shared=2), load, KERNEL, FREE_WIRE)
    worker, shards = KERNEL.encode_s + KERNEL.decode_s, 6 * KERNEL.add_s + KERNEL.finish_s
    assert said.bound == "shared cores"
    assert said.loads_s["shared cores"] == pytest.approx(D * (6 * worker + shards) / 2)
    assert predict(cluster(Kind.COLOCATED, rate_bps=None), load, KERNEL, FREE_WIRE).round_s < said.round_s


@pytest.mark.parametrize("kind", [Kind.COLOCATED, Kind.ALL_REDUCE, Kind.ALL_GATHER])
def test_one_worker_alone_uses_no_link(kind: Kind) -> None:
    said = predict(cluster(kind, workers=1), LOAD, KERNEL, WIRE)
    assert said.loads_s.get("link", 0.0) == 0.0
    assert seconds(cluster(kind, workers=1, rate_bps=10**6)) == said.round_s


def test_one_worker_alone_needs_its_dedicated_server() -> None:
    assert seconds(cluster(workers=1), wire=FREE_WIRE) > D / bytes_per_s(cluster(), FREE_WIRE)


@pytest.mark.parametrize("kind", KINDS)
def test_slower_links_never_help(kind: Kind) -> None:
    taken = [seconds(cluster(kind, rate_bps=rate)) for rate in (10**11, 10**10, 10**9, 10**8, 10**7)]
    assert taken == sorted(taken)
    assert taken[-1] > 10 * taken[0]


@pytest.mark.parametrize("kind", KINDS)
def test_more_workers_never_help(kind: Kind) -> None:
    taken = [seconds(cluster(kind, workers=workers, rate_bps=10**8)) for workers in (2, 4, 16, 64, 256, 1024)]
    assert taken == sorted(taken)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["encode_s", "decode_s", "add_s", "finish_s"])
def test_slower_kernels_never_help(kind: Kind, name: str) -> None:
    assert seconds(cluster(kind), kernel=replace(KERNEL, **{name: 1e-6})) >= seconds(cluster(kind))


def test_a_step_of_many_messages_takes_the_processors_time_of_all_of_them() -> None:
    said = predict(cluster(Kind.COLOCATED, workers=1000, rate_bps=None), replace(LOAD, bucket_bytes=D), KERNEL, WIRE)
    assert said.round_s > 4 * 1000 * WIRE.message_s / 2  # two messages each way with each of them, on two cores


@pytest.mark.parametrize("kind", KINDS)
def test_latency_is_paid_per_hop(kind: Kind) -> None:
    one_bucket = replace(LOAD, bucket_bytes=4 * D)
    near = predict(cluster(kind), one_bucket, KERNEL, WIRE)
    far = predict(cluster(kind), one_bucket, KERNEL, replace(WIRE, latency_s=1.0, ring_latency_s=1.0))
    hops = {Kind.DEDICATED: 2, Kind.COLOCATED: 2, Kind.ALL_REDUCE: 10, Kind.ALL_GATHER: 5}[kind]
    assert far.round_s - near.round_s == pytest.approx(hops, rel=0.001)


def test_buckets_are_as_few_as_fit_and_the_same_for_all_shards() -> None:
    load = Load(elements=100, pushed_bytes=1000, pulled_bytes=4000, bucket_bytes=1000)
    assert [load.buckets(shards) for shards in (1, 2, 3, 4, 5)] == [4, 4, 6, 4, 5]


@pytest.mark.parametrize("kind", [Kind.DEDICATED, Kind.COLOCATED])
def test_scales_that_travel_ahead_are_more_bytes_twice_the_messages_and_one_more_way_there_and_back(kind: Kind) -> None:
    plain, ahead = LOAD, replace(LOAD, scale_bytes=D // 128)
    assert ahead.buckets(6) == plain.buckets(6)
    loads = [predict(cluster(kind), load, FREE_KERNEL, FREE_WIRE).loads_s for load in (plain, ahead)]
    for name in [name for name in loads[0] if "link" in name]:
        assert loads[1][name] / loads[0][name] == pytest.approx(1 + 1 / 128)
    messages = [
        predict(cluster(kind), load, FREE_KERNEL, replace(FREE_WIRE, message_s=1e-4)) for load in (plain, ahead)
    ]
    assert messages[1].loads_s["server's messages"] == pytest.approx(2 * messages[0].loads_s["server's messages"])
    far = replace(FREE_WIRE, latency_s=1.0)
    latencies = [
        predict(cluster(kind), load, FREE_KERNEL, far).fill_s
        - predict(cluster(kind), load, FREE_KERNEL, FREE_WIRE).fill_s
        for load in (plain, ahead)
    ]
    assert latencies == pytest.approx([2, 4])
