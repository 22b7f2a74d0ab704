"""How far workers may run ahead of each other at one shard, with no network and no clock."""

from __future__ import annotations

import random

import pytest

from ps.lanes import Lane, Lanes
from ps.streams import Outbox

BUCKETS = range(4)
KILOBYTE = 1 << 10


def lanes_of(workers: int, *, window_bytes: int, abreast_bytes: int) -> tuple[Lanes, list[Lane]]:
    """One lane for each worker, with all buckets."""
    lanes = Lanes(workers, window_bytes, abreast_bytes)
    each = [Lane(worker, frozenset(BUCKETS), Outbox(limit=8)) for worker in range(workers)]
    for lane in each:
        lanes.add(lane)
    return lanes, each


def contribute(lanes: Lanes, lane: Lane, bucket: int) -> None:
    lanes.contributed(lane, bucket, KILOBYTE)


def test_while_one_has_not_begun_the_others_fill_the_window_and_no_more() -> None:
    lanes, (first, second, _) = lanes_of(3, window_bytes=3 * KILOBYTE, abreast_bytes=KILOBYTE)
    for bucket in range(3):
        contribute(lanes, first, bucket)
        assert first.room.is_set()
    contribute(lanes, first, 3)
    assert not first.room.is_set()
    assert second.room.is_set()


def test_once_all_have_begun_they_stay_abreast() -> None:
    lanes, (first, second) = lanes_of(2, window_bytes=3 * KILOBYTE, abreast_bytes=KILOBYTE)
    contribute(lanes, first, 0)
    contribute(lanes, first, 1)
    contribute(lanes, first, 2)
    assert first.room.is_set()
    contribute(lanes, second, 0)
    assert not first.room.is_set()  # three ahead of what is added
    lanes.added(0)
    lanes.added(0)
    assert not first.room.is_set()  # still two
    contribute(lanes, second, 1)
    lanes.added(1)
    assert not first.room.is_set()  # bucket 1 is not added by both yet
    lanes.added(1)
    assert first.room.is_set()
    assert first.ahead_bytes == KILOBYTE
    assert second.ahead_bytes == 0


def test_a_window_smaller_than_the_abreast_limit_holds_always() -> None:
    lanes, (first, second) = lanes_of(2, window_bytes=KILOBYTE, abreast_bytes=3 * KILOBYTE)
    contribute(lanes, second, 0)
    contribute(lanes, first, 0)
    contribute(lanes, first, 1)
    assert not first.room.is_set()


def test_with_a_new_round_the_window_is_whole_again() -> None:
    lanes, (first, second) = lanes_of(2, window_bytes=3 * KILOBYTE, abreast_bytes=0)
    for lane in (first, second):
        contribute(lanes, lane, 0)
        lanes.added(0)
    assert first.room.is_set()
    lanes.open_round()
    contribute(lanes, first, 0)
    assert first.room.is_set()  # the other has not begun this round
    contribute(lanes, second, 1)
    assert not first.room.is_set()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_the_order_and_however_workers_divide_their_buckets_nobody_waits_for_ever(seed: int) -> None:
    dice = random.Random(seed)
    workers, buckets = dice.randint(1, 4), dice.randint(1, 12)
    lanes = Lanes(workers, dice.choice([0, 2, 5]) * KILOBYTE, dice.choice([0, 1, 3]) * KILOBYTE)
    to_push: list[tuple[Lane, list[int]]] = []
    for worker in range(workers):
        streams = dice.randint(1, 3)
        for stream in range(streams):
            own = [bucket for bucket in range(buckets) if bucket % streams == stream]
            lane = Lane(worker, frozenset(own), Outbox(limit=8))
            lanes.add(lane)
            to_push.append((lane, own))
    received: dict[int, set[int]] = {bucket: set() for bucket in range(buckets)}
    added = dict.fromkeys(range(buckets), 0)
    while unread := [(lane, own) for lane, own in to_push if own]:
        able = [(lane, own) for lane, own in unread if lane.room.is_set()]
        assert able, "every lane that has something to push waits for another one"
        lane, own = dice.choice(able)
        bucket = own.pop(0)
        contribute(lanes, lane, bucket)
        received[bucket].add(lane.worker)
        _add_in_order(lanes, received[bucket], added, bucket)
    assert set(added.values()) == {workers}
    assert all(lane.ahead_bytes == 0 for lane, _ in to_push)


def _add_in_order(lanes: Lanes, received: set[int], added: dict[int, int], bucket: int) -> None:
    """As the rounds do: in the order of worker_index."""
    while added[bucket] in received:
        added[bucket] += 1
        lanes.added(bucket)
