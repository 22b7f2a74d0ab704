"""The rules on top of `worker/session.py`, one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.session import (
    Aborted,
    Accept,
    AverageReceived,
    BeginRound,
    BucketEncoded,
    Complete,
    Drop,
    Effect,
    Event,
    Fail,
    Failure,
    Forget,
    Push,
    Refused,
    Session,
    ShardLost,
    Welcomed,
)

SHARD_OF = (0, 0, 1)
"""Buckets 0 and 1 belong to shard 0, bucket 2 to shard 1."""


def welcomed(shard: int, round_: int = 0, missing: tuple[int, ...] | None = None) -> Welcomed:
    lacking = [b for b, s in enumerate(SHARD_OF) if s == shard] if missing is None else missing
    return Welcomed(shard=shard, round=round_, missing=frozenset(lacking))


def average(bucket: int, round_: int = 0) -> AverageReceived:
    return AverageReceived(round=round_, bucket=bucket)


def push(bucket: int, round_: int = 0) -> Push:
    return Push(shard=SHARD_OF[bucket], round=round_, bucket=bucket)


def run(session: Session, *events: Event) -> list[Effect]:
    return [effect for event in events for effect in session.handle(event)]


def opened(*, first_round: int = 0, reconnects: bool = False) -> Session:
    """A session with both shards open, in no round yet."""
    session = Session(SHARD_OF, first_round=first_round, reconnects=reconnects)
    assert run(session, welcomed(0, first_round), welcomed(1, first_round)) == []
    return session


def encode_all() -> list[Event]:
    return [BucketEncoded(bucket=bucket) for bucket in range(len(SHARD_OF))]


def run_round(session: Session, round_: int) -> list[Effect]:
    averages = [average(bucket, round_) for bucket in range(len(SHARD_OF))]
    return run(session, BeginRound(round=round_), *encode_all(), *averages)


# Rule 1: pushes


def test_bucket_is_pushed_to_its_shard_as_soon_as_it_is_encoded() -> None:
    """Rule 1: "its buckets are pushed as they are encoded, to shards that are open"."""
    session = opened()
    assert run(session, BeginRound(round=0)) == []
    assert run(session, BucketEncoded(bucket=2)) == [Push(shard=1, round=0, bucket=2)]
    assert run(session, BucketEncoded(bucket=0)) == [Push(shard=0, round=0, bucket=0)]


def test_bucket_of_a_shard_that_is_not_open_waits() -> None:
    """Rule 1: "to shards that are open"."""
    session = Session(SHARD_OF, first_round=0)
    run(session, welcomed(1))
    assert run(session, BeginRound(round=0), *encode_all()) == [push(2)]


# Rule 2: Welcome


def test_welcome_pushes_the_encoded_buckets_that_the_shard_lacks() -> None:
    """Rule 2: "encoded ones among them are pushed again"; the others follow when they are encoded."""
    session = Session(SHARD_OF, first_round=0)
    run(session, BeginRound(round=0), BucketEncoded(bucket=1), BucketEncoded(bucket=2))
    assert run(session, welcomed(0)) == [push(1)]
    assert run(session, BucketEncoded(bucket=0)) == [push(0)]


def test_welcome_after_a_reconnect_pushes_just_what_is_missing() -> None:
    """Rule 2; DESIGN, section 4: "the worker re-sends just those"."""
    session = opened(reconnects=True)
    run(session, BeginRound(round=0), *encode_all(), ShardLost(shard=0, text=""))
    assert run(session, welcomed(0, missing=(1,))) == [push(1)]
    run(session, ShardLost(shard=0, text=""))
    assert run(session, welcomed(0, missing=())) == []


def test_welcome_before_the_round_begins_pushes_nothing() -> None:
    """Rules 1 and 2: what was encoded belongs to the round before."""
    session = opened(reconnects=True)
    run_round(session, 0)
    assert run(session, ShardLost(shard=0, text=""), welcomed(0, round_=1)) == []
    assert run(session, BeginRound(round=1), BucketEncoded(bucket=0)) == [push(0, 1)]


def test_welcome_of_a_shard_that_is_one_round_ahead_pushes_nothing() -> None:
    """Rule 2: it has closed our round and sends us its averages; it must not get this round's contributions."""
    session = opened(reconnects=True)
    run(session, BeginRound(round=0), *encode_all(), ShardLost(shard=0, text=""))
    assert run(session, welcomed(0, round_=1)) == []
    assert run(session, average(0), average(1), average(2))[-1] == Complete(round=0)


