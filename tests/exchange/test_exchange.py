"""Rounds over real gRPC: replicas are identical, bytes are what they should be, and failures say who and what."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from common.codecs import SERVER, BlockScales, Float32, RandomKey
from common.codecs.shared import SharedCodec, average_of_sums
from common.config import JobSpec
from common.errors import CodecError, MismatchError, PeerLostError
from common.layout import BucketKind, Layout, TensorSpec, plan_layout, pull_codec, push_codec, state_codec
from tests.exchange.colocated import ShardThread, colocated_members, shards
from tests.support import DEADLINE_S, DIGEST, TENSORS, Member, in_threads, job, members, running_server, running_servers
from worker.exchange.coordination import End

__all__ = ["shards"]
CODECS = {
    "none": ["codec.name=none"],
    "fp16": ["codec.name=fp16", "codec.two_sided=true"],
    "bf16": ["codec.name=bf16"],
    "8 bits": ["codec.bits=8"],
    "8 bits 2-sided": ["codec.bits=8", "codec.two_sided=true"],
    "4 bits 2-sided": ["codec.bits=4", "codec.two_sided=true", "codec.block=64"],
    "3 bits l2 layer": ["codec.bits=3", "codec.two_sided=true", "codec.block=layer", "codec.scale=l2"],
    "16 bits all": ["codec.bits=16", "codec.two_sided=true", "codec.block=all"],
    "paper 8 bits 2-sided": ["codec.name=paper", "codec.bits=8", "codec.two_sided=true"],
    "rotated 2 bits 2-sided": ["codec.name=rotated", "codec.bits=2", "codec.two_sided=true", "codec.block=64"],
    "shared 4 bits": ["codec.name=shared", "codec.bits=4", "codec.block=64"],
    "sign": ["codec.name=sign", "codec.block=64"],
    "topk": ["codec.name=topk", "codec.block=64", "codec.density=1/8"],
}


def gradients(layout: Layout, workers: int, rounds: int) -> Float32:
    """float32 [rounds, workers, d] of very different magnitudes, so that the order of additions matters."""
    random = np.random.default_rng(7)
    shape = (rounds, workers, layout.d)
    return (random.standard_normal(shape) * 10.0 ** random.integers(-6, 3, shape)).astype(np.float32)


def states(layout: Layout, workers: int, rounds: int) -> Float32:
    return np.random.default_rng(8).standard_normal((rounds, workers, layout.e)).astype(np.float32)


def run_rounds(
    joined: Sequence[Member], spec: JobSpec, order: list[int], rounds: int
) -> list[list[tuple[bytes, bytes]]]:
    """All rounds on all workers, begun in the given order; returns the averages' bytes by worker and round."""
    layout = joined[0].layout
    g, s = gradients(layout, spec.workers, rounds), states(layout, spec.workers, rounds)
    turns = [threading.Event() for _ in range(rounds * len(joined) + 1)]
    turns[0].set()

    def work(worker: int) -> list[tuple[bytes, bytes]]:
        got = []
        for round_ in range(rounds):
            position = round_ * len(joined) + order.index(worker)
            assert turns[position].wait(DEADLINE_S)
            turns[position + 1].set()
            gradient, state = g[round_, worker].copy(), s[round_, worker].copy()
            joined[worker].exchange.average(round_, gradient, state, b"%016d" % round_)
            got.append((gradient.tobytes(), state.tobytes()))
        return got

    return in_threads([lambda w=worker: work(w) for worker in range(len(joined))])


