"""The physical limit: bytes by node in closed form, for every topology and for gloo's ring."""

from __future__ import annotations

import pytest

from bench.limits import NodeBytes, ShardBytes, limit_s, node_bytes, parameter_server_bytes, ring_bytes, shard_bytes
from bench.settings import parse_codec, parse_topology
from bench.tensors import RESNET50_ELEMENTS, STATE, tensors_of
from common.layout import plan_layout
from common.spec_sources import load_job_spec


def test_dedicated_server_sees_every_worker_and_workers_only_their_own_bytes() -> None:
    topology = parse_topology("dedicated", 6)
    nodes = parameter_server_bytes(topology, [ShardBytes(pushed=100, pulled=40)])
    assert nodes == [*[NodeBytes(sent=100, received=40)] * 6, NodeBytes(sent=240, received=600)]


def test_colocated_worker_exchanges_its_own_shard_over_no_link() -> None:
    nodes = parameter_server_bytes(parse_topology("colocated", 4), [ShardBytes(pushed=10, pulled=20)] * 4)
    # push 3 other shards, publish our shard to 3 workers; receive 3 pushes and 3 averages
    assert nodes == [NodeBytes(sent=3 * 10 + 3 * 20, received=3 * 10 + 3 * 20)] * 4


def test_colocated_nodes_differ_where_shards_do() -> None:
    shards = [ShardBytes(pushed=1, pulled=10), ShardBytes(pushed=100, pulled=1000)]
    first, second = parameter_server_bytes(parse_topology("colocated", 2), shards)
    assert first == NodeBytes(sent=100 + 10, received=1 + 1000)
    assert second == NodeBytes(sent=1 + 1000, received=100 + 10)


@pytest.mark.parametrize("workers", [2, 3, 6])
@pytest.mark.parametrize("name", ["colocated", "dedicated", "dedicated:3"])
def test_what_is_sent_is_received(name: str, workers: int) -> None:
    topology = parse_topology(name, workers)
    shards = [ShardBytes(pushed=7 + shard, pulled=11 * shard) for shard in range(topology.shards)]
    nodes = parameter_server_bytes(topology, shards)
    assert len(nodes) == topology.nodes
    assert sum(node.sent for node in nodes) == sum(node.received for node in nodes)


def test_ring_moves_two_times_all_but_one_part() -> None:
    assert ring_bytes(6, 600) == [NodeBytes(sent=4000, received=4000)] * 6


@pytest.mark.parametrize(("codec", "gathered"), [("8", 512 * 40 + 4 * 40), ("4", 512 * 20 + 4 * 40)])
def test_all_gather_brings_every_other_workers_contribution(codec: str, gathered: int) -> None:
    topology = parse_topology("collective", 5)
    spec = load_job_spec(settings=[*topology.settings, *parse_codec(codec)])
    size = 4 * (gathered + 4 * STATE.elements)
    assert (
        node_bytes(topology, plan_layout(tensors_of(512 * 40), spec), spec) == [NodeBytes(sent=size, received=size)] * 5
    )


def test_float32_is_reduced_in_a_ring_and_the_state_gathered() -> None:
    topology = parse_topology("collective", 4)
    spec = load_job_spec(settings=[*topology.settings, *parse_codec("32")])
    size = 2 * 3 * 1000 + 3 * 4 * STATE.elements
    assert node_bytes(topology, plan_layout(tensors_of(1000), spec), spec) == [NodeBytes(sent=size, received=size)] * 4


def test_limit_is_the_busiest_direction_over_the_rate() -> None:
    nodes = [NodeBytes(sent=10, received=125_000_000), NodeBytes(sent=1000, received=0)]
    assert limit_s(nodes, 10**9) == 1.0


def test_shards_bytes_are_what_the_codec_takes() -> None:
    elements, blocks = 512 * 40, 40
    spec = load_job_spec(settings=["servers=2", *parse_codec("8x2")])
    shards = shard_bytes(plan_layout(tensors_of(elements), spec), spec)
    state = 4 * STATE.elements
    assert sum(shard.pushed for shard in shards) == elements + 4 * blocks + state
    assert sum(shard.pulled for shard in shards) == elements + 4 * blocks + state
    spec = load_job_spec(settings=["servers=2", *parse_codec("4")])
    shards = shard_bytes(plan_layout(tensors_of(elements), spec), spec)
    assert sum(shard.pushed for shard in shards) == elements // 2 + 4 * blocks + state
    assert sum(shard.pulled for shard in shards) == 4 * elements + state


def test_scales_that_workers_share_travel_both_ways_beside_the_integers() -> None:
    spec = load_job_spec(settings=["workers=2", "servers=2", *parse_codec("shared:4")])
    shards = shard_bytes(plan_layout(tensors_of(512 * 40), spec), spec)
    beside = 4 * 40 + 4 * STATE.elements
    assert sum(shard.pushed for shard in shards) == 512 * 20 + beside
    assert sum(shard.pulled for shard in shards) == 512 * 40 * 5 // 8 + beside  # sums up to 2 * 7 take 5 bits


def test_default_gradient_is_that_of_resnet50() -> None:
    import torch
    from torchvision.models import resnet50

    with torch.device("meta"):
        parameters = [(name, tuple(value.shape)) for name, value in resnet50().named_parameters()]
    ours = [(tensor.name, tensor.shape) for tensor in tensors_of(None) if not tensor.buffer]
    assert ours == parameters
    assert sum(tensor.elements for tensor in tensors_of(None) if not tensor.buffer) == RESNET50_ELEMENTS


@pytest.mark.parametrize("elements", [1, 1 << 20, (1 << 20) + 1, 3_000_000])
def test_gradient_of_any_length_can_be_asked_for(elements: int) -> None:
    assert sum(tensor.elements for tensor in tensors_of(elements) if not tensor.buffer) == elements
