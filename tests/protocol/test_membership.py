"""The rules on top of `ps/membership.py`, one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ps.membership import (
    ConnectionLost,
    Effect,
    Event,
    Fail,
    Finish,
    FormView,
    Introduced,
    Left,
    Membership,
    MembershipConfig,
    Offer,
    Ready,
    Refuse,
    ReportJoined,
    Tick,
    WhyNot,
    natural_order,
)
from ps.rounds import Ending


def machine(workers: int = 2, *, same_samples: bool = True) -> Membership:
    config = MembershipConfig(
        job_id="night",
        protocol_version=3,
        workers=workers,
        same_samples=same_samples,
        join_s=60.0,
        report_s=5.0,
    )
    return Membership(config)


def introduced(connection: int, worker_id: str, job_id: str = "night", protocol_version: int = 3) -> Introduced:
    return Introduced(connection=connection, protocol_version=protocol_version, job_id=job_id, worker_id=worker_id)


def ready(connection: int, samples: int = 1000) -> Ready:
    return Ready(
        connection=connection,
        layout_digest=b"\x0a",
        replica_digest=b"\x0b",
        round=0,
        samples=samples,
        classes="10:abcd",
    )


def run(membership: Membership, *events: Event, now_s: float = 100.0) -> list[Effect]:
    return [effect for event in events for effect in membership.handle(event, now_s)]


def formed(names: Sequence[str] = ("a", "b")) -> Membership:
    """A membership whose view has formed; connection i is that of names[i]."""
    membership = machine(len(names))
    run(membership, *(introduced(i, name) for i, name in enumerate(names)))
    run(membership, *(ready(i) for i in range(len(names))))
    assert membership.formed
    return membership


def refusal(effects: list[Effect]) -> tuple[WhyNot, str]:
    (effect,) = effects
    assert isinstance(effect, Refuse)
    return effect.why, effect.text


# Rule 1: introduction, job spec, readiness


def test_introduced_worker_is_offered_the_job_and_reported() -> None:
    """Rule 1: "A worker introduces itself ..., gets the job spec"."""
    assert run(machine(), introduced(7, "b")) == [
        Offer(connection=7),
        ReportJoined(worker_ids=("b",), not_ready=("b",), newcomer="b", expected=2, waited_s=0.0),
    ]


def test_place_is_taken_from_the_introduction_on() -> None:
    """Rule 1: "Its place is taken from the introduction on", ready or not."""
    membership = machine(workers=1)
    run(membership, introduced(0, "a"))
    assert refusal(run(membership, introduced(1, "b")))[0] is WhyNot.VIEW_FULL


def test_worker_may_leave_the_job_id_open() -> None:
    """Rule 1; the contract: "empty: whatever job the server has"."""
    assert Offer(connection=0) in run(machine(), introduced(0, "a", job_id=""))


# Rule 2: refusals


@pytest.mark.parametrize(
    ("event", "why", "text"),
    [
        (
            introduced(0, "a", protocol_version=4),
            WhyNot.PROTOCOL_VERSION,
            "expected protocol_version=3, got protocol_version=4 (worker a)",
        ),
        (introduced(0, "a", job_id="day"), WhyNot.JOB, "expected job_id=night, got job_id=day (worker a)"),
    ],
)
def test_other_protocol_version_or_job_is_refused_naming_both(event: Event, why: WhyNot, text: str) -> None:
    """Rule 2: "Another protocol version, another job id ... is refused, naming both values"."""
    membership = machine()
    assert refusal(run(membership, event)) == (why, text)
    assert membership.worker_ids == ()


@pytest.mark.parametrize("worker_id", ["", "-a", "a b", "a\n", "ä", "a/b", "x" * 64, "../etc"])
def test_worker_id_that_is_no_name_is_refused(worker_id: str) -> None:
    """Rule 2, and names become file names of logs."""
    why, text = refusal(run(machine(), introduced(0, worker_id)))
    assert why is WhyNot.NAME
    assert text.startswith("expected a worker_id of 1 to 63 letters, digits, '.', '_' or '-', got worker_id='")


def test_worker_id_that_is_live_is_refused() -> None:
    """Rule 2: "a worker_id that is live"; the first one keeps its place."""
    membership = machine()
    run(membership, introduced(0, "a"))
    expected = (WhyNot.WORKER_ID, "expected a worker_id that is not live, got worker_id=a")
    assert refusal(run(membership, introduced(1, "a"))) == expected
    assert run(membership, ConnectionLost(connection=1)) == []
    assert membership.worker_ids == ("a",)


def test_one_worker_too_many_is_refused_naming_who_is_there() -> None:
    """Rule 2: "or one worker too many is refused"."""
    for membership in (formed(), machine()):
        if not membership.formed:
            run(membership, introduced(0, "a"), introduced(1, "b"))
        expected = (WhyNot.VIEW_FULL, "expected at most workers=2 in the view (a, b), got worker_id=c")
        assert refusal(run(membership, introduced(9, "c"))) == expected


@pytest.mark.parametrize(
    ("changes", "why", "text"),
    [
        ({"layout_digest": b"\xff"}, WhyNot.LAYOUT, "expected layout_digest=0a as on a, got layout_digest=ff"),
        (
            {"replica_digest": b"\xff"},
            WhyNot.PARAMETERS,
            "expected replica_digest=0b as on a, got replica_digest=ff",
        ),
        ({"round": 4}, WhyNot.ROUND, "expected round=0 as on a, got round=4"),
        ({"classes": "9:ab"}, WhyNot.DATA, "expected classes=10:abcd as on a, got classes=9:ab"),
        ({"samples": 999}, WhyNot.DATA, "expected samples=1000 as on a, got samples=999"),
    ],
)
def test_readiness_that_differs_from_the_first_is_refused(changes: dict[str, object], why: WhyNot, text: str) -> None:
    """Rule 2: "So is a readiness that differs from the first one's"; its place is free again."""
    membership = machine()
    run(membership, introduced(5, "b"), introduced(0, "a"), ready(0))
    effects = run(membership, replace(ready(5), **changes))  # type: ignore[arg-type]
    assert effects == [Refuse(connection=5, worker_id="b", why=why, text=f"{text} (worker b)")]
    assert membership.worker_ids == ("a",)
    assert isinstance(run(membership, introduced(6, "b"), ready(6))[-1], FormView)


def test_other_layout_is_told_before_the_parameters_that_follow_from_it() -> None:
    """Rule 2: of several differences the first cause is named."""
    membership = machine()
    run(membership, introduced(0, "a"), introduced(1, "b"), ready(0))
    event = replace(ready(1), layout_digest=b"\x01", replica_digest=b"\x02", samples=3)
    assert refusal(run(membership, event))[0] is WhyNot.LAYOUT


def test_workers_with_their_own_data_may_have_different_numbers_of_samples() -> None:
    """Rule 2 with `data.split: own`."""
    membership = machine(same_samples=False)
    run(membership, introduced(0, "b"), introduced(1, "a"), ready(0, samples=10))
    (view,) = run(membership, ready(1, samples=20))
    assert isinstance(view, FormView)
    assert view.samples == (20, 10)


# Rule 3: the view


def test_view_forms_when_all_are_ready_and_not_before() -> None:
    """Rule 3: "The view forms when all M workers are ready: number 1"."""
    membership = machine()
    assert FormView not in map(type, run(membership, introduced(3, "b"), ready(3), introduced(4, "a")))
    assert not membership.formed
    expected = FormView(
        view=1,
        worker_ids=("a", "b"),
        connections=(4, 3),
        samples=(1000, 1000),
        layout_digest=b"\x0a",
        round=0,
    )
    assert run(membership, ready(4)) == [expected]
    assert membership.formed


def test_worker_index_follows_numbers_in_names() -> None:
    """Rule 3: "natural order of worker_id ("worker-2" before "worker-10")"."""
    names = ["worker-10", "worker-2", "worker-1", "a10b2", "a10b1", "9", "worker", "worker-02"]
    expected = ["9", "a10b1", "a10b2", "worker", "worker-1", "worker-02", "worker-2", "worker-10"]
    assert sorted(names, key=natural_order) == expected


names = st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True), min_size=1, max_size=6, unique=True)


@given(names, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_equal_names_give_equal_indices_in_whatever_order_they_come(worker_ids: list[str], random: Random) -> None:
    """Rule 3."""
    views = []
    for _ in range(2):
        membership = machine(len(worker_ids), same_samples=False)
        order = random.sample(range(len(worker_ids)), len(worker_ids))
        run(membership, *(introduced(i, worker_ids[i]) for i in order))
        random.shuffle(order)
        views.append(run(membership, *(ready(i, samples=i) for i in order))[-1])
    assert views[0] == views[1]
    assert isinstance(views[0], FormView)
    assert [worker_ids[i] for i in views[0].connections] == list(views[0].worker_ids)
    assert views[0].connections == views[0].samples


@given(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True), min_size=2, max_size=2, unique=True))
@settings(max_examples=60, deadline=None)
def test_natural_order_tells_any_two_names_apart(two: list[str]) -> None:
    """Rule 3: otherwise the order of arrival would decide."""
    assert natural_order(two[0]) != natural_order(two[1])
    swapped = [two[1], two[0]]
    assert sorted(two, key=natural_order) == sorted(swapped, key=natural_order)


def test_second_readiness_does_not_form_the_view_again() -> None:
    """Rule 3: the view forms once."""
    assert run(formed(), ready(0)) == []


# Rule 4: before the view


def test_worker_that_goes_before_the_view_frees_its_place() -> None:
    """Rule 4: "a worker that goes frees its place", also one that was ready, and nobody is told of a failure."""
    membership = machine()
    run(membership, introduced(0, "a"), ready(0), introduced(1, "b"))
    assert run(membership, ConnectionLost(connection=0)) == []
    assert membership.worker_ids == ("b",)
    effects = run(membership, introduced(2, "c"), ready(1), ready(2))
    assert isinstance(effects[-1], FormView)
    assert effects[-1].worker_ids == ("b", "c")


def test_readiness_after_the_place_is_lost_changes_nothing() -> None:
    """Rule 4."""
    membership = machine(workers=1)
    run(membership, introduced(0, "a"), ConnectionLost(connection=0))
    assert run(membership, ready(0)) == []
    assert not membership.formed


def test_leave_before_the_view_changes_nothing() -> None:
    """Rule 5 begins with the view; before it the connection alone says who is there."""
    membership = machine(workers=2)
    run(membership, introduced(0, "a"))
    assert run(membership, Left(worker_id="a", ending=Ending.STOPPED)) == []
    assert membership.worker_ids == ("a",)


def test_loss_of_a_connection_that_has_no_place_is_no_loss() -> None:
    """Rule 4: that of a refused worker."""
    membership = machine()
    run(membership, introduced(0, "a", job_id="day"))
    assert run(membership, ConnectionLost(connection=0), Left(worker_id="a", ending=Ending.FAILED)) == []


def test_view_that_does_not_form_in_time_fails_the_job_and_says_who_was_there() -> None:
    """Rule 4: "not formed `join_s` after the first introduction, the job fails and says who was there"."""
    membership = machine(workers=3)
    run(membership, introduced(0, "b10"), now_s=100.0)
    run(membership, introduced(1, "b2"), ready(1), now_s=150.0)
    assert not any(isinstance(effect, Fail) for effect in run(membership, Tick(), now_s=160.0))
    text = "expected 3 workers to be ready within 60 s, got ready=1 (joined: b2, b10)"
    assert run(membership, Tick(), now_s=160.5) == [Fail(text=text, worker_ids=("b2", "b10"), retry=True)]


def test_server_waits_for_its_first_worker_without_a_deadline() -> None:
    """Rule 4: the clock starts with the first introduction; a refused one does not start it."""
    membership = machine()
    run(membership, introduced(0, "a", job_id="day"))
    assert run(membership, Tick(), now_s=1e6) == []


def test_clock_stands_still_while_nobody_is_there() -> None:
    """Rule 4: a worker that looked in and went has not started everybody's deadline."""
    membership = machine()
    run(membership, introduced(0, "a"), ConnectionLost(connection=0), now_s=100.0)
    assert run(membership, Tick(), now_s=161.0) == []
    run(membership, introduced(1, "b"), now_s=170.0)
    assert not any(isinstance(effect, Fail) for effect in run(membership, Tick(), now_s=230.0))
    (failed,) = run(membership, Tick(), now_s=231.0)
    assert isinstance(failed, Fail)