def reference(layout: Layout, spec: JobSpec, rounds: int) -> list[tuple[bytes, bytes]]:
    """The averages by the definition, without buckets, streams or threads: (A3), in order of worker_index."""
    g, s = gradients(layout, spec.workers, rounds), states(layout, spec.workers, rounds)
    push = push_codec(layout, spec)
    averages, residuals = [], np.zeros((spec.workers, layout.d))
    for round_ in range(rounds):
        total, shared = np.zeros(layout.d, np.float32), None
        if isinstance(push, SharedCodec):
            largest = np.max([push.local_scales(g[round_, worker], 0) for worker in range(spec.workers)], axis=0)
            shared = BlockScales(first_block=0, values=largest)
        for worker in range(spec.workers):
            key = RandomKey(seed=spec.seed, round=round_, source=worker)
            decoded = np.empty(layout.d, np.float32)
            wanted = g[round_, worker] + residuals[worker]
            vector = wanted.astype(np.float32)
            push.decode(push.encode(vector, 0, key, shared or push.measure(vector, 0)), 0, decoded, add=False, key=key)
            residuals[worker] = wanted - decoded if push.biased else 0
            total = decoded if worker == 0 else total + decoded
        average = total if shared else total / np.float32(spec.workers)
        for (start, stop), shard in {layout.encoder_range(shard): shard for shard in range(spec.shards)}.items():
            pull = pull_codec(layout, spec, shard)
            part = average[start:stop].copy()
            key = RandomKey(seed=spec.seed, round=round_, source=SERVER)
            encoded = pull.encode(part, start, key, pull.measure(part, start))
            pull.decode(encoded, start, average[start:stop], add=False, key=key)
        if shared:
            average_of_sums(push, average, 0, shared, spec.workers)
        state = s[round_, 0].copy()
        for worker in range(1, spec.workers):
            state = state + s[round_, worker]
        averages.append((average.tobytes(), (state / np.float32(spec.workers)).tobytes()))
    return averages


@pytest.mark.parametrize("codec", CODECS, ids=CODECS.keys())
def test_all_workers_decode_the_reference_average_whatever_the_order_of_arrival(codec: str) -> None:
    spec = job("workers=3", "servers=2", "exchange.bucket_bytes=1024", *CODECS[codec])
    expected = reference(plan_layout(TENSORS, spec), spec, rounds=3)
    for order in ([0, 1, 2], [2, 0, 1]):
        with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
            by_worker = run_rounds(joined, spec, order, rounds=3)
        assert by_worker == [expected] * 3


@pytest.mark.parametrize("codec", CODECS, ids=CODECS.keys())
def test_with_a_shard_on_every_node_all_workers_decode_the_reference_average_whatever_the_order_of_arrival(
    codec: str, shards: list[ShardThread]
) -> None:
    spec = job("workers=3", "exchange.topology=colocated", "exchange.bucket_bytes=1024", *CODECS[codec])
    expected = reference(plan_layout(TENSORS, spec), spec, rounds=3)
    for order in ([0, 1, 2], [2, 0, 1]):
        with running_server(spec) as coordinator, colocated_members(spec, coordinator.address) as joined:
            assert {bucket.shard for bucket in joined[0].layout.buckets} == {0, 1, 2}
            shares = [{n for n, s in m.exchange._streams.items() if s.uses_memory} for m in joined]
            assert shares == [{0}, {1}, {2}]
            by_worker = run_rounds(joined, spec, order, rounds=3)
            in_threads([member.leave for member in joined])
            assert [member.shard.wait() for member in joined] == [0, 0, 0]
            assert coordinator.outcome.result(DEADLINE_S).exit_code == 0
        assert by_worker == [expected] * 3
    assert len(shards) == 6


def test_bucket_size_and_number_of_servers_do_not_change_the_average() -> None:
    settings = ["workers=2", "codec.bits=4", "codec.two_sided=true", "codec.block=64"]
    results = []
    for cut in (["servers=1", "exchange.bucket_bytes=1048576"], ["servers=3", "exchange.bucket_bytes=1024"]):
        spec = job(*settings, *cut)
        with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
            results.append(run_rounds(joined, spec, [0, 1], rounds=2))
    assert results[0] == results[1]


