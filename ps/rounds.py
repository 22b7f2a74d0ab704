"""The server's half of the protocol as a pure state machine: rounds of one shard.

Rules (docs/protocol.md explains them):

 1. One round is open at a time. It closes when every bucket's average has been published, which takes one
    contribution of each of the M workers to each bucket; then the next one opens. The first Hello says which is first.
 2. (view, round, bucket, worker_index) names a contribution. The first copy counts, later ones do not: a copy of a
    contribution whose bucket's average is kept is answered with it, any other copy is ignored.
 3. Contributions are added in order of worker_index; one that comes before its turn is held. Where any order gives the
    same bits (`any_order`: sums of integers, maxima), each is added as it comes.
 4. A contribution to a closed round before the last, or to a round that is not open yet, is refused. So is one of
    another view or to a bucket of another shard, and a Hello that needs averages which are kept no more. A refusal
    changes nothing.
 5. All contributions of one round carry the same parameter digest. The first one that differs fails the job and names
    both workers.
 6. A bucket is published once its last contribution has been added; where the average's scales span the shard, all of
    the shard's compressed buckets are published together, after the last of them.
 7. The averages of the open round are kept, those of the last closed one until every worker has contributed to the open
    one: it does so when it has all of them. So a worker can be at most one round behind.
 8. A worker that ends without a Goodbye, or with a failure, fails the job; so does one that says Goodbye while a round
    that has begun still needs it. One that was told of another's failure passes it on and is not named as its cause.
    When all have said Goodbye, the job is finished.
 9. A round that stays open longer than the deadline fails the job and names the workers that it waits for.

`handle(event, now_s) -> effects`. Events and effects carry ids, never tensors; the shell checks content (codec, length,
finite scales) before a contribution becomes an event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from common.errors import refusal


class Ending(Enum):
    """How a worker's part ended."""

    COMPLETED = auto()
    STOPPED = auto()
    FAILED = auto()
    ABORTED = auto()
    """Another's failure, of which a server has told it."""


class Why(Enum):
    """Why a contribution or a Hello is refused."""

    VIEW = auto()
    ROUND = auto()
    BUCKET = auto()


@dataclass(frozen=True, kw_only=True)
class HelloReceived:
    """A worker's stream is open; `round` is the round whose averages the worker needs next."""

    worker_index: int
    view: int
    round: int


@dataclass(frozen=True, kw_only=True)
class ContributionReceived:
    """A contribution whose content has been checked."""

    worker_index: int
    view: int
    round: int
    bucket: int
    parameter_digest: bytes


@dataclass(frozen=True, kw_only=True)
class GoodbyeReceived:
    """A worker's part has ended in good order, or with an error that it tells."""

    worker_index: int
    ending: Ending
    text: str = ""
    retry: bool = True


@dataclass(frozen=True, kw_only=True)
class StreamLost:
    """A worker's stream has ended without a Goodbye."""

    worker_index: int


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = HelloReceived | ContributionReceived | GoodbyeReceived | StreamLost | Tick


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """Tell a worker which buckets of the open round it has not contributed."""

    worker_index: int
    round: int
    missing: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Keep this contribution, encoded, until its Add."""

    worker_index: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Add:
    """Add this contribution (the one at hand, or one that is held) to its bucket; `first` starts the sum."""

    worker_index: int
    round: int
    bucket: int
    first: bool


@dataclass(frozen=True, kw_only=True)
class Publish:
    """Divide by M, encode together, keep and send to all workers the averages of these buckets."""

    round: int
    buckets: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class SendAverage:
    """Send the kept average of a bucket to one worker, again."""

    worker_index: int
    round: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Forget:
    """The averages of this round are needed no more."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Ignore:
    """A copy of a contribution that has been received already."""

    worker_index: int
    round: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """Tell a worker why its Hello or contribution is refused."""

    worker_index: int
    why: Why
    text: str
    round: int
    bucket: int = 0