def test_waiting_for_workers_is_reported_every_report_s() -> None:
    """Rule 4; DESIGN, section 8: "Waiting is always said aloud"."""
    membership = machine(workers=3)
    run(membership, introduced(0, "b"), ready(0), introduced(1, "a"), now_s=100.0)
    assert run(membership, Tick(), now_s=104.0) == []
    expected = ReportJoined(worker_ids=("a", "b"), not_ready=("a",), newcomer=None, expected=3, waited_s=6.0)
    assert run(membership, Tick(), now_s=106.0) == [expected]
    assert run(membership, Tick(), now_s=110.0) == []


def test_formed_view_has_no_deadline() -> None:
    """Rule 4 ends with the view."""
    assert run(formed(), Tick(), now_s=1e6) == []


# Rule 5: after it


def test_connection_that_is_lost_after_the_view_fails_the_job() -> None:
    """Rule 5: "a worker that goes without Leave ... fails the job"."""
    expected = Fail(text="b is gone: its Join stream ended", worker_ids=("b",), retry=True)
    assert run(formed(), ConnectionLost(connection=1)) == [expected]


def test_worker_that_leaves_with_a_failure_fails_the_job_with_its_text() -> None:
    """Rule 5: "or leaves with a failure"."""
    expected = Fail(text="a failed: disk full", worker_ids=("a",), retry=True)
    assert run(formed(), Left(worker_id="a", ending=Ending.FAILED, text="disk full")) == [expected]


