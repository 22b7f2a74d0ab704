"""Memory that a worker and its node's shard share: places, and that messages beside it have no payload."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

from common.config import JobSpec
from common.errors import MismatchError, PeerLostError
from common.layout import BucketKind, Layout, TensorSpec, plan_layout, pull_codec, push_codec, state_codec
from common.node_memory import NodeMemory
from common.spec_sources import load_job_spec
from common.wire.v1 import ps_pb2 as wire
from ps.averages import AverageMessage
from tests import support
from tests.exchange.raw import RawMember
from tests.support import DEADLINE_S, DIGEST, RunningServer, in_threads, join, running_server

TENSORS = [
    TensorSpec(name="a", shape=(70, 50), buffer=False),
    TensorSpec(name="b", shape=(9,), buffer=False),
    TensorSpec(name="mean", shape=(7,), buffer=True),
]
CODECS = (
    ("codec.bits=8",),
    ("codec.bits=3", "codec.block=all"),
    ("codec.name=none",),
    ("codec.name=shared", "codec.bits=4"),
    ("codec.name=topk", "codec.two_sided=false"),
)


def job(*settings: str) -> tuple[JobSpec, Layout]:
    spec = load_job_spec(settings=["workers=2", "exchange.topology=colocated", "exchange.bucket_bytes=1024", *settings])
    return spec, plan_layout(TENSORS, spec)


def both_ends(spec: JobSpec, layout: Layout, shard: int) -> tuple[NodeMemory, NodeMemory]:
    """As two processes have it: each with a descriptor and a mapping of its own."""
    ours = NodeMemory.make()
    ours.lay_out(layout, spec, shard, grow=True)
    theirs = NodeMemory(os.dup(ours.descriptor))
    theirs.lay_out(layout, spec, shard, grow=False)
    return ours, theirs


@pytest.mark.parametrize("settings", CODECS, ids=lambda settings: " ".join(settings))
def test_every_slot_is_as_long_as_its_payload_and_nobody_elses(settings: tuple[str, ...]) -> None:
    spec, layout = job(*settings)
    ours, theirs = both_ends(spec, layout, 1)
    buckets = layout.of_shard(1)
    assert len(buckets) > 1
    marks = itertools.count(1)
    written = {}
    for bucket in buckets:
        for round_ in (6, 7):
            for way, place in (("push", ours.contribution), ("pull", ours.average)):
                slot, mark = place(round_, bucket.number), next(marks) % 251
                slot[:] = mark
                written[way, round_, bucket.number] = mark
                codec = push_codec(layout, spec) if way == "push" else pull_codec(layout, spec, 1)
                codec = codec if bucket.kind is BucketKind.GRADIENT else state_codec(layout)
                assert slot.size == codec.payload_bytes(bucket.start, bucket.n)
    for (way, round_, number), mark in written.items():
        found = (theirs.contribution if way == "push" else theirs.average)(round_, number)
        assert np.all(found == mark)
    for memory in (ours, theirs):
        memory.close()


def test_two_rounds_later_a_slot_is_the_same_memory_and_one_round_later_another() -> None:
    spec, layout = job("codec.bits=8")
    ours, theirs = both_ends(spec, layout, 0)
    number = layout.of_shard(0)[0].number
    ours.contribution(4, number)[:] = 7
    ours.contribution(5, number)[:] = 8
    assert np.all(theirs.contribution(4, number) == 7)
    assert np.all(theirs.contribution(6, number) == 7)
    assert np.all(theirs.contribution(7, number) == 8)
    for memory in (ours, theirs):
        memory.close()
        memory.close()


def test_a_file_that_is_too_short_is_refused() -> None:
    spec, layout = job("codec.bits=8")
    memory = NodeMemory.make()
    with pytest.raises(PeerLostError, match=r"expected \d+ bytes of shared memory, got node_memory="):
        memory.lay_out(layout, spec, 0, grow=False)
    memory.close()


@contextmanager
def server_of_a_node(spec: JobSpec) -> Iterator[tuple[RunningServer, NodeMemory]]:
    """A running shard, and the memory that it shares with worker-0 as that worker has it."""
    ours, theirs = both_ends(spec, plan_layout(support.TENSORS, spec), 0)
    with running_server(spec, memory=theirs) as server:
        yield server, ours
    for memory in (ours, theirs):
        memory.close()


def test_a_worker_of_the_node_and_one_of_another_get_the_same_average_and_count_the_same_bytes() -> None:
    spec = support.job("workers=2", "codec.two_sided=true")
    with server_of_a_node(spec) as (server, memory), ThreadPoolExecutor(1) as pool:
        far = pool.submit(join, server.address, "worker-1")
        members = [join(server.address, "worker-0", memory=memory), far.result(DEADLINE_S)]
        layout = members[0].layout
        gradients = [np.full(layout.d, fill, np.float32) for fill in (1, 3)]
        states = [np.full(layout.e, fill, np.float32) for fill in (1, 3)]
        rounds = [
            lambda member=member, gradient=gradient, state=state: member.exchange.average(0, gradient, state, DIGEST)
            for member, gradient, state in zip(members, gradients, states, strict=True)
        ]
        near_traffic, far_traffic = in_threads(rounds)
        for member in members:
            member.vanish()
    for vector in (*gradients, *states):
        assert np.array_equal(vector, np.full(len(vector), 2, np.float32))
    headers = 8 * len(layout.buckets)  # lengths of payloads that are empty take fewer bytes
    assert near_traffic.pushed_bytes == pytest.approx(far_traffic.pushed_bytes, abs=headers)
    assert near_traffic.pulled_bytes == pytest.approx(far_traffic.pulled_bytes, abs=headers)
    assert near_traffic.pushed_bytes > layout.d


def test_a_payload_beside_the_memory_is_refused_by_the_server_and_the_right_contribution_still_counts() -> None:
    spec = support.job("workers=2", "codec.two_sided=true")
    with server_of_a_node(spec) as (server, memory), RawMember(spec, server, index=0) as member:
        stream, incarnation = member.open(node_memory=True)
        whole = member.contribution(incarnation, 0).contribution.payload
        stream.put(member.contribution(incarnation, 0))
        refused = stream.next_of("refusal")
        assert refused.reason == wire.REASON_CONTENT
        assert f"expected an empty payload (node_memory: it lies in shared memory), got payload_bytes={len(whole)}" in (
            refused.text
        )
        assert "(round 0, bucket 0, worker-0)" in refused.text
        gradient, state = np.ones(member.layout.d, np.float32), np.ones(member.layout.e, np.float32)
        with ThreadPoolExecutor(1) as pool:
            average = pool.submit(member.honest.exchange.average, 0, gradient, state, DIGEST)
            for bucket in range(len(member.layout.buckets)):
                payload = member.contribution(incarnation, bucket).contribution.payload
                memory.contribution(0, bucket)[:] = np.frombuffer(payload, np.uint8)
                stream.put(member.contribution(incarnation, bucket, payload=b""))
            average.result(DEADLINE_S)
        assert np.array_equal(gradient, np.ones(member.layout.d, np.float32))


def test_a_payload_beside_the_memory_ends_the_worker_that_receives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AverageMessage, "to", lambda message, _lane: message.whole)
    spec = support.job("workers=1", "codec.two_sided=true")
    with server_of_a_node(spec) as (server, memory):
        member = join(server.address, "worker-0", memory=memory)
        gradient, state = np.ones(member.layout.d, np.float32), np.ones(member.layout.e, np.float32)
        rule = r"expected an empty payload \(node_memory: .*\), got payload_bytes=\d+ \(round 0, bucket \d, server "
        with pytest.raises(MismatchError, match=rule):
            member.exchange.average(0, gradient, state, DIGEST)
        member.vanish()
