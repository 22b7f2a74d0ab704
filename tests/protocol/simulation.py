"""M sessions and S shards over a simulated network that reorders, repeats, delays and breaks, as a schedule says.

What is real: `Session`, `Rounds`, `ShardReducer`, the layout and the codecs. What is simulated: the two gRPC shells and
the network between them. What the network may do:

 - deliver what is in flight in any order, also on one stream, with two exceptions that every stream gives: a Hello is
   the first word on it, and a Welcome the first answer;
 - deliver a contribution or an average more than once. A copy that has fallen two rounds behind is dropped here: the
   rounds would refuse it (their rule 4), and no stream can hold back a message for a whole round;
 - break the stream of a worker and a shard: all that is in flight on it is lost, in both directions. The worker notices
   and, some time later, opens a new one. The server is not told: today it would end the job (rule 8 of the rounds).

Nothing else gets lost. Gradients depend on the averages of the rounds before, as in training, so that a replica that
decodes another average pushes other bytes and another parameter digest from then on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from common.codecs import Encoded, Float32, RandomKey
from common.config import JobSpec
from common.layout import Bucket, BucketKind, Layout, TensorSpec, plan_layout, pull_codec, push_codec, state_codec
from ps import rounds as r
from ps.reduce import ShardReducer
from worker import session as s

VIEW = 1
Averages = tuple[Float32, Float32]
"""Gradient and state vector of one round."""


def local_vectors(layout: Layout, worker: int, round_: int, last: Averages | None) -> Averages:
    """A worker's gradient and state: its own draw, plus what the replicas have in common from the last round."""
    random = np.random.default_rng([worker, round_])
    gradient = random.standard_normal(layout.d).astype(np.float32)
    state = random.standard_normal(layout.e).astype(np.float32)
    if last is not None:
        gradient += np.float32(0.5) * last[0]
        state += last[1]
    return gradient, state


def digest_of(last: Averages | None) -> bytes:
    """Stands for the digest of the parameters."""
    return hashlib.blake2b(b"" if last is None else last[0].tobytes() + last[1].tobytes(), digest_size=16).digest()


# The network


@dataclass(frozen=True)
class Message:
    """In flight on a stream. `content` is a wire message or a word of the protocol, `bucket` of one of a bucket."""

    stream: Stream
    to_server: bool
    content: s.Push | r.HelloReceived | r.Welcome | r.SendAverage
    encoded: Encoded | None = None
    digest: bytes = b""

    @property
    def has_copies(self) -> bool:
        """Whether the network may deliver it twice."""
        return isinstance(self.content, (s.Push, r.SendAverage))


@dataclass(eq=False)
class Stream:
    """One Exchange stream of a worker and a shard."""

    worker: int
    shard: int
    welcomed: bool = False
    broken: bool = False


# The two shells


class Server:
    """One shard: what `ps/aggregator.py` is, without gRPC and threads."""

    def __init__(self, network: Simulation, shard: int, *, first_round: int) -> None:
        self.added: Counter[tuple[int, int, int]] = Counter()
        """(round, bucket, worker) by how often it was added."""
        self.averages: dict[tuple[int, int], Encoded] = {}
        self._network = network
        self._shard = shard
        self._peers: dict[int, Stream] = {}
        self._held: dict[tuple[int, int], Encoded] = {}
        self._reducer = ShardReducer(network.layout, network.spec, shard)
        config = r.RoundsConfig(
            view=VIEW,
            worker_ids=tuple(f"worker-{i}" for i in range(network.spec.workers)),
            buckets=self._reducer.buckets,
            together=self._reducer.published_together,
            first_round=first_round,
            deadline_s=60.0,
            report_s=5.0,
        )
        self.rounds = r.Rounds(config, now_s=0.0)

    def receive(self, message: Message) -> None:
        """Turns a message into an event and performs the effects."""
        content = message.content
        if isinstance(content, r.HelloReceived):
            self._peers[content.worker_index] = message.stream
            self._perform(self.rounds.handle(content, 0.0))
            return
        assert isinstance(content, s.Push)
        assert message.encoded is not None
        if content.round < self.rounds.round - 1:
            return  # see the top of the file
        self._reducer.check(content.bucket, self._reducer.push_codec_of(content.bucket).wire_name, message.encoded)
        event = r.ContributionReceived(
            worker_index=message.stream.worker,
            view=VIEW,
            round=content.round,
            bucket=content.bucket,
            parameter_digest=message.digest,
        )
        self._perform(self.rounds.handle(event, 0.0), message.encoded, content.round)

    def _perform(self, effects: list[r.Effect], encoded: Encoded | None = None, round_: int = 0) -> None:
        for effect in effects:
            match effect:
                case r.Hold():
                    assert encoded is not None
                    self._held[effect.worker_index, effect.bucket] = encoded
                case r.Add():
                    content = self._held.pop((effect.worker_index, effect.bucket), encoded)
                    assert content is not None
                    worker = effect.worker_index
                    self._reducer.add(effect.bucket, content, worker=worker, round_=effect.round, first=effect.first)
                    self.added[round_, effect.bucket, effect.worker_index] += 1
                case r.Publish():
                    self._publish(effect)
                case r.SendAverage():
                    self._send(effect)
                case r.Welcome():
                    self._network.send(Message(self._peers[effect.worker_index], to_server=False, content=effect))
                case r.Forget():
                    self.averages = {key: value for key, value in self.averages.items() if key[0] > effect.round}
                case r.Ignore():
                    pass
                case _:
                    raise AssertionError(f"shard {self._shard}: {effect}")

    def _publish(self, effect: r.Publish) -> None:
        for bucket, encoded in self._reducer.publish(effect.round, effect.buckets):
            self.averages[effect.round, bucket] = encoded
            for worker in self._peers:
                self._send(r.SendAverage(worker_index=worker, round=effect.round, bucket=bucket))

    def _send(self, effect: r.SendAverage) -> None:
        encoded = self.averages[effect.round, effect.bucket]
        self._network.send(Message(self._peers[effect.worker_index], to_server=False, content=effect, encoded=encoded))