@pytest.mark.parametrize("round_", [0, 3, 9])
def test_welcome_of_a_shard_in_another_round_fails_the_session(round_: int) -> None:
    """Rule 2: the round that is open there must be the one that is needed here, or the next."""
    session = opened(first_round=1, reconnects=True)
    run(session, BeginRound(round=1))
    text = f"shard 1 has round {round_} open, this worker needs round 1"
    assert run(session, welcomed(1, round_)) == [Fail(text=text, failure=Failure.MISMATCH)]


# Rule 3: averages


def test_each_average_is_accepted_once() -> None:
    """Rule 3: "Each bucket's average is accepted once, in the current round; a copy of it ... is dropped"."""
    session = opened()
    run(session, BeginRound(round=0))
    assert run(session, average(1), average(1)) == [Accept(round=0, bucket=1), Drop(round=0, bucket=1)]


def test_average_of_the_round_before_is_dropped() -> None:
    """Rule 3: "an average of the round before, is dropped", between rounds and in the next one."""
    session = opened()
    run_round(session, 0)
    assert run(session, average(1)) == [Drop(round=0, bucket=1)]
    assert run(session, BeginRound(round=1), average(1)) == [Drop(round=0, bucket=1)]
    assert run(session, average(1, 1)) == [Accept(round=1, bucket=1)]


@pytest.mark.parametrize("begun", [False, True])
def test_average_of_a_later_round_breaks_the_protocol(begun: bool) -> None:
    """Rule 3: "An average of a later round breaks the protocol"."""
    session = opened()
    if begun:
        run(session, BeginRound(round=0))
    round_ = 1 if begun else 0
    text = f"got an average of round {round_} in round {round_ - 1} (bucket 2)"
    assert run(session, average(2, round_)) == [Fail(text=text, failure=Failure.MISMATCH)]


# Rule 4: completion


def test_round_is_complete_with_the_last_average_in_whatever_order() -> None:
    """Rule 4: "A round is complete when all averages are accepted"."""
    session = opened()
    run(session, BeginRound(round=0), *encode_all())
    effects = run(session, average(2), average(0), average(1))
    assert [effect for effect in effects if not isinstance(effect, Accept)] == [Complete(round=0)]
    assert session.complete


@pytest.mark.parametrize("round_", [0, 1, 2])
def test_next_round_cannot_begin_before_the_last_is_complete(round_: int) -> None:
    """Rule 4: "Only then can the next one begin"; a caller's mistake, not a peer's, hence an exception."""
    session = opened()
    run(session, BeginRound(round=0), average(0), average(1))
    with pytest.raises(ValueError, match=f"round {round_} cannot begin: round 0 is the last, complete=False"):
        session.handle(BeginRound(round=round_))


@pytest.mark.parametrize("round_", [3, 5])
def test_rounds_begin_one_after_the_other(round_: int) -> None:
    """Rule 4."""
    with pytest.raises(ValueError, match=f"round {round_} cannot begin"):
        opened(first_round=4).handle(BeginRound(round=round_))


def test_hello_needs_this_round_until_it_is_complete_and_then_the_next() -> None:
    """Rule 4: `needed_round`."""
    session = opened(first_round=4)
    assert session.needed_round == 4
    run(session, BeginRound(round=4), average(0, 4), average(1, 4))
    assert session.needed_round == 4
    run(session, average(2, 4))
    assert session.needed_round == 5


# Rule 5: what is kept


def test_contributions_of_the_round_before_are_kept_until_this_one_is_complete() -> None:
    """Rule 5."""
    session = opened()
    assert not any(isinstance(effect, Forget) for effect in run_round(session, 0))
    second = run_round(session, 1)
    assert second[-2:] == [Forget(round=0), Complete(round=1)]
    assert [effect for effect in second if isinstance(effect, Forget)] == [Forget(round=0)]


def test_first_round_after_a_resume_forgets_nothing() -> None:
    """Rule 5: there is no round before it."""
    assert run_round(opened(first_round=9), 9)[-2:] == [Accept(round=9, bucket=2), Complete(round=9)]


# Rule 6: refusals and aborts


def test_refusal_fails_the_session_and_names_the_shard() -> None:
    """Rule 6: "A refused contribution ... fails the session"."""
    effects = run(opened(), Refused(shard=1, text="expected view=1, got view=2"))
    assert effects == [Fail(text="shard 1 refuses: expected view=1, got view=2", failure=Failure.MISMATCH)]