@dataclass(frozen=True, kw_only=True)
class ReportWaiting:
    """Say aloud for whom the open round waits."""

    round: int
    worker_indices: tuple[int, ...]
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The job cannot go on."""

    text: str
    worker_indices: tuple[int, ...]
    retry: bool


@dataclass(frozen=True, kw_only=True)
class Finish:
    """All workers have said Goodbye."""

    ending: Ending


Effect = Welcome | Hold | Add | Publish | SendAverage | Forget | Ignore | Refuse | ReportWaiting | Fail | Finish


@dataclass(frozen=True, kw_only=True)
class RoundsConfig:
    """What the machine is told at its start.

    Attributes:
        view: the view that may contribute.
        worker_ids: by worker_index; their number is M.
        buckets: numbers of this shard's buckets.
        together: those among them whose averages are published together (rule 6), or none.
        any_order: those among them to which rule 3 does not apply.
        first_round: the round to open.
        deadline_s: rule 9.
        report_s: how often ReportWaiting is repeated.
    """

    view: int
    worker_ids: tuple[str, ...]
    buckets: tuple[int, ...]
    together: frozenset[int] = frozenset()
    any_order: frozenset[int] = frozenset()
    first_round: int = 0
    deadline_s: float
    report_s: float


@dataclass
class _Bucket:
    received: set[int] = field(default_factory=set)
    added: int = 0
    published: bool = False


class Rounds:
    """Rounds of one shard for one view; see the rules on top of this file."""

    def __init__(self, config: RoundsConfig, now_s: float) -> None:
        self.config = config
        self.round = config.first_round
        self.failed = False
        self._workers = len(config.worker_ids)
        self._known = frozenset(config.buckets)
        self._endings: dict[int, Ending] = {}
        self._keeps_last = False
        self._open(now_s)

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Takes one event at a time `now_s` (monotonic seconds); returns what is to be done, in order."""
        if self.failed:
            return []
        match event:
            case HelloReceived():
                return self._hello(event)
            case ContributionReceived():
                return self._contribution(event, now_s)
            case GoodbyeReceived():
                return self._goodbye(event)
            case StreamLost():
                return self._lost(event)
            case Tick():
                return self._tick(now_s)

    @property
    def waiting_for(self) -> tuple[int, ...]:
        """Workers that have not contributed everything to the open round."""
        return tuple(
            worker
            for worker in range(self._workers)
            if any(worker not in bucket.received for bucket in self._buckets.values())
        )

    def _open(self, now_s: float) -> None:
        self._buckets = {number: _Bucket() for number in self.config.buckets}
        self._begun: set[int] = set()
        self._digest: tuple[int, bytes] | None = None
        self._opened_s = now_s
        self._reported_s = now_s

    def _hello(self, event: HelloReceived) -> list[Effect]:
        why_not = self._view_refusal(event.worker_index, event.view, event.round, 0)
        if why_not:
            return [why_not]
        worker = event.worker_index
        if event.round == self.round:
            published = [n for n, bucket in self._buckets.items() if bucket.published]
        elif event.round == self.round - 1 and self._keeps_last:
            published = list(self._known)
        else:
            rule = f"round={self.round}, which is open"
            text = refusal(rule, "round", event.round, f"Hello of {self._name(worker)}")
            return [Refuse(worker_index=worker, why=Why.ROUND, text=text, round=event.round)]
        # Also to a worker one round behind: averages of other shards may let it go on before the Welcome arrives.
        missing = tuple(n for n, bucket in self._buckets.items() if worker not in bucket.received)
        again = [SendAverage(worker_index=worker, round=event.round, bucket=n) for n in sorted(published)]
        return [Welcome(worker_index=worker, round=self.round, missing=missing), *again]

    def _contribution(self, event: ContributionReceived, now_s: float) -> list[Effect]:
        worker, number = event.worker_index, event.bucket
        why_not = self._view_refusal(worker, event.view, event.round, number) or self._place_refusal(event)
        if why_not:
            return [why_not]
        bucket = self._buckets[number]
        if self._keeps_last if event.round < self.round else bucket.published:
            return [SendAverage(worker_index=worker, round=event.round, bucket=number)]
        if event.round < self.round or worker in bucket.received:
            return [Ignore(worker_index=worker, round=event.round, bucket=number)]
        mismatch = self._digest_mismatch(event)
        if mismatch:
            return [mismatch]
        bucket.received.add(worker)
        deserted = self._deserted() if self._endings else []
        if deserted:
            return deserted
        effects = [*self._forget(worker), *self._adds(bucket, worker, number)]
        if bucket.added == self._workers:
            effects += self._publish(number)
        if all(b.published for b in self._buckets.values()):
            self.round += 1
            self._keeps_last = True
            self._open(now_s)
        return effects

    def _forget(self, worker: int) -> list[Effect]:
        """What nobody needs now that this worker has begun the open round (rule 7)."""
        self._begun.add(worker)
        if not self._keeps_last or len(self._begun) < self._workers:
            return []
        self._keeps_last = False
        return [Forget(round=self.round - 1)]

    def _adds(self, bucket: _Bucket, worker: int, number: int) -> list[Effect]:
        """What can be added now that this worker's contribution is there (rule 3)."""
        if number in self.config.any_order:
            bucket.added += 1
            return [Add(worker_index=worker, round=self.round, bucket=number, first=bucket.added == 1)]
        if worker != bucket.added:
            return [Hold(worker_index=worker, bucket=number)]
        effects: list[Effect] = []
        while bucket.added in bucket.received:
            first = bucket.added == 0
            effects.append(Add(worker_index=bucket.added, round=self.round, bucket=number, first=first))
            bucket.added += 1
        return effects

    def _publish(self, number: int) -> list[Effect]:
        group = tuple(sorted(self.config.together)) if number in self.config.together else (number,)
        if any(self._buckets[n].added < self._workers for n in group):
            return []
        for n in group:
            self._buckets[n].published = True
        return [Publish(round=self.round, buckets=group)]

    def _view_refusal(self, worker: int, view: int, round_: int, bucket: int) -> Refuse | None:
        if view == self.config.view:
            return None
        text = refusal(f"view={self.config.view}", "view", view, self._name(worker))
        return Refuse(worker_index=worker, why=Why.VIEW, text=text, round=round_, bucket=bucket)

    def _place_refusal(self, event: ContributionReceived) -> Refuse | None:
        worker, context = event.worker_index, f"bucket {event.bucket}, {self._name(event.worker_index)}"
        if event.bucket not in self._known:
            rule = f"a bucket from {min(self._known)} to {max(self._known)}"
            text, why = refusal(rule, "bucket", event.bucket, self._name(worker)), Why.BUCKET
        elif event.round > self.round:
            text, why = refusal(f"round={self.round}, which is open", "round", event.round, context), Why.ROUND
        elif event.round < max(self.round - 1, self.config.first_round):
            text, why = refusal(f"round={self.round}; that one is closed", "round", event.round, context), Why.ROUND
        else:
            return None
        return Refuse(worker_index=worker, why=why, text=text, round=event.round, bucket=event.bucket)

    def _digest_mismatch(self, event: ContributionReceived) -> Fail | None:
        if self._digest is None:
            self._digest = (event.worker_index, event.parameter_digest)
        first, digest = self._digest
        if digest == event.parameter_digest:
            return None
        rule = f"parameter_digest={digest.hex()} as on {self._name(first)}"
        name = self._name(event.worker_index)
        text = refusal(rule, "parameter_digest", event.parameter_digest.hex(), f"{name}, round {event.round}")
        return self._fail(f"the replicas differ: {text}", (first, event.worker_index), retry=False)

    def _goodbye(self, event: GoodbyeReceived) -> list[Effect]:
        self._endings[event.worker_index] = event.ending
        if event.ending is Ending.ABORTED:
            return [self._fail(event.text, (), retry=event.retry)]
        if event.ending is Ending.FAILED:
            text = f"{self._name(event.worker_index)} failed: {event.text}"
            return [self._fail(text, (event.worker_index,), retry=True)]
        if len(self._endings) < self._workers:
            return self._deserted()
        stopped = Ending.STOPPED in self._endings.values()
        return [Finish(ending=Ending.STOPPED if stopped else Ending.COMPLETED)]

    def _deserted(self) -> list[Effect]:
        """Fails the job if the open round has begun and needs a worker that has said Goodbye."""
        begun = any(bucket.received for bucket in self._buckets.values())
        gone = tuple(worker for worker in self.waiting_for if worker in self._endings)
        if not begun or not gone:
            return []
        names = ", ".join(self._name(worker) for worker in gone)
        return [self._fail(f"{names} left before round {self.round} closed", gone, retry=True)]

    def _lost(self, event: StreamLost) -> list[Effect]:
        worker = event.worker_index
        if worker in self._endings:
            return []
        return [
            self._fail(f"{self._name(worker)} is gone: its stream ended in round {self.round}", (worker,), retry=True)
        ]

    def _tick(self, now_s: float) -> list[Effect]:
        waited_s, missing = now_s - self._opened_s, self.waiting_for
        if len(self._endings) == self._workers:
            return []
        if waited_s > self.config.deadline_s:
            names = ", ".join(self._name(worker) for worker in missing)
            text = f"round {self.round} did not close within {self.config.deadline_s:g} s: waiting for {names}"
            return [self._fail(text, missing, retry=True)]
        if now_s - self._reported_s < self.config.report_s:
            return []
        self._reported_s = now_s
        return [ReportWaiting(round=self.round, worker_indices=missing, waited_s=waited_s)]

    def _fail(self, text: str, workers: Sequence[int], *, retry: bool) -> Fail:
        self.failed = True
        return Fail(text=text, worker_indices=tuple(workers), retry=retry)

    def _name(self, worker: int) -> str:
        return self.config.worker_ids[worker]
