"""The worker's half of the protocol as a pure state machine: one replica, all shards.

Rules (docs/protocol.md explains them):

 1. A round begins when the worker says so; its buckets are pushed as they are encoded, to shards that are open.
 2. A shard opens with a Welcome, which names the open round there and the buckets that it lacks; encoded ones among
    them are pushed again. A re-sent contribution is the first one's bytes.
 3. Each bucket's average is accepted once, in the current round; a copy of it, or an average of the round before, is
    dropped. An average of a later round breaks the protocol.
 4. A round is complete when all averages are accepted. Only then can the next one begin.
 5. Contributions of the round before are kept until the current round is complete: a restarted server may need them.
 6. A refused contribution, or an Abort, fails the session.
 7. A shard that is lost closes; the session fails, naming it, unless it is told to wait for a new stream.

`handle(event) -> effects`. Events and effects carry ids, never tensors; time plays no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class Failure(Enum):
    """What a failed session means for a new try."""

    PEER_LOST = auto()
    MISMATCH = auto()


@dataclass(frozen=True, kw_only=True)
class BeginRound:
    """The worker starts a round; its contributions follow."""

    round: int


@dataclass(frozen=True, kw_only=True)
class BucketEncoded:
    """A bucket of the current round is encoded and kept."""

    bucket: int


@dataclass(frozen=True, kw_only=True)
class Welcomed:
    """A shard's stream is open."""

    shard: int
    round: int
    missing: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class AverageReceived:
    """An average has arrived; its content has been checked."""

    round: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A server refuses a Hello or a contribution."""

    shard: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Aborted:
    """A server has ended the job."""

    text: str
    retry: bool


@dataclass(frozen=True, kw_only=True)
class ShardLost:
    """A shard's stream has ended; `text` says how."""

    shard: int
    text: str


Event = BeginRound | BucketEncoded | Welcomed | AverageReceived | Refused | Aborted | ShardLost


@dataclass(frozen=True, kw_only=True)
class Push:
    """Push a kept contribution to its shard."""

    shard: int
    round: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Accept:
    """Decode this average."""

    round: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Drop:
    """An average that has been accepted already."""

    round: int
    bucket: int


@dataclass(frozen=True, kw_only=True)
class Complete:
    """All averages of the round are accepted."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Forget:
    """The contributions of this round are needed no more."""

    round: int


@dataclass(frozen=True, kw_only=True)
class Fail:
    """The session cannot go on."""

    text: str
    failure: Failure


Effect = Push | Accept | Drop | Complete | Forget | Fail


class Session:
    """One worker's protocol state over all shards; see the rules on top of this file."""

    def __init__(
        self,
        shard_of: tuple[int, ...],
        *,
        first_round: int,
        reconnects: bool = False,
        carried: frozenset[int] | None = None,
    ) -> None:
        """
        Args:
            shard_of: shard by bucket number.
            first_round: the round that begins first.
            reconnects: wait for a new stream when a shard is lost, instead of failing (rule 7).
            carried: the buckets that this session is for; None: all.
        """
        self.failed = False
        self.round = first_round - 1
        self._shard_of = shard_of
        self._reconnects = reconnects
        self._open: set[int] = set()
        self._encoded: set[int] = set()
        self._carried = frozenset(range(len(shard_of))) if carried is None else carried
        self._accepted: set[int] = set(self._carried)
        self._previous_kept = False

    @property
    def complete(self) -> bool:
        """True between rounds."""
        return len(self._accepted) == len(self._carried)

    @property
    def needed_round(self) -> int:
        """The round whose averages are needed next: what a Hello says."""
        return self.round + 1 if self.complete else self.round

    def handle(self, event: Event) -> list[Effect]:
        """Takes one event; returns what is to be done, in order."""
        if self.failed:
            return []
        match event:
            case BeginRound():
                return self._begin(event)
            case BucketEncoded():
                return self._bucket_encoded(event)
            case Welcomed():
                return self._welcomed(event)
            case AverageReceived():
                return self._average(event)
            case Refused():
                return self._fail(f"shard {event.shard} refuses: {event.text}", Failure.MISMATCH)
            case Aborted():
                return self._fail(event.text, Failure.PEER_LOST if event.retry else Failure.MISMATCH)
            case ShardLost():
                return self._lost(event)

    def _begin(self, event: BeginRound) -> list[Effect]:
        if not self.complete or event.round != self.round + 1:
            raise ValueError(
                f"round {event.round} cannot begin: round {self.round} is the last, complete={self.complete}"
            )
        self.round = event.round
        self._previous_kept = bool(self._encoded)
        self._encoded, self._accepted = set(), set()
        return []

    def _bucket_encoded(self, event: BucketEncoded) -> list[Effect]:
        self._encoded.add(event.bucket)
        shard = self._shard_of[event.bucket]
        if shard not in self._open:
            return []
        return [Push(shard=shard, round=self.round, bucket=event.bucket)]

    def _welcomed(self, event: Welcomed) -> list[Effect]:
        self._open.add(event.shard)
        if event.round == self.needed_round:
            lacking = sorted(event.missing & self._encoded) if event.round == self.round else []
            return [Push(shard=event.shard, round=self.round, bucket=bucket) for bucket in lacking]
        if event.round == self.needed_round + 1:
            return []  # it has closed our round and sends us its averages
        text = f"shard {event.shard} has round {event.round} open, this worker needs round {self.needed_round}"
        return self._fail(text, Failure.MISMATCH)

    def _average(self, event: AverageReceived) -> list[Effect]:
        if event.round > self.round:
            text = f"got an average of round {event.round} in round {self.round} (bucket {event.bucket})"
            return self._fail(text, Failure.MISMATCH)
        if event.round < self.round or event.bucket in self._accepted:
            return [Drop(round=event.round, bucket=event.bucket)]
        self._accepted.add(event.bucket)
        effects: list[Effect] = [Accept(round=event.round, bucket=event.bucket)]
        if self.complete:
            if self._previous_kept:
                effects.append(Forget(round=self.round - 1))
            effects.append(Complete(round=self.round))
        return effects

    def _lost(self, event: ShardLost) -> list[Effect]:
        self._open.discard(event.shard)
        if self._reconnects:
            return []
        return self._fail(event.text, Failure.PEER_LOST)

    def _fail(self, text: str, failure: Failure) -> list[Effect]:
        self.failed = True
        return [Fail(text=text, failure=failure)]