@pytest.mark.parametrize(("retry", "failure"), [(True, Failure.PEER_LOST), (False, Failure.MISMATCH)])
def test_abort_fails_the_session_with_its_text(retry: bool, failure: Failure) -> None:
    """Rule 6: "or an Abort, fails the session"."""
    assert run(opened(), Aborted(text="bob is gone", retry=retry)) == [Fail(text="bob is gone", failure=failure)]


# Rule 7: lost shards


def test_lost_shard_fails_the_session() -> None:
    """Rule 7: "the session fails, naming it"; the shell's text has the address."""
    lost = ShardLost(shard=1, text="server 10.0.0.1:5 (shard 1) is gone")
    assert run(opened(), lost) == [Fail(text=lost.text, failure=Failure.PEER_LOST)]


def test_lost_shard_closes_until_it_is_welcomed_anew_if_the_session_reconnects() -> None:
    """Rule 7: "A shard that is lost closes; ... unless it is told to wait for a new stream"."""
    session = opened(reconnects=True)
    run(session, BeginRound(round=0))
    assert run(session, ShardLost(shard=0, text="gone")) == []
    assert run(session, *encode_all()) == [push(2)]
    assert run(session, welcomed(0)) == [push(0), push(1)]


def test_nothing_happens_after_a_failure() -> None:
    """Rules 6 and 7: a failed session stays failed, and says so once."""
    session = opened()
    run(session, BeginRound(round=0), ShardLost(shard=0, text="gone"))
    after: list[Event] = [average(0), *encode_all(), welcomed(0), Aborted(text="", retry=True), BeginRound(round=7)]
    assert run(session, *after) == []
    assert session.failed


# What all rules rest on


def test_events_and_effects_carry_no_tensors() -> None:
    """DESIGN, section 4."""
    for kind in (*get_args(Event), *get_args(Effect)):
        assert {str(column.type) for column in fields(kind)} <= {"int", "str", "bool", "frozenset[int]", "Failure"}


@dataclass
class Oracle:
    """A session that reconnects, told by the shards' full `missing`, in the plainest words; rounds begin at once."""

    round: int = 0
    open: set[int] = field(default_factory=set)
    encoded: set[int] = field(default_factory=set)
    accepted: set[int] = field(default_factory=set)
    kept: bool = False

    def effects(self, event: Event) -> list[Effect]:
        match event:
            case Welcomed():
                self.open.add(event.shard)
                return [push(bucket, self.round) for bucket in sorted(self.encoded & event.missing)]
            case ShardLost():
                self.open.discard(event.shard)
                return []
            case BucketEncoded():
                self.encoded.add(event.bucket)
                return [push(event.bucket, self.round)] if SHARD_OF[event.bucket] in self.open else []
            case AverageReceived() if event.round < self.round or event.bucket in self.accepted:
                return [Drop(round=event.round, bucket=event.bucket)]
            case AverageReceived():
                self.accepted.add(event.bucket)
                accept = Accept(round=self.round, bucket=event.bucket)
                return [accept, *self._completion()] if len(self.accepted) == len(SHARD_OF) else [accept]
        raise AssertionError(event)

    def _completion(self) -> list[Effect]:
        forget: list[Effect] = [Forget(round=self.round - 1)] if self.kept else []
        effects = [*forget, Complete(round=self.round)]
        self.round, self.kept = self.round + 1, bool(self.encoded)
        self.encoded, self.accepted = set(), set()
        return effects


kinds = st.sampled_from(["average", "average", "late average", "encode", "lose", "welcome"])


@given(st.lists(st.tuples(kinds, st.integers(0, 2)), max_size=60))
@settings(max_examples=150, deadline=None)
def test_session_agrees_with_the_naive_one_in_any_order(drawn: list[tuple[str, int]]) -> None:
    """Rules 1 to 5 and 7 together; and the same trace gives the same effects."""
    session, oracle, trace = Session(SHARD_OF, first_round=0, reconnects=True), Oracle(), list[Event]()
    for kind, bucket in [("begin", 0), *drawn]:
        shard, round_ = SHARD_OF[bucket], session.round
        events: dict[str, Event] = {
            "average": average(bucket, round_),
            "late average": average(bucket, round_ - 1),
            "encode": BucketEncoded(bucket=bucket),
            "lose": ShardLost(shard=shard, text="gone"),
            "welcome": welcomed(shard, round_),
        }
        if kind != "begin":
            trace.append(events[kind])
            assert session.handle(trace[-1]) == oracle.effects(trace[-1])
        if session.complete:
            trace.append(BeginRound(round=session.round + 1))
            assert session.handle(trace[-1]) == []
    first, second = (Session(SHARD_OF, first_round=0, reconnects=True) for _ in range(2))
    assert run(first, *trace) == run(second, *trace)
