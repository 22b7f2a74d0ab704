"""Who takes part: the coordinator's decisions as a pure state machine.

Rules:

 1. A worker introduces itself (protocol version, job id, worker_id), gets the job spec, builds its replica, and says it
    is ready (layout, parameters, round, samples, classes). Its place is taken from the introduction on.
 2. Another protocol version, another job id, a worker_id that is live, or one worker too many is refused, naming both
    values. So is a readiness that differs from the first one's.
 3. The view forms when all M workers are ready: number 1, worker_index by natural order of worker_id ("worker-2" before
    "worker-10"), so that equal names give equal indices whatever the order of arrival.
 4. Before the view has formed, a worker that goes frees its place. If the view has not formed `join_s` after the first
    introduction, the job fails and says who was there; while nobody is there, that clock stands still.
 5. After it, a worker that goes without Leave, or leaves with a failure, fails the job; so does one whose final state
    differs from that of the first that left. One that was told of another's failure passes it on and is not named as
    its cause. When all have left, the job is finished.

This is the one place that decides which view may close a round: today the view that formed, all of its workers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, auto

from common.config import WORKER_ID, WORKER_ID_RULE
from common.errors import refusal
from ps.rounds import Ending


class WhyNot(Enum):
    """Why a worker is refused."""

    PROTOCOL_VERSION = auto()
    JOB = auto()
    NAME = auto()
    WORKER_ID = auto()
    VIEW_FULL = auto()
    LAYOUT = auto()
    PARAMETERS = auto()
    ROUND = auto()
    DATA = auto()


@dataclass(frozen=True, kw_only=True)
class Introduced:
    """A worker has said who it is, on connection `connection`."""

    connection: int
    protocol_version: int
    job_id: str
    worker_id: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A worker has built its replica."""

    connection: int
    layout_digest: bytes
    replica_digest: bytes
    round: int
    samples: int
    classes: str
    address: str = ""


@dataclass(frozen=True, kw_only=True)
class Left:
    """A worker has called Leave; `replica_digest` is that of its final state."""

    worker_id: str
    ending: Ending
    text: str = ""
    retry: bool = True
    replica_digest: bytes = b""


@dataclass(frozen=True, kw_only=True)
class ConnectionLost:
    """The stream of a worker's Join has ended."""

    connection: int


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


Event = Introduced | Ready | Left | ConnectionLost | Tick


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Send the job spec."""

    connection: int


@dataclass(frozen=True, kw_only=True)
class Refuse:
    """Refuse the worker on this connection."""

    connection: int
    worker_id: str
    why: WhyNot
    text: str


@dataclass(frozen=True, kw_only=True)
class FormView:
    """All workers are ready: admit them. Everything is ordered by worker_index."""

    view: int
    worker_ids: tuple[str, ...]
    connections: tuple[int, ...]
    samples: tuple[int, ...]
    layout_digest: bytes
    round: int
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReportJoined:
    """Say aloud who is here, who of them is not ready yet, and how many are missing."""

    worker_ids: tuple[str, ...]
    not_ready: tuple[str, ...]
    newcomer: str | None
    expected: int
    waited_s: float


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The job cannot go on."""

    text: str
    worker_ids: tuple[str, ...]
    retry: bool


@dataclass(frozen=True, kw_only=True)
class Finish:
    """All workers have left."""

    ending: Ending


Effect = Offer | Refuse | FormView | ReportJoined | Fail | Finish


@dataclass(frozen=True, kw_only=True)
class MembershipConfig:
    """What the machine is told at its start: M = `workers`, deadlines in seconds."""

    job_id: str
    protocol_version: int
    workers: int
    same_samples: bool
    join_s: float
    report_s: float


@dataclass
class _Member:
    connection: int
    ready: Ready | None = None


