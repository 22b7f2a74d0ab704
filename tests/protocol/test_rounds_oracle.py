"""The rounds against a second, naive implementation of their rules, over event sequences that hypothesis draws.

The naive one remembers which contributions have counted and works out everything else from that set, from scratch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random

from hypothesis import example, given, settings
from hypothesis import strategies as st

from ps.rounds import (
    Add,
    ContributionReceived,
    Effect,
    Event,
    Fail,
    Forget,
    HelloReceived,
    Hold,
    Ignore,
    Publish,
    Refuse,
    Rounds,
    RoundsConfig,
    SendAverage,
    Welcome,
    Why,
)
from tests.protocol.test_rounds import NAMES, contribution, hello, run


@dataclass
class Oracle:
    """Remembers every contribution that counts and works out all else from scratch, with no other state."""

    config: RoundsConfig
    received: set[tuple[int, int, int]] = field(default_factory=set)
    """(round, bucket, worker)."""
    digests: dict[int, bytes] = field(default_factory=dict)
    failed: bool = False

    def added(self, round_: int, bucket: int) -> int:
        """How many contributions have been added: the longest run 0, 1, ... that is here."""
        worker = 0
        while (round_, bucket, worker) in self.received:
            worker += 1
        return worker

    def group(self, bucket: int) -> tuple[int, ...]:
        return tuple(sorted(self.config.together)) if bucket in self.config.together else (bucket,)

    def published(self, round_: int, bucket: int) -> bool:
        return all(self.added(round_, member) == len(self.config.worker_ids) for member in self.group(bucket))

    @property
    def open_round(self) -> int:
        round_ = self.config.first_round
        while all(self.published(round_, bucket) for bucket in self.config.buckets):
            round_ += 1
        return round_

    def missing(self, worker: int) -> tuple[int, ...]:
        return tuple(b for b in self.config.buckets if (self.open_round, b, worker) not in self.received)

    def keeps(self, round_: int) -> bool:
        """Rule 7: until there is a contribution of every worker to the next round."""
        begun = {worker for of_round, _, worker in self.received if of_round == round_ + 1}
        return round_ >= self.config.first_round and len(begun) < len(self.config.worker_ids)

    def effects(self, event: Event) -> list[Effect]:
        """What rules 1 to 7 demand; the texts of refusals and failures are left empty."""
        if self.failed:
            return []
        if isinstance(event, HelloReceived):
            return self._hello(event)
        assert isinstance(event, ContributionReceived)
        return self._contribution(event)

    def _hello(self, event: HelloReceived) -> list[Effect]:
        worker, round_, open_round = event.worker_index, event.round, self.open_round
        if event.view != self.config.view:
            return [Refuse(worker_index=worker, why=Why.VIEW, text="", round=round_)]
        if round_ != open_round and not (round_ == open_round - 1 and self.keeps(round_)):
            return [Refuse(worker_index=worker, why=Why.ROUND, text="", round=round_)]
        again = [
            SendAverage(worker_index=worker, round=round_, bucket=bucket)
            for bucket in self.config.buckets
            if self.published(round_, bucket)
        ]
        return [Welcome(worker_index=worker, round=open_round, missing=self.missing(worker)), *again]

    def _contribution(self, event: ContributionReceived) -> list[Effect]:
        worker, round_, bucket, open_round = event.worker_index, event.round, event.bucket, self.open_round
        why = None
        if event.view != self.config.view:
            why = Why.VIEW
        elif bucket not in self.config.buckets:
            why = Why.BUCKET
        elif round_ not in (open_round, open_round - 1) or round_ < self.config.first_round:
            why = Why.ROUND
        if why:
            return [Refuse(worker_index=worker, why=why, text="", round=round_, bucket=bucket)]
        if self.published(round_, bucket) and self.keeps(round_):
            return [SendAverage(worker_index=worker, round=round_, bucket=bucket)]
        if (round_, bucket, worker) in self.received:
            return [Ignore(worker_index=worker, round=round_, bucket=bucket)]
        if self.digests.setdefault(round_, event.parameter_digest) != event.parameter_digest:
            self.failed = True
            return [Fail(text="", worker_indices=(), retry=False)]
        kept, before = self.keeps(round_ - 1), self.added(round_, bucket)
        self.received.add((round_, bucket, worker))
        after = self.added(round_, bucket)
        effects: list[Effect] = [Forget(round=round_ - 1)] if kept and not self.keeps(round_ - 1) else []
        if before == after:
            return [*effects, Hold(worker_index=worker, bucket=bucket)]
        effects += [Add(worker_index=w, round=round_, bucket=bucket, first=w == 0) for w in range(before, after)]
        if self.published(round_, bucket):
            effects.append(Publish(round=round_, buckets=self.group(bucket)))
        return effects


def without_text(effect: Effect) -> Effect:
    if isinstance(effect, Fail):
        return replace(effect, text="", worker_indices=())
    return replace(effect, text="") if isinstance(effect, Refuse) else effect


@dataclass(frozen=True)
class Draw:
    """What an event is made of, relative to the open round."""

    fill: bool
    """A contribution that is still missing (then `worker` and `bucket` count modulo what is missing), or any."""
    hello: bool
    worker: int
    bucket: int
    lag: int
    view: int
    digest: int


draws = st.builds(
    Draw,
    fill=st.booleans(),
    hello=st.sampled_from([False] * 6 + [True]),
    worker=st.integers(0, 3),
    bucket=st.integers(0, 5),
    lag=st.sampled_from([0] * 5 + [-1, -1, -2, 1]),
    view=st.sampled_from([1] * 15 + [2]),
    digest=st.sampled_from([0] * 60 + [1]),
)


@st.composite
def configs(draw: st.DrawFn) -> RoundsConfig:
    buckets = tuple(range(first := draw(st.integers(0, 9)), first + draw(st.integers(1, 4))))
    return RoundsConfig(
        view=1,
        worker_ids=NAMES[: draw(st.integers(1, 4))],
        buckets=buckets,
        together=frozenset(draw(st.one_of(st.just(set()), st.sets(st.sampled_from(buckets))))),
        first_round=draw(st.integers(0, 3)),
        deadline_s=60.0,
        report_s=5.0,
    )


def event_of(drawn: Draw, oracle: Oracle) -> Event:
    """Turns a draw into an event in the place where the oracle is."""
    workers, round_ = len(oracle.config.worker_ids), max(0, oracle.open_round + drawn.lag)
    worker = drawn.worker % workers
    if drawn.hello:
        return hello(worker, round_, drawn.view)
    if drawn.fill:
        wanted = [(w, bucket) for w in range(workers) for bucket in oracle.missing(w)]
        worker, bucket = wanted[(drawn.worker * 6 + drawn.bucket) % len(wanted)]
        return contribution(worker, bucket, oracle.open_round)
    bucket = oracle.config.buckets[0] + drawn.bucket % (len(oracle.config.buckets) + 1)
    return contribution(worker, bucket, round_, drawn.view, bytes([drawn.digest]) * 16)


@given(configs(), st.lists(draws, max_size=80))
@settings(max_examples=150, deadline=None)
@example(
    RoundsConfig(view=1, worker_ids=("ann",), buckets=(0,), deadline_s=60.0, report_s=5.0),
    [Draw(fill=True, hello=False, worker=0, bucket=0, lag=0, view=1, digest=0)] * 3
    + [Draw(fill=False, hello=True, worker=0, bucket=0, lag=-1, view=1, digest=0)],
)
def test_machine_agrees_with_the_naive_one_on_every_effect(config: RoundsConfig, drawn: list[Draw]) -> None:
    rounds, oracle = Rounds(config, 0.0), Oracle(config)
    events = []
    for draw in drawn:
        events.append(event_of(draw, oracle))
        expected = oracle.effects(events[-1])
        assert [without_text(effect) for effect in rounds.handle(events[-1], 0.0)] == expected
        assert rounds.failed == oracle.failed
        if not rounds.failed:
            assert rounds.round == oracle.open_round
            assert rounds.waiting_for == tuple(w for w in range(len(config.worker_ids)) if oracle.missing(w))
    again = Rounds(config, 0.0)
    assert run(again, *events, now_s=0.0) == run(Rounds(config, 0.0), *events, now_s=0.0)


@given(configs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_order_of_a_rounds_contributions_gives_the_same_adds_per_bucket(
    config: RoundsConfig, random: Random
) -> None:
    """DESIGN, section 4: rounds are exactly-once and deterministic."""
    rounds = Rounds(config, 0.0)
    workers = range(len(config.worker_ids))
    events = [contribution(w, bucket, config.first_round) for w in workers for bucket in config.buckets] * 2
    random.shuffle(events)
    effects = run(rounds, *events, now_s=0.0)
    for bucket in config.buckets:
        adds = [effect for effect in effects if isinstance(effect, Add) and effect.bucket == bucket]
        assert adds == [Add(worker_index=w, round=config.first_round, bucket=bucket, first=w == 0) for w in workers]
    published = [bucket for effect in effects if isinstance(effect, Publish) for bucket in effect.buckets]
    assert sorted(published) == list(config.buckets)
    assert rounds.round == config.first_round + 1