class Worker:
    """One worker: what `worker/exchange/ps.py` is, without gRPC and threads, and with reconnects."""

    def __init__(self, network: Simulation, index: int, *, first_round: int) -> None:
        self.index = index
        self.results: dict[int, Averages] = {}
        """Decoded averages by round, of the rounds that are complete."""
        self.streams: dict[int, Stream] = {}
        self._network = network
        self._layout = layout = network.layout
        self._session = s.Session(tuple(b.shard for b in layout.buckets), first_round=first_round, reconnects=True)
        self._kept: dict[tuple[int, int], tuple[Encoded, bytes]] = {}
        self._unencoded: list[Bucket] = []
        self._last: Averages | None = None
        self._key = RandomKey(seed=network.spec.seed, round=0, source=index)

    @property
    def round(self) -> int:
        """The round that has begun last."""
        return self._session.round

    @property
    def is_done(self) -> bool:
        """All rounds are complete."""
        return self._session.complete and self._session.needed_round == self._network.stop_round

    def can_connect(self, shard: int) -> bool:
        """Whether the stream to a shard is missing or broken."""
        return shard not in self.streams or self.streams[shard].broken

    def connect(self, shard: int) -> None:
        """Opens a stream to a shard and says Hello."""
        self.streams[shard] = Stream(self.index, shard)
        hello = r.HelloReceived(worker_index=self.index, view=VIEW, round=self._session.needed_round)
        self._network.send(Message(self.streams[shard], to_server=True, content=hello))

    def lose(self, shard: int) -> None:
        """Notices that a stream is broken."""
        self._perform(self._session.handle(s.ShardLost(shard=shard, text="broken")))

    def can_work(self) -> bool:
        """Whether there is a bucket to encode or a round to begin."""
        return bool(self._unencoded) or (self._session.complete and not self.is_done)

    def work(self) -> None:
        """Encodes the next bucket; begins the next round if there is none left."""
        if not self._unencoded:
            self._begin()
            return
        bucket = self._unencoded.pop(0)
        codec = self._network.push if bucket.kind is BucketKind.GRADIENT else self._network.state
        encoded = codec.encode(self._values(bucket), bucket.start, self._key, self._measured)
        self._kept[self.round, bucket.number] = encoded, digest_of(self._last)
        self._perform(self._session.handle(s.BucketEncoded(bucket=bucket.number)))

    def _begin(self) -> None:
        self._last = self.results.get(self.round)
        self._perform(self._session.handle(s.BeginRound(round=self.round + 1)))
        self._vectors = local_vectors(self._layout, self.index, self.round, self._last)
        self._key = replace(self._key, round=self.round)
        self._measured = self._network.push.measure(self._vectors[0], 0)
        self._unencoded = list(self._layout.buckets)
        self._out = np.full(self._layout.d, np.nan, np.float32), np.full(self._layout.e, np.nan, np.float32)

    def _values(self, bucket: Bucket, of: Averages | None = None) -> Float32:
        gradient, state = of or self._vectors
        return (gradient if bucket.kind is BucketKind.GRADIENT else state)[bucket.start : bucket.stop]

    def receive(self, message: Message) -> None:
        """Turns a message into an event and performs the effects."""
        content = message.content
        if isinstance(content, r.Welcome):
            message.stream.welcomed = True
            event: s.Event = s.Welcomed(
                shard=message.stream.shard, round=content.round, missing=frozenset(content.missing)
            )
        else:
            assert isinstance(content, r.SendAverage)
            event = s.AverageReceived(round=content.round, bucket=content.bucket)
        self._perform(self._session.handle(event), message.encoded)

    def _perform(self, effects: list[s.Effect], encoded: Encoded | None = None) -> None:
        for effect in effects:
            match effect:
                case s.Push():
                    content, digest = self._kept[effect.round, effect.bucket]
                    stream = self.streams[effect.shard]
                    self._network.send(Message(stream, to_server=True, content=effect, encoded=content, digest=digest))
                case s.Accept():
                    assert encoded is not None
                    self._decode(self._layout.buckets[effect.bucket], encoded)
                case s.Complete():
                    assert effect.round not in self.results
                    self.results[effect.round] = self._out
                case s.Forget():
                    self._kept = {key: value for key, value in self._kept.items() if key[0] > effect.round}
                case s.Drop():
                    pass
                case s.Fail():
                    raise AssertionError(f"worker {self.index}: {effect}")
        assert len({round_ for round_, _ in self._kept}) <= 2

    def _decode(self, bucket: Bucket, encoded: Encoded) -> None:
        codec = self._network.pull[bucket.shard] if bucket.kind is BucketKind.GRADIENT else self._network.state
        codec.check(encoded, bucket.start, bucket.n)
        codec.decode(encoded, bucket.start, self._values(bucket, self._out), add=False)


