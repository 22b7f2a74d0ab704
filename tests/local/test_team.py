"""What local processes do together: parts, slices, sums; over gloo, in threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import SpecError
from common.layout import BucketKind, plan_layout
from tests.local.support import CPU, WAIT_S, join_store, together, with_groups
from tests.support import TENSORS, job
from worker.exchange.base import Traffic
from worker.local import group as group_module
from worker.local.devices import describe, parse_devices
from worker.local.group import GroupBrokenError, LocalGroup, Store
from worker.local.team import LocalTeam, slice_edges
from worker.metrics import METRICS, RoundMetrics


@pytest.mark.parametrize(
    ("text", "devices"),
    [
        ("cpu", ("cpu",)),
        ("cpu:1", ("cpu",)),
        ("cpu:3", ("cpu", "cpu", "cpu")),
        ("cuda", ("cuda",)),
        ("cuda:0,cuda:1", ("cuda:0", "cuda:1")),
        (" cuda:3 , cuda:1 ", ("cuda:3", "cuda:1")),
    ],
)
def test_a_list_of_devices_names_one_for_each_process(text: str, devices: tuple[str, ...]) -> None:
    assert parse_devices(text) == devices


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cpu:0",
        "cpu:-1",
        "cpu:x",
        "cpu:1000",
        "cpu,cpu",
        "cpu:2,cuda:0",
        "cuda:0,cuda:0",
        "cuda,cuda:1",
        "gpu:0",
        "2",
    ],
)
def test_any_other_list_of_devices_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"expected cpu:N .*, got devices="):
        parse_devices(text)


def test_a_process_is_named_by_its_number_and_device() -> None:
    assert describe(("cuda:0", "cuda:2"), 1) == "local process 1 of 2 (cuda:2)"


@pytest.mark.parametrize(("batch", "size", "expected"), [(8, 2, [4, 4]), (8, 3, [2, 3, 3]), (3, 3, [1, 1, 1])])
def test_parts_of_the_batch_are_contiguous_and_differ_by_at_most_one(
    batch: int, size: int, expected: list[int]
) -> None:
    spec = job(f"data.batch_per_worker={batch}")
    parts = [range(batch)[LocalTeam(spec, rank, size).part] for rank in range(size)]
    assert [len(part) for part in parts] == expected
    assert [sample for part in parts for sample in part] == list(range(batch))


def test_more_processes_than_samples_are_refused() -> None:
    with pytest.raises(SpecError, match="batch_per_worker of at least 3, one for each local process, got"):
        LocalTeam(job("data.batch_per_worker=2"), 0, 3)


@pytest.mark.parametrize("codec", [("codec.block=64",), ("codec.block=all", "codec.two_sided=true")], ids=" ".join)
def test_every_bucket_is_carried_by_one_process_and_slices_are_runs_of_them(codec: tuple[str, ...]) -> None:
    spec = job("servers=2", "exchange.bucket_bytes=1024", *codec)
    layout = plan_layout(TENSORS, spec)
    edges = slice_edges(layout, 3)
    lengths = [stop - start for start, stop in pairwise(edges)]
    longest = max(bucket.n for bucket in layout.buckets)
    assert max(lengths) - min(lengths) <= longest
    carried = []
    for rank in range(3):
        team = LocalTeam(spec, rank, 3)
        shares = team.divide(layout)
        own = team.carried(layout)
        gradient = [b for b in layout.buckets if b.number in own and b.kind is BucketKind.GRADIENT]
        assert sum(bucket.n for bucket in gradient) == lengths[rank]
        assert all(shares.start <= bucket.start and bucket.stop <= shares.stop for bucket in gradient)
        assert any(b.kind is BucketKind.STATE for b in layout.buckets if b.number in own) is (rank == 0)
        carried += own
    assert sorted(carried) == list(range(len(layout.buckets)))


def teams(size: int, *settings: str) -> tuple[Any, Any]:
    """A layout and what runs `work(team, rank)` in `size` threads."""
    spec = job("exchange.bucket_bytes=1024", *settings)
    layout = plan_layout(TENSORS, spec)
    store = Store()

    def run(rank: int, work: Any) -> Any:
        team = LocalTeam(spec, rank, size)
        team.divide(layout)
        team.meet(store.store if rank == 0 else join_store(store.port), CPU)
        return work(team, rank)

    return layout, lambda work: together([lambda rank=rank: run(rank, work) for rank in range(size)])


def test_the_gradient_is_the_mean_over_the_batch_added_in_the_order_of_the_processes() -> None:
    layout, run = teams(3, "data.batch_per_worker=8")
    gradients = [torch.randn(layout.d, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]

    def work(team: LocalTeam, rank: int) -> torch.Tensor:
        own = gradients[rank].clone()
        team.average_gradient(own)
        outside = torch.cat([own[: team.own.start], own[team.own.stop :]])
        theirs = torch.cat([gradients[rank][: team.own.start], gradients[rank][team.own.stop :]])
        assert torch.equal(outside, theirs)  # other slices are the others'
        return own[team.own]

    average = torch.cat(run(work))
    weights = [np.float32(part * 3 / 8) for part in (2, 3, 3)]
    rows = [gradient.numpy() * weight for gradient, weight in zip(gradients, weights, strict=True)]
    expected = ((rows[0] + rows[1]) + rows[2]) / np.float32(3)  # every operation rounds: none is fused with another
    assert np.array_equal(average.numpy(), expected)
    exact = sum(g.double() * n for g, n in zip(gradients, (2, 3, 3), strict=True)) / 8
    assert torch.allclose(average.double(), exact, rtol=1e-5, atol=1e-7)


def test_equal_parts_are_averaged_as_a_server_averages_workers() -> None:
    layout, run = teams(3, "data.batch_per_worker=9")
    gradients = [torch.randn(layout.d, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]

    def work(team: LocalTeam, rank: int) -> torch.Tensor:
        own = gradients[rank].clone()
        team.average_gradient(own)
        return own[team.own]

    total = gradients[0].numpy().copy()
    for gradient in gradients[1:]:
        total += gradient.numpy()
    assert np.array_equal(torch.cat(run(work)).numpy(), total / np.float32(3))


def test_buffers_are_averaged_by_the_sizes_of_the_parts_and_counts_are_added() -> None:
    _, run = teams(2, "data.batch_per_worker=8")
    loss = (1.0, 2.0)

    def work(team: LocalTeam, rank: int) -> np.ndarray:
        metrics = RoundMetrics(loss=loss[rank], train_samples=4, train_correct=rank, evaluation_samples=10 + rank)
        return team.average_state(np.concatenate([[1.0 + rank, -0.0], metrics.to_vector()]).astype(np.float32))

    first, second = run(work)
    assert np.array_equal(first, second)
    assert first[:2].tolist() == [1.5, 0.0]
    total = RoundMetrics.from_average(first[-METRICS:], 1)
    assert (total.loss, total.train_samples, total.train_correct, total.evaluation_samples) == (1.5, 8, 1, 21)


def test_everyone_hears_the_average_state_and_the_traffic_of_all() -> None:
    _, run = teams(3, "data.batch_per_worker=9")

    def work(team: LocalTeam, rank: int) -> tuple[list[float], Traffic]:
        state = np.full(4, rank + 7, np.float32)
        own = Traffic(pushed_bytes=100 + rank, pulled_bytes=10 * rank, seconds=float(rank), waited_s=2.0 - rank)
        return state.tolist(), team.conclude(state, own), state.tolist()

    for before, traffic, after in run(work):
        assert after == [7.0] * 4
        assert before[0] in (7.0, 8.0, 9.0)
        assert traffic == Traffic(pushed_bytes=303, pulled_bytes=30, seconds=2.0, waited_s=2.0)


def test_a_process_that_goes_away_breaks_the_group_of_the_others() -> None:
    def work(group: LocalGroup, rank: int) -> str:
        if rank == 1:
            return ""  # its group, and with it its connections, end with this thread
        with pytest.raises(
            GroupBrokenError, match="the local processes of this worker: lost while gathering: "
        ) as error:
            group.gather(torch.zeros(2), (0, 1, 2))
        return str(error.value)

    text, _ = with_groups(2, work)
    assert "\n" not in text


def test_a_process_that_is_told_to_give_up_does_not_wait_for_one_that_will_not_call() -> None:
    handed: queue.SimpleQueue[LocalGroup] = queue.SimpleQueue()
    given_up = threading.Event()

    def work(group: LocalGroup, rank: int) -> LocalGroup:
        if rank == 1:
            handed.get(timeout=WAIT_S).abort()
            assert given_up.wait(WAIT_S)
            return group
        handed.put(group)
        with pytest.raises(GroupBrokenError, match="lost while gathering: another one has failed"):
            group.gather(torch.zeros(1), (0, 0, 1))
        given_up.set()
        return group

    groups = with_groups(2, work)
    groups.pop()  # rank 1's first: the call that rank 0 has left behind ends with it, and only then can rank 0's end
    groups.pop()


def test_processes_that_do_not_come_are_not_waited_for_as_long_as_a_round_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(group_module, "MEETING_S", 0.2)
    store, started_s = Store(), time.monotonic()
    with pytest.raises(GroupBrokenError, match="the others did not come"):
        LocalGroup(store.store, 0, 2, CPU, WAIT_S)
    assert time.monotonic() - started_s < WAIT_S / 4


def gather(group: LocalGroup) -> None:
    group.gather(torch.zeros(2), (0, 1, 2))


def add(group: LocalGroup) -> None:
    group.add_slices(torch.zeros(2), (0, 1, 2), (1.0, 1.0))


@pytest.mark.parametrize(("call", "what"), [(gather, "gathering"), (add, "adding gradients")])
def test_a_process_that_is_too_late_for_a_call_breaks_the_group_in_the_time_that_it_was_given(
    call: Callable[[LocalGroup], None], what: str
) -> None:
    store, over = Store(), threading.Event()

    def late() -> None:
        group = LocalGroup(join_store(store.port), 1, 2, CPU, 0.3)
        over.wait(WAIT_S)
        del group

    def waits() -> None:
        group = LocalGroup(store.store, 0, 2, CPU, 0.3)
        try:
            with pytest.raises(GroupBrokenError, match=f"lost while {what}: "):
                call(group)
        finally:
            over.set()

    started_s = time.monotonic()
    together([waits, late])
    assert time.monotonic() - started_s < WAIT_S / 4
