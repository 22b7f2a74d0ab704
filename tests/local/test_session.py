"""Sessions that are for some buckets only, as the local processes of one worker have them."""

from __future__ import annotations

import pytest

from worker.session import (
    Accept,
    AverageReceived,
    BeginRound,
    BucketEncoded,
    Complete,
    Effect,
    Event,
    Push,
    Session,
    Welcomed,
)

SHARD_OF = (0, 1, 0, 1, 0)


def run(session: Session, *events: Event) -> list[Effect]:
    return [effect for event in events for effect in session.handle(event)]


@pytest.mark.parametrize("carried", [{0, 2}, {1, 2, 3}, {4}])
def test_a_round_is_complete_with_the_buckets_that_the_session_carries(carried: set[int]) -> None:
    session = Session(SHARD_OF, first_round=0, carried=frozenset(carried))
    shards = sorted({SHARD_OF[bucket] for bucket in carried})
    for round_ in range(2):
        if round_ == 0:
            welcomes = [
                Welcomed(shard=s, round=0, missing=frozenset(b for b in carried if SHARD_OF[b] == s)) for s in shards
            ]
            assert run(session, *welcomes) == []
        encoded = [BucketEncoded(bucket=bucket) for bucket in sorted(carried)]
        pushed = run(session, BeginRound(round=round_), *encoded)
        assert pushed == [Push(shard=SHARD_OF[b], round=round_, bucket=b) for b in sorted(carried)]
        *some, last = sorted(carried)
        for bucket in some:
            assert run(session, AverageReceived(round=round_, bucket=bucket)) == [Accept(round=round_, bucket=bucket)]
            assert not session.complete
        effects = run(session, AverageReceived(round=round_, bucket=last))
        assert effects[0] == Accept(round=round_, bucket=last)
        assert effects[-1] == Complete(round=round_)
        assert session.complete


def test_a_session_that_carries_nothing_is_always_complete() -> None:
    session = Session(SHARD_OF, first_round=3, carried=frozenset())
    for round_ in (3, 4):
        assert run(session, BeginRound(round=round_)) == []
        assert session.complete
