"""Memory that a worker and its node's shard share: places, and what a server refuses."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from common.config import JobSpec
from common.errors import PeerLostError
from common.layout import BucketKind, Layout, TensorSpec, plan_layout, pull_codec, push_codec, state_codec
from common.node_memory import NodeMemory
from common.spec_sources import load_job_spec

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