# The schedule


@dataclass
class Schedule:
    """Bytes that decide; when they are used up, whatever is first happens: oldest first, nothing repeats or breaks."""

    choices: Iterator[int]

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return next(self.choices, 0) * n // 256


class DeadlockError(AssertionError):
    """Nothing is in flight, nobody can do anything, and not all rounds are complete."""


@dataclass
class Simulation:
    """One job from its first Hello until all workers have all averages of all rounds."""

    tensors: list[TensorSpec]
    spec: JobSpec
    rounds: int = 3
    first_round: int = 0
    in_flight: list[Message] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.layout = plan_layout(self.tensors, self.spec)
        self.stop_round = self.first_round + self.rounds
        self.push = push_codec(self.layout, self.spec)
        self.pull = [pull_codec(self.layout, self.spec, shard) for shard in range(self.spec.servers)]
        self.state = state_codec(self.layout)
        self.servers = [Server(self, i, first_round=self.first_round) for i in range(self.spec.servers)]
        self.workers = [Worker(self, i, first_round=self.first_round) for i in range(self.spec.workers)]

    def send(self, message: Message) -> None:
        """Puts a message in flight, unless its stream is broken."""
        if not message.stream.broken:
            self.in_flight.append(message)

    def run(self, choices: bytes) -> None:
        """Runs to the end.

        Raises:
            DeadlockError: the end cannot be reached any more.
        """
        schedule = Schedule(iter(choices))
        acts = (self._work, self._connect, self._deliver, self._deliver, self._repeat, self._break)
        while not all(worker.is_done for worker in self.workers):
            chosen = acts[schedule.below(len(acts))]
            if not any(act(schedule) for act in (chosen, self._work, self._connect, self._deliver)):
                raise DeadlockError("\n".join(["nothing can happen any more", *self.log[-40:]]))

    def deliver_one(self, message: Message) -> None:
        """Delivers a message that is in flight."""
        self.in_flight.remove(message)
        self._hand_over(message)

    def deliver(self, *, shard: int) -> None:
        """Delivers everything that is or comes in flight to or from a shard, in order."""
        while waiting := [message for message in self._deliverable() if message.stream.shard == shard]:
            self.deliver_one(waiting[0])

    def break_stream(self, worker: int, shard: int) -> None:
        """Breaks a stream: what is in flight on it is lost, and its worker notices."""
        stream = self.workers[worker].streams[shard]
        stream.broken = True
        self.in_flight = [message for message in self.in_flight if message.stream is not stream]
        self.log.append(f"break worker {worker}, shard {shard}")
        self.workers[worker].lose(shard)

    def _work(self, schedule: Schedule) -> bool:
        able = [worker for worker in self.workers if worker.can_work()]
        if able:
            able[schedule.below(len(able))].work()
        return bool(able)

    def _connect(self, schedule: Schedule) -> bool:
        shards = range(self.spec.servers)
        able = [(worker, shard) for worker in self.workers for shard in shards if worker.can_connect(shard)]
        if able:
            worker, shard = able[schedule.below(len(able))]
            worker.connect(shard)
        return bool(able)

    def _deliverable(self) -> list[Message]:
        return [m for m in self.in_flight if m.to_server or m.stream.welcomed or isinstance(m.content, r.Welcome)]

    def _deliver(self, schedule: Schedule) -> bool:
        able = self._deliverable()
        if able:
            self.deliver_one(able[schedule.below(len(able))])
        return bool(able)

    def _hand_over(self, message: Message) -> None:
        self.log.append(f"deliver {message.content} to {'server' if message.to_server else 'worker'}")
        place = self.servers[message.stream.shard] if message.to_server else self.workers[message.stream.worker]
        place.receive(message)

    def _repeat(self, schedule: Schedule) -> bool:
        able = [message for message in self._deliverable() if message.has_copies]
        if able:
            self._hand_over(able[schedule.below(len(able))])
        return bool(able)

    def _break(self, schedule: Schedule) -> bool:
        able = [stream for worker in self.workers for stream in worker.streams.values() if not stream.broken]
        if able:
            stream = able[schedule.below(len(able))]
            self.break_stream(stream.worker, stream.shard)
        return bool(able)