class Membership:
    """Members of one job; see the rules on top of this file."""

    def __init__(self, config: MembershipConfig) -> None:
        self.config = config
        self.failed = False
        self.formed = False
        self._members: dict[str, _Member] = {}
        self._endings: dict[str, Ending] = {}
        self._final: tuple[str, bytes] | None = None
        self._since_s: float | None = None
        self._reported_s = 0.0

    def handle(self, event: Event, now_s: float) -> list[Effect]:
        """Takes one event at a time `now_s` (monotonic seconds); returns what is to be done, in order."""
        if self.failed:
            return []
        match event:
            case Introduced():
                return self._introduced(event, now_s)
            case Ready():
                return self._ready(event)
            case Left():
                return self._left(event)
            case ConnectionLost():
                return self._lost(event)
            case Tick():
                return self._tick(now_s)

    @property
    def worker_ids(self) -> tuple[str, ...]:
        """Everyone who has a place, in natural order."""
        return tuple(sorted(self._members, key=natural_order))

    def _introduced(self, event: Introduced, now_s: float) -> list[Effect]:
        why_not = self._introduction_refusal(event)
        if why_not:
            why, text = why_not
            return [Refuse(connection=event.connection, worker_id=event.worker_id, why=why, text=text)]
        if self._since_s is None:
            self._since_s = self._reported_s = now_s
        self._members[event.worker_id] = _Member(connection=event.connection)
        return [Offer(connection=event.connection), self._report(now_s, event.worker_id)]

    def _introduction_refusal(self, event: Introduced) -> tuple[WhyNot, str] | None:
        config, who = self.config, f"worker {event.worker_id}"
        if event.protocol_version != config.protocol_version:
            rule = f"protocol_version={config.protocol_version}"
            return WhyNot.PROTOCOL_VERSION, refusal(rule, "protocol_version", event.protocol_version, who)
        if event.job_id not in ("", config.job_id):
            return WhyNot.JOB, refusal(f"job_id={config.job_id}", "job_id", event.job_id, who)
        if not WORKER_ID.fullmatch(event.worker_id):
            return WhyNot.NAME, refusal(WORKER_ID_RULE, "worker_id", repr(event.worker_id[:80]))
        if event.worker_id in self._members and event.worker_id not in self._endings:
            return WhyNot.WORKER_ID, refusal("a worker_id that is not live", "worker_id", event.worker_id)
        if self.formed or len(self._members) >= config.workers:
            rule = f"at most workers={config.workers} in the view ({', '.join(self.worker_ids)})"
            return WhyNot.VIEW_FULL, refusal(rule, "worker_id", event.worker_id)
        return None

    def _ready(self, event: Ready) -> list[Effect]:
        worker_id = self._worker_at(event.connection)
        if worker_id is None or self.formed:
            return []
        why_not = self._readiness_refusal(event, worker_id)
        if why_not:
            self._drop(worker_id)
            why, text = why_not
            return [Refuse(connection=event.connection, worker_id=worker_id, why=why, text=text)]
        self._members[worker_id].ready = event
        everyone = [member.ready for member in self._members.values()]
        if len(everyone) < self.config.workers or None in everyone:
            return []
        self.formed = True
        members = [self._members[name] for name in self.worker_ids]
        return [
            FormView(
                view=1,
                worker_ids=self.worker_ids,
                connections=tuple(member.connection for member in members),
                samples=tuple(member.ready.samples for member in members if member.ready),
                addresses=tuple(member.ready.address for member in members if member.ready and member.ready.address),
                layout_digest=event.layout_digest,
                round=event.round,
            )
        ]

    def _readiness_refusal(self, event: Ready, worker_id: str) -> tuple[WhyNot, str] | None:
        first_id, first = next(((n, m.ready) for n, m in self._members.items() if m.ready), (worker_id, event))
        compared = [
            (WhyNot.LAYOUT, "layout_digest", first.layout_digest.hex(), event.layout_digest.hex()),
            (WhyNot.ROUND, "round", first.round, event.round),
            (WhyNot.PARAMETERS, "replica_digest", first.replica_digest.hex(), event.replica_digest.hex()),
            (WhyNot.DATA, "classes", first.classes, event.classes),
        ]
        if self.config.same_samples:
            compared.append((WhyNot.DATA, "samples", first.samples, event.samples))
        for why, name, expected, got in compared:
            if expected != got:
                return why, refusal(f"{name}={expected} as on {first_id}", name, got, f"worker {worker_id}")
        return None

    def _left(self, event: Left) -> list[Effect]:
        if event.worker_id not in self._members or not self.formed:
            return []
        self._endings[event.worker_id] = event.ending
        if event.ending is Ending.ABORTED:
            return [self._fail(event.text, (), retry=event.retry)]
        if event.ending is Ending.FAILED:
            return [self._fail(f"{event.worker_id} failed: {event.text}", (event.worker_id,), retry=True)]
        mismatch = self._final_mismatch(event)
        if mismatch:
            return [mismatch]
        if len(self._endings) < len(self._members):
            return []
        stopped = Ending.STOPPED in self._endings.values()
        return [Finish(ending=Ending.STOPPED if stopped else Ending.COMPLETED)]

    def _final_mismatch(self, event: Left) -> Fail | None:
        if self._final is None:
            self._final = (event.worker_id, event.replica_digest)
        first, digest = self._final
        if digest == event.replica_digest:
            return None
        rule = f"replica_digest={digest.hex()} as on {first}"
        text = refusal(rule, "replica_digest", event.replica_digest.hex(), f"{event.worker_id}, at the end")
        return self._fail(f"the replicas differ: {text}", (first, event.worker_id), retry=False)

    def _lost(self, event: ConnectionLost) -> list[Effect]:
        worker_id = self._worker_at(event.connection)
        if worker_id is None or worker_id in self._endings:
            return []
        if not self.formed:
            self._drop(worker_id)
            return []
        return [self._fail(f"{worker_id} is gone: its Join stream ended", (worker_id,), retry=True)]

    def _tick(self, now_s: float) -> list[Effect]:
        if self.formed or self._since_s is None:
            return []
        if now_s - self._since_s > self.config.join_s:
            here = ", ".join(self.worker_ids) or "none"
            rule = f"{self.config.workers} workers to be ready within {self.config.join_s:g} s"
            text = refusal(rule, "ready", self._ready_count(), f"joined: {here}")
            return [self._fail(text, self.worker_ids, retry=True)]
        if now_s - self._reported_s < self.config.report_s:
            return []
        return [self._report(now_s)]

    def _drop(self, worker_id: str) -> None:
        """Frees a place; with nobody there the clock of rule 4 stands still."""
        del self._members[worker_id]
        if not self._members:
            self._since_s = None

    def _worker_at(self, connection: int) -> str | None:
        return next((name for name, member in self._members.items() if member.connection == connection), None)

    def _ready_count(self) -> int:
        return sum(member.ready is not None for member in self._members.values())

    def _report(self, now_s: float, newcomer: str | None = None) -> ReportJoined:
        self._reported_s = now_s
        return ReportJoined(
            worker_ids=self.worker_ids,
            not_ready=tuple(name for name in self.worker_ids if self._members[name].ready is None),
            newcomer=newcomer,
            expected=self.config.workers,
            waited_s=now_s - (self._since_s if self._since_s is not None else now_s),
        )

    def _fail(self, text: str, worker_ids: tuple[str, ...], *, retry: bool) -> Fail:
        self.failed = True
        return Fail(text=text, worker_ids=worker_ids, retry=retry)


def natural_order(worker_id: str) -> list[tuple[bool, int, str]]:
    """Sort key that compares runs of digits as numbers."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", worker_id)]