def test_connection_that_is_lost_after_leave_is_no_loss() -> None:
    """Rule 5."""
    assert run(formed(), Left(worker_id="b", ending=Ending.COMPLETED), ConnectionLost(connection=1)) == []


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Ending.COMPLETED, Ending.COMPLETED, Ending.COMPLETED),
        (Ending.COMPLETED, Ending.STOPPED, Ending.STOPPED),
        (Ending.STOPPED, Ending.COMPLETED, Ending.STOPPED),
    ],
)
def test_job_is_finished_when_all_have_left(first: Ending, second: Ending, expected: Ending) -> None:
    """Rule 5: "When all have left, it is finished"; stopped if one was."""
    membership = formed()
    assert run(membership, Left(worker_id="b", ending=first)) == []
    assert run(membership, Left(worker_id="a", ending=second)) == [Finish(ending=expected)]


def test_leave_of_a_stranger_changes_nothing() -> None:
    """Rule 5: it has no part that could end."""
    assert run(formed(), Left(worker_id="zoe", ending=Ending.FAILED, text="x")) == []


def test_worker_whose_final_state_differs_fails_the_job_and_both_are_named() -> None:
    """Rule 5."""
    membership = formed()
    assert run(membership, Left(worker_id="b", ending=Ending.COMPLETED, replica_digest=b"\x01")) == []
    text = "the replicas differ: expected replica_digest=01 as on b, got replica_digest=02 (a, at the end)"
    assert run(membership, Left(worker_id="a", ending=Ending.COMPLETED, replica_digest=b"\x02")) == [
        Fail(text=text, worker_ids=("b", "a"), retry=False)
    ]


