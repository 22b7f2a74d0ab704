"""The rules on top of `ps/rounds.py`, one by one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import FrozenInstanceError, fields
from typing import get_args

import pytest

from ps.rounds import (
    Add,
    ContributionReceived,
    Effect,
    Ending,
    Event,
    Fail,
    Finish,
    Forget,
    GoodbyeReceived,
    HelloReceived,
    Hold,
    Ignore,
    Publish,
    Refuse,
    ReportWaiting,
    Rounds,
    RoundsConfig,
    SendAverage,
    StreamLost,
    Tick,
    Welcome,
    Why,
)

NAMES = ("ann", "bob", "cyd", "dan")
DIGEST = bytes(16)


def machine(
    workers: int = 2,
    buckets: Iterable[int] = (4, 5),
    together: Iterable[int] = (),
    first_round: int = 0,
    any_order: Iterable[int] = (),
) -> Rounds:
    config = RoundsConfig(
        view=1,
        worker_ids=NAMES[:workers],
        buckets=tuple(buckets),
        together=frozenset(together),
        any_order=frozenset(any_order),
        first_round=first_round,
        deadline_s=60.0,
        report_s=5.0,
    )
    return Rounds(config, now_s=100.0)


def hello(worker: int, round_: int = 0, view: int = 1) -> HelloReceived:
    return HelloReceived(worker_index=worker, view=view, round=round_)


def contribution(
    worker: int, bucket: int, round_: int = 0, view: int = 1, digest: bytes = DIGEST
) -> ContributionReceived:
    return ContributionReceived(worker_index=worker, view=view, round=round_, bucket=bucket, parameter_digest=digest)


def goodbye(worker: int, ending: Ending = Ending.COMPLETED, text: str = "") -> GoodbyeReceived:
    return GoodbyeReceived(worker_index=worker, ending=ending, text=text)


def run(rounds: Rounds, *events: Event, now_s: float = 100.0) -> list[Effect]:
    return [effect for event in events for effect in rounds.handle(event, now_s)]


def close_round(rounds: Rounds, now_s: float = 100.0) -> list[Effect]:
    """All contributions that the open round lacks."""
    workers = range(len(rounds.config.worker_ids))
    events = [contribution(worker, bucket, rounds.round) for bucket in rounds.config.buckets for worker in workers]
    return run(rounds, *events, now_s=now_s)


def refusals(effects: Iterable[Effect]) -> list[tuple[Why, str]]:
    return [(effect.why, effect.text) for effect in effects if isinstance(effect, Refuse)]


def failure(effects: list[Effect]) -> Fail:
    (effect,) = effects
    assert isinstance(effect, Fail)
    return effect


# Rule 1: One round is open at a time


def test_first_round_is_the_one_that_the_machine_is_told() -> None:
    """Rule 1: "The first Hello says which is first" (the shell passes it on)."""
    assert run(machine(first_round=7), hello(0, round_=7)) == [Welcome(worker_index=0, round=7, missing=(4, 5))]


def test_round_closes_with_the_last_contribution_to_the_last_bucket_and_the_next_one_opens() -> None:
    """Rule 1: "It closes when every bucket's average has been published, ... then the next one opens"."""
    rounds = machine()
    run(rounds, contribution(0, 4), contribution(1, 4), contribution(0, 5))
    assert rounds.round == 0
    assert run(rounds, contribution(1, 5)) == [
        Add(worker_index=1, round=0, bucket=5, first=False),
        Publish(round=0, buckets=(5,)),
    ]
    assert rounds.round == 1
    assert run(rounds, hello(0, round_=1)) == [Welcome(worker_index=0, round=1, missing=(4, 5))]


def test_one_worker_alone_closes_rounds() -> None:
    """Rule 1, with M = 1."""
    rounds = machine(workers=1, buckets=[0])
    first = run(rounds, contribution(0, 0))
    second = run(rounds, contribution(0, 0, round_=1))
    third = run(rounds, contribution(0, 0, round_=2))
    assert first == [Add(worker_index=0, round=0, bucket=0, first=True), Publish(round=0, buckets=(0,))]
    assert second == [
        Forget(round=0),
        Add(worker_index=0, round=1, bucket=0, first=True),
        Publish(round=1, buckets=(0,)),
    ]
    assert third[0] == Forget(round=1)


def test_welcome_names_exactly_what_the_worker_has_not_contributed() -> None:
    """Rule 1; `missing` is per worker, and what is held counts as contributed."""
    rounds = machine()
    run(rounds, contribution(1, 5))
    assert run(rounds, hello(1)) == [Welcome(worker_index=1, round=0, missing=(4,))]
    assert run(rounds, hello(0)) == [Welcome(worker_index=0, round=0, missing=(4, 5))]


# Rule 2: The first copy counts


def test_copy_of_a_held_contribution_is_ignored() -> None:
    """Rule 2: "any other copy is ignored"."""
    rounds = machine()
    run(rounds, contribution(1, 4))
    assert run(rounds, contribution(1, 4)) == [Ignore(worker_index=1, round=0, bucket=4)]


def test_copy_of_an_added_contribution_is_ignored_and_not_added_again() -> None:
    """Rule 2: "The first copy counts, later ones do not"."""
    rounds = machine()
    run(rounds, contribution(0, 4))
    assert run(rounds, contribution(0, 4)) == [Ignore(worker_index=0, round=0, bucket=4)]
    assert run(rounds, contribution(1, 4))[0] == Add(worker_index=1, round=0, bucket=4, first=False)


def test_copy_whose_bucket_is_published_is_answered_with_the_average() -> None:
    """Rule 2: "a copy of a contribution whose bucket is published is answered with that average"."""
    rounds = machine()
    run(rounds, contribution(0, 4), contribution(1, 4))
    assert run(rounds, contribution(0, 4)) == [SendAverage(worker_index=0, round=0, bucket=4)]


def test_copy_of_the_last_closed_round_is_answered_with_the_average() -> None:
    """Rules 2 and 7."""
    rounds = machine()
    close_round(rounds)
    assert run(rounds, contribution(1, 4)) == [SendAverage(worker_index=1, round=0, bucket=4)]
    assert run(rounds, hello(1, round_=1)) == [Welcome(worker_index=1, round=1, missing=(4, 5))]


# Rule 3: In order of worker_index


def test_contributions_are_added_in_order_of_worker_index_and_held_before_their_turn() -> None:
    """Rule 3: "Contributions are added in order of worker_index; one that comes before its turn is held"."""
    rounds = machine(workers=4, buckets=[4])
    assert run(rounds, contribution(2, 4)) == [Hold(worker_index=2, bucket=4)]
    assert run(rounds, contribution(1, 4)) == [Hold(worker_index=1, bucket=4)]
    assert run(rounds, contribution(0, 4)) == [
        Add(worker_index=0, round=0, bucket=4, first=True),
        Add(worker_index=1, round=0, bucket=4, first=False),
        Add(worker_index=2, round=0, bucket=4, first=False),
    ]
    assert run(rounds, contribution(3, 4)) == [
        Add(worker_index=3, round=0, bucket=4, first=False),
        Publish(round=0, buckets=(4,)),
    ]


def test_turns_of_different_buckets_are_independent() -> None:
    """Rule 3: the order is one of each bucket."""
    rounds = machine()
    assert run(rounds, contribution(0, 4)) == [Add(worker_index=0, round=0, bucket=4, first=True)]
    assert run(rounds, contribution(1, 5)) == [Hold(worker_index=1, bucket=5)]


def test_contributions_whose_order_does_not_matter_are_added_as_they_come() -> None:
    """Rule 3: "Where any order gives the same bits, each is added as it comes"."""
    rounds = machine(workers=3, buckets=(4, 5), any_order=frozenset({4}))
    assert run(rounds, contribution(2, 4)) == [Add(worker_index=2, round=0, bucket=4, first=True)]
    assert run(rounds, contribution(2, 4)) == [Ignore(worker_index=2, round=0, bucket=4)]
    assert run(rounds, contribution(0, 4)) == [Add(worker_index=0, round=0, bucket=4, first=False)]
    assert run(rounds, contribution(2, 5)) == [Hold(worker_index=2, bucket=5)]
    last = [Add(worker_index=1, round=0, bucket=4, first=False), Publish(round=0, buckets=(4,))]
    assert run(rounds, contribution(1, 4)) == last


# Rule 4: Refusals


def test_contribution_to_a_closed_round_before_the_last_is_refused() -> None:
    """Rule 4: "A contribution to a closed round before the last ... is refused"."""
    rounds = machine()
    close_round(rounds)
    close_round(rounds)
    text = "expected round=2; that one is closed, got round=0 (bucket 4, bob)"
    assert run(rounds, contribution(1, 4)) == [Refuse(worker_index=1, why=Why.ROUND, text=text, round=0, bucket=4)]


def test_contribution_to_the_round_before_the_first_is_refused() -> None:
    """Rule 4, after a resume: the round before is closed, but nothing of it was ever here."""
    rounds = machine(first_round=7)
    text = "expected round=7; that one is closed, got round=6 (bucket 4, ann)"
    assert refusals(run(rounds, contribution(0, 4, round_=6))) == [(Why.ROUND, text)]


def test_contribution_to_a_round_that_is_not_open_yet_is_refused() -> None:
    """Rule 4: "... or to a round that is not open yet, is refused"."""
    text = "expected round=0, which is open, got round=1 (bucket 5, ann)"
    assert refusals(run(machine(), contribution(0, 5, round_=1))) == [(Why.ROUND, text)]


def test_contribution_of_another_view_is_refused() -> None:
    """Rule 4: "So is one of another view"."""
    effects = run(machine(), contribution(0, 5, view=2))
    text = "expected view=1, got view=2 (ann)"
    assert effects == [Refuse(worker_index=0, why=Why.VIEW, text=text, round=0, bucket=5)]


def test_contribution_to_a_bucket_of_another_shard_is_refused() -> None:
    """Rule 4: "... or to a bucket of another shard"."""
    effects = run(machine(), contribution(1, 6))
    assert refusals(effects) == [(Why.BUCKET, "expected a bucket from 4 to 5, got bucket=6 (bob)")]


def test_hello_of_another_view_or_round_is_refused() -> None:
    """Rule 4 holds for a Hello, too; one from two rounds ago cannot be served any more (rule 7)."""
    rounds = machine()
    close_round(rounds)
    close_round(rounds)
    assert refusals(run(rounds, hello(0, view=3, round_=2))) == [(Why.VIEW, "expected view=1, got view=3 (ann)")]
    for round_ in (0, 3):
        text = f"expected round=2, which is open, got round={round_} (Hello of ann)"
        assert refusals(run(rounds, hello(0, round_=round_))) == [(Why.ROUND, text)]


def test_refusal_changes_nothing() -> None:
    """Rule 4: "A refusal changes nothing"."""
    refused: list[Event] = [
        contribution(0, 4, round_=1, digest=b"other"),
        contribution(0, 4, view=9, digest=b"other"),
        contribution(0, 9, digest=b"other"),
        hello(0, round_=5),
    ]
    rounds, undisturbed = machine(), machine()
    assert len(refusals(run(rounds, *refused))) == len(refused)
    assert close_round(rounds) == close_round(undisturbed)


# Rule 5: One parameter digest


def test_first_digest_that_differs_fails_the_job_and_names_both_workers() -> None:
    """Rule 5, across buckets."""
    rounds = machine(workers=3)
    run(rounds, contribution(2, 5, digest=b"\x01"))
    failed = failure(run(rounds, contribution(0, 4, digest=b"\x02")))
    rule = "the replicas differ: expected parameter_digest=01 as on cyd"
    assert failed.text == f"{rule}, got parameter_digest=02 (ann, round 0)"
    assert failed.worker_indices == (2, 0)
    assert not failed.retry


def test_digest_may_change_from_round_to_round() -> None:
    """Rule 5: "All contributions of one round"."""
    rounds = machine(workers=1, buckets=[4])
    run(rounds, contribution(0, 4, digest=b"\x01"))
    assert run(rounds, contribution(0, 4, round_=1, digest=b"\x02"))[1] == Add(
        worker_index=0, round=1, bucket=4, first=True
    )


# Rule 6: Publishing


def test_bucket_is_published_once_while_others_still_wait() -> None:
    """Rule 6: "A bucket is published once its last contribution has been added"."""
    rounds = machine()
    effects = run(rounds, contribution(1, 5), contribution(0, 5), contribution(1, 5))
    assert effects == [
        Hold(worker_index=1, bucket=5),
        Add(worker_index=0, round=0, bucket=5, first=True),
        Add(worker_index=1, round=0, bucket=5, first=False),
        Publish(round=0, buckets=(5,)),
        SendAverage(worker_index=1, round=0, bucket=5),
    ]
    assert rounds.round == 0


def test_buckets_with_common_scales_are_published_together_after_the_last_of_them() -> None:
    """Rule 6: "where the average's scales span the shard, all ... are published together"; others are not held up."""
    rounds = machine(workers=1, buckets=[4, 5, 6], together=[5, 4])
    assert run(rounds, contribution(0, 5)) == [Add(worker_index=0, round=0, bucket=5, first=True)]
    assert run(rounds, contribution(0, 6))[-1] == Publish(round=0, buckets=(6,))
    assert run(rounds, contribution(0, 5)) == [Ignore(worker_index=0, round=0, bucket=5)]
    assert run(rounds, contribution(0, 4)) == [
        Add(worker_index=0, round=0, bucket=4, first=True),
        Publish(round=0, buckets=(4, 5)),
    ]
    assert rounds.round == 1


# Rule 7: Which averages are kept


def test_averages_of_the_last_round_are_forgotten_once_every_worker_has_begun_the_open_one() -> None:
    """Rule 7: "those of the last closed one until every worker has contributed to the open one"."""
    rounds = machine(workers=3)
    assert [e for e in close_round(rounds) if isinstance(e, Forget)] == []
    assert run(rounds, contribution(2, 4, round_=1)) == [Hold(worker_index=2, bucket=4)]
    assert run(rounds, contribution(0, 5, round_=1)) == [Add(worker_index=0, round=1, bucket=5, first=True)]
    assert run(rounds, contribution(1, 4, round_=1)) == [Forget(round=0), Hold(worker_index=1, bucket=4)]
    assert [e for e in close_round(rounds) if isinstance(e, Forget)] == []
    assert [e for e in close_round(rounds) if isinstance(e, Forget)] == [Forget(round=1)]


def test_what_is_forgotten_is_not_asked_for_again() -> None:
    """Rules 2 and 7: a late copy is ignored; a Hello that needs what every worker has had is refused."""
    rounds = machine()
    close_round(rounds)
    late = contribution(0, 4, round_=0)
    assert run(rounds, late) == [SendAverage(worker_index=0, round=0, bucket=4)]
    run(rounds, contribution(0, 4, round_=1), contribution(1, 5, round_=1))
    assert run(rounds, late) == [Ignore(worker_index=0, round=0, bucket=4)]
    text = "expected round=1, which is open, got round=0 (Hello of ann)"
    assert refusals(run(rounds, hello(0, round_=0))) == [(Why.ROUND, text)]


def test_hello_in_the_open_round_gets_what_is_published_of_it() -> None:
    """Rule 7, after a reconnect in mid-round."""
    rounds = machine()
    run(rounds, contribution(0, 5), contribution(1, 5), contribution(0, 4))
    assert run(rounds, hello(1)) == [
        Welcome(worker_index=1, round=0, missing=(4,)),
        SendAverage(worker_index=1, round=0, bucket=5),
    ]


def test_hello_one_round_behind_gets_all_averages_of_that_round() -> None:
    """Rule 7: "a worker can be at most one round behind"."""
    rounds = machine()
    close_round(rounds)
    assert run(rounds, hello(1, round_=0))[1:] == [
        SendAverage(worker_index=1, round=0, bucket=4),
        SendAverage(worker_index=1, round=0, bucket=5),
    ]


def test_welcome_one_round_behind_names_what_the_open_round_lacks() -> None:
    """Rule 1, `Welcome`: "which buckets of the open round it has not contributed".

    The worker may have gone on to the open round, by averages of other shards, while its Hello was on its way: what
    it encoded meanwhile is pushed only if the Welcome asks for it.
    """
    rounds = machine()
    close_round(rounds)
    assert run(rounds, hello(1, round_=0))[0] == Welcome(worker_index=1, round=1, missing=(4, 5))


def test_hello_of_the_round_before_the_first_is_refused() -> None:
    """Rule 7: of a round that was not run here nothing is kept."""
    assert refusals(run(machine(first_round=3), hello(0, round_=2)))


# Rule 8: Endings


def test_worker_whose_stream_ends_without_goodbye_fails_the_job() -> None:
    """Rule 8: "A worker that ends without a Goodbye ... fails the job"."""
    rounds = machine()
    close_round(rounds)
    failed = failure(run(rounds, StreamLost(worker_index=1)))
    assert failed == Fail(text="bob is gone: its stream ended in round 1", worker_indices=(1,), retry=True)


def test_worker_that_ends_with_a_failure_fails_the_job_with_its_text() -> None:
    """Rule 8: "... or with a failure, fails the job"."""
    failed = failure(run(machine(), goodbye(1, Ending.FAILED, "disk full")))
    assert failed == Fail(text="bob failed: disk full", worker_indices=(1,), retry=True)


@pytest.mark.parametrize("retry", [True, False])
def test_worker_that_was_told_of_a_failure_passes_it_on_and_is_not_named(retry: bool) -> None:
    """Rule 8."""
    said = GoodbyeReceived(worker_index=1, ending=Ending.ABORTED, text="ann is gone", retry=retry)
    assert run(machine(), said) == [Fail(text="ann is gone", worker_indices=(), retry=retry)]


def test_worker_that_says_goodbye_while_a_round_needs_it_fails_the_job() -> None:
    """Rule 8."""
    rounds = machine()
    run(rounds, contribution(0, 4))
    failed = failure(run(rounds, goodbye(1)))
    assert failed == Fail(text="bob left before round 0 closed", worker_indices=(1,), retry=True)


def test_contribution_to_a_round_that_a_worker_has_left_fails_the_job() -> None:
    """Rule 8."""
    rounds = machine()
    assert run(rounds, goodbye(1)) == []
    failed = failure(run(rounds, contribution(0, 4)))
    assert failed.text == "bob left before round 0 closed"


def test_stream_that_ends_after_goodbye_is_no_loss() -> None:
    """Rule 8."""
    assert run(machine(), goodbye(0), StreamLost(worker_index=0)) == []


@pytest.mark.parametrize(
    ("endings", "expected"),
    [
        ((Ending.COMPLETED, Ending.COMPLETED), Ending.COMPLETED),
        ((Ending.STOPPED, Ending.COMPLETED), Ending.STOPPED),
        ((Ending.COMPLETED, Ending.STOPPED), Ending.STOPPED),
    ],
)
def test_job_is_finished_when_all_have_said_goodbye(endings: tuple[Ending, Ending], expected: Ending) -> None:
    """Rule 8: "When all have said Goodbye, it is finished"."""
    rounds = machine()
    assert run(rounds, goodbye(1, endings[1])) == []
    assert run(rounds, goodbye(0, endings[0])) == [Finish(ending=expected)]


def test_nothing_happens_after_a_failure() -> None:
    """Rule 8: a failed job stays failed, and says so once."""
    rounds = machine()
    run(rounds, StreamLost(worker_index=0))
    after: list[Event] = [contribution(0, 4), hello(1), goodbye(1, Ending.FAILED), StreamLost(worker_index=1), Tick()]
    assert run(rounds, *after, now_s=1000.0) == []
    assert rounds.failed


# Rule 9: The deadline


def test_round_that_stays_open_longer_than_the_deadline_fails_the_job_and_names_who_is_waited_for() -> None:
    """Rule 9."""
    rounds = machine(workers=3)
    run(rounds, contribution(1, 4), contribution(1, 5), contribution(0, 4))
    run(rounds, Tick(), now_s=159.0)
    assert run(rounds, Tick(), now_s=160.0) == []
    failed = failure(run(rounds, Tick(), now_s=160.1))
    assert failed.text == "round 0 did not close within 60 s: waiting for ann, cyd"
    assert (failed.worker_indices, failed.retry) == ((0, 2), True)


def test_deadline_starts_anew_with_every_round() -> None:
    """Rule 9: "A round that stays open longer than the deadline"."""
    rounds = machine()
    close_round(rounds, now_s=159.0)
    assert [type(effect) for effect in run(rounds, Tick(), now_s=218.0)] == [ReportWaiting]
    assert failure(run(rounds, Tick(), now_s=219.5)).text.startswith("round 1 did not close within 60 s")


def test_waiting_is_reported_every_report_s_with_the_names() -> None:
    """Rule 9; DESIGN, section 8: "Waiting is always said aloud"."""
    rounds = machine()
    run(rounds, contribution(0, 4), contribution(0, 5))
    assert run(rounds, Tick(), now_s=104.9) == []
    assert run(rounds, Tick(), now_s=105.0) == [ReportWaiting(round=0, worker_indices=(1,), waited_s=5.0)]
    assert run(rounds, Tick(), now_s=109.0) == []
    assert run(rounds, Tick(), now_s=111.0) == [ReportWaiting(round=0, worker_indices=(1,), waited_s=11.0)]


def test_finished_job_waits_for_nobody() -> None:
    """Rules 8 and 9: the round that is open at the end never closes, and must not fail the job."""
    rounds = machine()
    run(rounds, goodbye(0), goodbye(1))
    assert run(rounds, Tick(), now_s=1000.0) == []


# What all rules rest on


def test_events_and_effects_are_frozen_and_carry_no_tensors() -> None:
    """DESIGN, section 4: "frozen dataclasses that carry ids, views and rounds, never tensors"."""
    plain = {"int", "bool", "str", "bytes", "float", "tuple[int, ...]", "Ending", "Why"}
    for kind in (*get_args(Event), *get_args(Effect)):
        assert {str(column.type) for column in fields(kind)} <= plain, kind
    with pytest.raises(FrozenInstanceError):
        hello(0).round = 3  # type: ignore[misc]
