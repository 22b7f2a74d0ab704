"""A gradient on a device under a codec of the CPU: copied out as it becomes final, averages back, in good order."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from common.codecs import RandomKey
from common.errors import MismatchError
from common.layout import Bucket, BucketKind, Layout, plan_layout
from common.wire.frames import BucketMessage
from tests.collective.support import collective, collective_members
from tests.gpu.exchanges import (
    ROUNDS,
    TENSORS,
    Announcing,
    Arrays,
    LongComputing,
    OnDevice,
    OnHost,
    Place,
    arrays_of,
    refusal_at,
    run_job,
    values_of,
)
from tests.gpu.queues import HostQueue, Machine, host_machine
from tests.support import DEADLINE_S, DIGEST, in_threads, job, members, running_servers
from worker.exchange import gradients
from worker.exchange.gradients import DeviceGradient, HostGradient, gradient_memory, has_kernels

CODECS = {
    "none": ("codec.name=none",),
    "fp16 2-sided": ("codec.name=fp16", "codec.two_sided=true"),
    "8 bits 2-sided": ("codec.two_sided=true", "codec.block=64"),
    "3 bits by layer 2-sided": ("codec.bits=3", "codec.block=layer", "codec.two_sided=true"),
    "paper": ("codec.name=paper", "codec.two_sided=true"),
    "rotated": ("codec.name=rotated", "codec.bits=2", "codec.two_sided=true", "codec.block=64"),
    "shared": ("codec.name=shared", "codec.bits=4", "codec.block=64"),
    "sign": ("codec.name=sign", "codec.block=64"),
    "topk": ("codec.name=topk", "codec.block=64", "codec.density=1/8"),
}
every_codec = pytest.mark.parametrize("codec", CODECS)
KEY = RandomKey(seed=0, round=0, source=0)


def machine_of(name: str) -> Machine:
    return host_machine(late=name == "late")


@cache
def on_the_host(codec: str, *, node_memory: bool = False) -> Arrays:
    return arrays_of(run_job(CODECS[codec], [OnHost(), OnHost()], node_memory=node_memory))


def assert_same(got: Arrays, expected: Arrays) -> None:
    assert got.keys() == expected.keys()
    assert {name for name in expected if not np.array_equal(got[name], expected[name])} == set()


# Whole rounds


@pytest.mark.parametrize("name", ["late", "at once"])
@every_codec
def test_a_gradient_on_a_device_is_pushed_and_averaged_to_the_bytes_of_the_host(codec: str, name: str) -> None:
    place = OnDevice(machine_of(name), kernels=None, shuffled=True)
    assert_same(arrays_of(run_job(CODECS[codec], [place, OnHost()])), on_the_host(codec))


@pytest.mark.parametrize("codec", ["none", "8 bits 2-sided", "topk"])
def test_payloads_in_the_nodes_memory_are_the_same(codec: str) -> None:
    place = OnDevice(machine_of("late"), kernels=None)
    accounts = run_job(CODECS[codec], [place, OnDevice(machine_of("late"), kernels=None)], node_memory=True)
    assert_same(arrays_of(accounts), on_the_host(codec, node_memory=True))


@pytest.mark.parametrize("codec", ["none", "fp16 2-sided", "8 bits 2-sided", "topk"])
def test_an_average_is_copied_back_while_the_device_computes_the_next_buckets(codec: str) -> None:
    place = LongComputing(machine_of("late"), kernels=None)
    arrays, expected = arrays_of(run_job(CODECS[codec], [place, OnHost(place.gate)])), on_the_host(codec)
    assert place.still_computing == [True] * ROUNDS
    for round_, first in enumerate(place.first_buckets):
        assert first
        assert first == expected[f"0 average {round_}"][: len(first)].tobytes()
    assert_same(arrays, expected)


@every_codec
def test_a_gradient_that_is_not_finite_is_refused_in_the_words_of_the_host(codec: str) -> None:
    expected = refusal_at(OnHost(), CODECS[codec])
    assert expected.endswith("worker-0, round 0, layer fc.weight")
    assert refusal_at(OnDevice(machine_of("late"), kernels=None), CODECS[codec]) == expected


@pytest.mark.parametrize("codec", [("codec.name=none",), ("codec.bits=8",), ("codec.name=paper",)], ids=" ".join)
def test_collectives_average_a_gradient_on_a_device_as_one_on_the_host(codec: tuple[str, ...]) -> None:
    def averages(place_of: Callable[[], Place]) -> list[bytes]:
        spec = collective("workers=2", "exchange.bucket_bytes=1024", *codec)
        with running_servers(spec) as servers, collective_members(spec, servers[0].address) as joined:

            def work(worker: int) -> bytes:
                member, place, content = joined[worker], place_of(), b""
                memory = place.memory(member.layout)
                for round_ in range(ROUNDS):
                    member.exchange.begin(round_, memory, DIGEST)
                    place.compute(values_of(member.layout, worker, round_), member.exchange.ready)
                    member.exchange.finish(np.zeros(member.layout.e, np.float32))
                    content += place.average().tobytes()
                member.leave()
                return content

            return in_threads([lambda w=w: work(w) for w in range(2)])

    on_device = averages(lambda: OnDevice(machine_of("late"), kernels=None, shuffled=True))
    on_host = averages(OnHost)
    assert on_device == on_host
    assert on_host[0] == on_host[1]


@pytest.mark.parametrize("topology", ["dedicated", "collective"])
def test_a_bucket_leaves_the_device_as_soon_as_it_is_final_whatever_its_turn(topology: str) -> None:
    spec = job("workers=1", "exchange.bucket_bytes=1024", f"exchange.topology={topology}", "codec.name=paper")
    together = collective_members if topology == "collective" else members
    with running_servers(spec) as servers, together(spec, servers[0].address) as (member,):
        machine, last = machine_of("late"), member.layout.of_kind(BucketKind.GRADIENT)[-1]
        gradient = torch.zeros(member.layout.d)
        memory = Announcing(gradient, member.layout, out=machine.side, back=machine.back)
        member.exchange.begin(0, memory, DIGEST)
        assert memory._read == {}
        member.exchange.ready([last.number])
        assert memory.leaving.get(timeout=DEADLINE_S) == {last.number}


def test_an_average_of_what_has_not_been_contributed_is_refused() -> None:
    spec = job("workers=1", "codec.name=none")
    with running_servers(spec) as servers, members(spec, servers[0].address) as (member,):
        exchange, layout = member.exchange, member.layout
        gradient = np.ones(layout.d, np.float32)
        exchange.begin(0, HostGradient(gradient), DIGEST)
        bucket, stream = layout.buckets[0], exchange._streams[0]
        early = BucketMessage(
            view=1,
            round=0,
            bucket=0,
            codec="none",
            payload=memoryview(np.zeros(bucket.n, np.float32)).cast("B"),
            incarnation=stream.incarnation or 0,
        )
        with pytest.raises(MismatchError, match=r"what this worker has contributed to, got average=early .*bucket 0"):
            exchange._average_received(stream, early)
        assert np.array_equal(gradient, np.ones(layout.d, np.float32))


# The order of one round's work


class Rig:
    """A gradient of some buckets on a machine whose queues all work late."""

    def __init__(self, part: slice = slice(None)) -> None:
        self.machine = host_machine(late=True)
        self.layout: Layout = plan_layout(TENSORS, job("workers=1", "exchange.bucket_bytes=1024", "codec.name=none"))
        self.buckets = self.layout.of_kind(BucketKind.GRADIENT)
        self.gradient = torch.full((self.layout.d,), torch.nan)
        queues = {"out": self.machine.side, "back": self.machine.back}
        self.memory = DeviceGradient(self.gradient, self.layout, part=part, **queues)
        self.memory.begin(KEY)

    @property
    def computed(self) -> int:
        """Pieces of work that the stream that computes has done."""
        return self.machine.current.done

    def compute(self, bucket: Bucket, value: float) -> None:
        """Has a bucket computed, later, and says that it is final."""
        self.machine.current.run(lambda: self.gradient[bucket.start : bucket.stop].fill_(value))
        self.memory.final([bucket.number])

    def take(self, bucket: Bucket, average: float) -> None:
        """What the host does about an average."""
        self.memory.room(bucket)[:] = average
        self.memory.store(bucket)


def test_a_bucket_is_fetched_when_it_is_final_and_what_is_computed_after_it_is_not_waited_for() -> None:
    rig = Rig()
    for value, bucket in enumerate(rig.buckets):
        rig.compute(bucket, value)
    assert rig.computed == 0
    for value, bucket in enumerate(rig.buckets[:3]):
        assert np.array_equal(rig.memory.fetch(bucket), np.full(bucket.n, value, np.float32))
        assert rig.computed == value + 1


def test_a_bucket_that_is_final_leaves_without_being_fetched() -> None:
    rig = Rig()
    for bucket in rig.buckets:
        rig.compute(bucket, 7)
    rig.memory.start()
    assert isinstance(rig.machine.side, HostQueue)
    rig.machine.side.mark().synchronize()
    for bucket in rig.buckets:
        assert np.array_equal(rig.memory.room(bucket), np.full(bucket.n, 7, np.float32))


def test_the_whole_vector_waits_for_all_buckets() -> None:
    rig = Rig()
    for value, bucket in enumerate(rig.buckets):
        rig.compute(bucket, value)
    expected = np.concatenate([np.full(bucket.n, value, np.float32) for value, bucket in enumerate(rig.buckets)])
    assert np.array_equal(rig.memory.whole(), expected)


def test_an_average_replaces_its_bucket_without_waiting_for_what_is_computed_meanwhile() -> None:
    rig = Rig()
    first, second = rig.buckets[:2]
    rig.compute(first, 1)
    rig.compute(second, 2)
    rig.memory.fetch(first)
    rig.take(first, 10)
    rig.machine.back.mark().synchronize()
    assert torch.equal(rig.gradient[: first.stop], torch.full((first.n,), 10.0))
    assert rig.computed == 1
    assert np.array_equal(rig.memory.fetch(second), np.full(second.n, 2, np.float32))


def test_an_average_cannot_come_before_its_bucket_has_left() -> None:
    rig = Rig()
    rig.compute(rig.buckets[0], 1)
    with pytest.raises(KeyError):
        rig.take(rig.buckets[0], 10)


def test_what_is_computed_after_a_round_sees_its_averages_and_the_next_round_its_own_values() -> None:
    rig = Rig()
    seen = []
    for round_ in range(3):
        rig.memory.begin(KEY)
        for bucket in rig.buckets:
            rig.compute(bucket, 100 * round_ + bucket.number)
        for bucket in rig.buckets:
            fetched = rig.memory.fetch(bucket)
            assert np.array_equal(fetched, np.full(bucket.n, 100 * round_ + bucket.number, np.float32))
            rig.take(bucket, -round_ - bucket.number)
        rig.memory.settle()
        rig.machine.current.run(lambda: seen.append(rig.gradient.clone()))
    rig.machine.current.mark().synchronize()
    for round_, vector in enumerate(seen):
        expected = [torch.full((bucket.n,), float(-round_ - bucket.number)) for bucket in rig.buckets]
        assert torch.equal(vector, torch.cat(expected))


def test_only_the_exchanged_part_leaves_the_device() -> None:
    buckets = Rig().buckets
    own = buckets[2:5]
    rig = Rig(slice(own[0].start, own[-1].stop))
    for value, bucket in enumerate(rig.buckets):
        rig.compute(bucket, value)
    for bucket in own:
        assert np.array_equal(rig.memory.fetch(bucket), np.full(bucket.n, rig.buckets.index(bucket), np.float32))
    assert rig.memory.whole().nbytes == 4 * sum(bucket.n for bucket in own)
    with pytest.raises(KeyError):
        rig.memory.fetch(buckets[5])


def test_a_gradient_on_the_host_is_exchanged_in_its_own_memory() -> None:
    layout = plan_layout(TENSORS, job("workers=1"))
    gradient = torch.zeros(layout.d)
    memory = gradient_memory(gradient, layout, job("workers=1"))
    assert isinstance(memory, HostGradient)
    for vector in (memory.whole(), memory.room(layout.buckets[0]), memory.fetch(layout.buckets[0])):
        assert vector.ctypes.data == gradient.data_ptr()


def test_where_kernels_do_not_compile_the_cpu_encodes_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_memory: DeviceGradient) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC")

    spec = job("workers=1")
    layout = plan_layout(TENSORS, spec)
    monkeypatch.setattr(gradients, "available", lambda _: True)
    monkeypatch.setattr(gradients, "SideStream", lambda _: HostQueue(late=True))
    monkeypatch.setattr(DeviceGradient, "warm", lambda _: None)
    with_kernels = gradient_memory(torch.zeros(layout.d, device="meta"), layout, spec)
    monkeypatch.setattr(DeviceGradient, "warm", broken)
    with pytest.warns(UserWarning, match=r"encoded on the CPU: kernels do not work here: Failed to find C compiler\.$"):
        without = gradient_memory(torch.zeros(layout.d, device="meta"), layout, spec)
    assert isinstance(with_kernels, DeviceGradient)
    assert isinstance(without, DeviceGradient)
    assert (with_kernels._encoder is None, without._encoder is None) == (False, True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), True),
        (("codec.bits=16", "codec.scale=l2"), True),
        (("codec.block=layer",), False),
        (("codec.block=all",), False),
        (("codec.name=paper",), False),
        (("codec.name=shared",), False),
    ],
    ids=lambda value: value if isinstance(value, bool) else " ".join(value) or "default",
)
def test_kernels_are_for_scales_that_lie_within_a_bucket(settings: tuple[str, ...], expected: bool) -> None:
    assert has_kernels(job(*settings).codec) is expected