@pytest.mark.parametrize("retry", [True, False])
def test_worker_that_was_told_of_a_failure_passes_it_on_and_is_not_named(retry: bool) -> None:
    """Rule 5."""
    left = Left(worker_id="a", ending=Ending.ABORTED, text="b is gone", retry=retry)
    assert run(formed(), left) == [Fail(text="b is gone", worker_ids=(), retry=retry)]


def test_worker_that_has_left_is_not_live_but_its_view_is_full() -> None:
    """Rules 2 and 5: the reason must be the true one."""
    membership = formed()
    run(membership, Left(worker_id="a", ending=Ending.COMPLETED))
    assert refusal(run(membership, introduced(8, "a")))[0] is WhyNot.VIEW_FULL


def test_nothing_happens_after_a_failure() -> None:
    """Rule 5: a failed job stays failed, and says so once."""
    membership = formed()
    run(membership, ConnectionLost(connection=0))
    after: list[Event] = [introduced(4, "c"), ready(1), ConnectionLost(connection=1), Tick()]
    assert run(membership, *after, Left(worker_id="b", ending=Ending.FAILED), now_s=1e6) == []
    assert membership.failed


def test_events_are_frozen() -> None:
    """DESIGN, section 4."""
    with pytest.raises(FrozenInstanceError):
        introduced(0, "a").connection = 3  # type: ignore[misc]