def test_pushed_and_pulled_bytes_at_8_bits_two_sided_are_within_2_percent_of_d() -> None:
    tensors = (TensorSpec(name="w", shape=(300, 1000), buffer=False), *TENSORS[3:])
    spec = job("workers=2", "codec.two_sided=true")
    with running_servers(spec) as servers, members(spec, servers[0].address, tensors) as joined:
        layout = joined[0].layout

        def average(member: Member) -> object:
            gradient = np.ones(layout.d, np.float32)
            return member.exchange.average(0, gradient, np.zeros(layout.e, np.float32), DIGEST)

        traffic = in_threads([lambda m=member: average(m) for member in joined])[0]
    assert layout.d <= traffic.pushed_bytes <= 1.02 * layout.d
    assert layout.d <= traffic.pulled_bytes <= 1.02 * layout.d
    content = sum(
        (push_codec(layout, spec) if b.kind is BucketKind.GRADIENT else state_codec(layout)).wire_bytes(b.start, b.n)
        for b in layout.buckets
    )
    assert content <= traffic.pushed_bytes <= content + 128 * len(layout.buckets)


def test_a_gradient_that_is_not_finite_is_refused_naming_bucket_layer_and_worker_and_ends_the_others() -> None:
    spec = job("workers=2", "codec.two_sided=true")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        layout, bad = joined[0].layout, np.zeros(joined[0].layout.d, np.float32)
        bad[layout.layer_edges[2] + 5] = np.nan
        with pytest.raises(CodecError, match=r"nan.*gradient bucket 0, worker-1, round 0, layer fc\.weight") as refusal:
            joined[1].exchange.average(0, bad, np.zeros(layout.e, np.float32), DIGEST)
        joined[1].leave(End.after(refusal.value))
        with pytest.raises(PeerLostError, match=r"worker-1 failed: .*nan"):
            joined[0].exchange.average(0, np.zeros(layout.d, np.float32), np.zeros(layout.e, np.float32), DIGEST)
        assert servers[0].outcome.result(DEADLINE_S).exit_code == 75


def test_replicas_that_differ_are_an_error_that_names_the_workers() -> None:
    spec = job("workers=3")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        layout = joined[0].layout
        digests = [b"\x01" * 16, b"\x02" * 16, b"\x01" * 16]

        def average(worker: int) -> None:
            vectors = np.zeros(layout.d, np.float32), np.zeros(layout.e, np.float32)
            joined[worker].exchange.average(0, *vectors, digests[worker])

        with ThreadPoolExecutor(3) as pool:
            results = [pool.submit(average, worker) for worker in range(3)]
            texts = [str(result.exception(DEADLINE_S)) for result in results]
        assert all(isinstance(result.exception(), MismatchError) for result in results)
        assert all("the replicas differ" in text and "worker-1" in text for text in texts)
        assert servers[0].outcome.result(DEADLINE_S).exit_code == 76


def test_a_worker_that_vanishes_in_mid_round_ends_the_others_naming_it() -> None:
    spec = job("workers=2", "servers=2")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        joined[1].vanish()
        layout = joined[0].layout
        with pytest.raises(PeerLostError, match="worker-1 is gone"):
            joined[0].exchange.average(0, np.zeros(layout.d, np.float32), np.zeros(layout.e, np.float32), DIGEST)
        outcomes = [server.outcome.result(DEADLINE_S) for server in servers]
    assert [outcome.exit_code for outcome in outcomes] == [75, 75]
    assert "worker-1" in outcomes[0].text


def test_a_round_that_does_not_close_in_time_fails_naming_whom_it_waited_for() -> None:
    spec = job("workers=2", "deadlines.round_s=0.6", "deadlines.report_s=0.2")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        layout = joined[0].layout
        with pytest.raises(PeerLostError, match=r"round 0 did not close within 0\.6 s: waiting for worker-1"):
            joined[0].exchange.average(0, np.zeros(layout.d, np.float32), np.zeros(layout.e, np.float32), DIGEST)
        waiting = [event for event in servers[0].events if event["event"] == "waiting" and event["round"] == 0]
    assert waiting
    assert waiting[-1]["missing"] == ["worker-1"]


def test_all_leave_in_good_order_and_the_servers_end_with_zero() -> None:
    spec = job("workers=2", "servers=2")
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        run_rounds(joined, spec, [0, 1], rounds=1)
        for member in joined:
            member.leave()
        assert [server.outcome.result(DEADLINE_S).exit_code for server in servers] == [0, 0]
