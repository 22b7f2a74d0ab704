"""The exchange without servers: every worker averages for itself what collectives of torch.distributed bring it.

With codec `none` a bucket is summed by an all-reduce in float32, the paper's setting of a fast network. With any other
codec the workers' encoded buckets are all-gathered, the paper's quantization in a ring: each worker decodes all of them
in order of worker_index, as a parameter server would, and gets its very bits. So does the state vector, uncompressed.

Three kinds of threads: the caller's says which buckets are ready; one encodes them and starts their collectives, in the
order of their numbers, which is the same on all workers; one waits for what has been started and averages it. The first
collective of a round compares rounds and parameter digests.

A collective that a lost peer breaks says neither who nor why. The coordinator does, through `fail`, so it is given a
moment; and since a collective cannot be broken off, it is left behind (`release`) if it does not end soon.
"""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.codecs import Codec, Encoded, Float32, RandomKey
from common.config import CodecName, JobSpec
from common.errors import CodecError, DatpsError, MismatchError, PeerLostError, refusal
from common.events import Emitter
from common.layout import Bucket, BucketKind, Layout, push_codec, state_codec
from common.timeline import OFF, Timeline
from worker.exchange.base import Traffic
from worker.exchange.coordination import GOOD_ENDINGS, Admission, End
from worker.exchange.encoder import Encoder, require_finite
from worker.exchange.gradients import GradientMemory, HostGradient
from worker.exchange.group import Group, Pending, RollCall, first_line
from worker.exchange.turns import Turns

GRACE_S = 5.0
"""What the coordinator gets to say who is lost, after a collective has failed."""
FAREWELL_S = 5.0
"""How long workers wait for each other before they leave in good order."""
ENDING_S = 1.0
"""How long a worker that leaves otherwise waits for collectives that are under way; most end as soon as peers leave."""
GLANCE_S = 0.2
"""How long to wait for a collective before looking whether to go on waiting."""
_HEADER = struct.Struct("<Q16s")
"""Round and parameter digest."""
_HEADER_NUMBER = -1
"""Among the numbers of the buckets that a round awaits."""


class CollectiveExchange:
    """One worker's exchange with all others; see `worker.exchange.base.Exchange`. `release` ends what is left of it."""

    def __init__(
        self,
        *,
        layout: Layout,
        spec: JobSpec,
        admission: Admission,
        group: Group,
        roll_call: RollCall,
        emit: Emitter,
        timeline: Timeline = OFF,
    ) -> None:
        self.stop_requested: str | None = None
        self._layout = layout
        self._spec = spec
        self._admission = admission
        self._group = group
        self._roll_call = roll_call
        self._emit = emit
        self._timeline = timeline
        self._encoder = Encoder(layout, spec, admission)
        self.feedback = self._encoder.feedback
        self._plain = state_codec(layout)
        self._link_bytes = link_bytes(layout, spec)
        self._turns = Turns(layout.buckets, whole=push_codec(layout, spec).needs_whole_vector)
        self._condition = threading.Condition()
        self._failure: DatpsError | None = None
        self._awaited: set[int] = set()
        self._held_bytes = 0
        self._round = 0
        self._digest = b""
        self._state: Float32 = np.empty(0, np.float32)
        self._gradient: GradientMemory = HostGradient(self._state)
        self._started_s = 0.0
        self._said_farewell = False
        self._leaves_s: float | None = None
        self._left_behind: list[Pending[Any]] = []
        self._to_start: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._under_way: queue.SimpleQueue[tuple[Pending[Any], Callable[[Any], None]] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._start_all, name="encode", daemon=True),
            threading.Thread(target=self._take_all, name="average", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def begin(self, round_: int, gradient: GradientMemory, parameter_digest: bytes) -> None:
        """See `worker.exchange.base.Exchange`."""
        with self._condition:
            if self._failure:
                raise self._failure
            self._round, self._gradient, self._digest = round_, gradient, parameter_digest
            self._awaited = {_HEADER_NUMBER, *(bucket.number for bucket in self._layout.buckets)}
            self._turns.begin()
            self._encoder.begin(round_, gradient)
            self._started_s = 0.0
        self._to_start.put(self._start_header)

    def ready(self, buckets: Iterable[int]) -> None:
        """See `worker.exchange.base.Exchange`."""
        numbers = tuple(buckets)
        self._gradient.final(numbers)
        self._to_start.put(self._gradient.start)
        with self._condition:
            self._started_s = self._started_s or time.perf_counter()
            for bucket in self._turns.ready(numbers):
                self._to_start.put(partial(self._start, bucket))

    def finish(self, state: Float32) -> Traffic:
        """See `worker.exchange.base.Exchange`; the bytes are what this worker's link carries, see `link_bytes`."""
        called_s = time.perf_counter()
        self._state = state
        self.ready(bucket.number for bucket in self._layout.of_kind(BucketKind.STATE))
        self._wait_for_averages()
        self._gradient.settle()
        now_s = time.perf_counter()
        return Traffic(
            pushed_bytes=self._link_bytes,
            pulled_bytes=self._link_bytes,
            seconds=now_s - self._started_s,
            waited_s=now_s - called_s,
        )

    def fail(self, text: str, retry: bool) -> None:
        """See `worker.exchange.base.Exchange`."""
        self._set_failure((PeerLostError if retry else MismatchError)(text))

    def close(self, end: End) -> None:
        """Ends our part; if all went well, once the others' has gone well too, but it does not wait for long.

        How it ended, the others hear from the coordinator. The connections stay open until `release`.
        """
        with self._condition:
            if self._leaves_s is not None:
                return
            well = end.ending in GOOD_ENDINGS and not self._failure
            self._leaves_s = time.monotonic() + (FAREWELL_S if well else ENDING_S)
            self._condition.notify_all()
            if well:
                self._to_start.put(self._start_farewell)
                self._condition.wait_for(lambda: self._failure or self._said_farewell, timeout=FAREWELL_S)

    def release(self) -> None:
        """Closes all connections, after `close`; at once, but for collectives that are still under way."""
        with self._condition:
            self._leaves_s = self._leaves_s or time.monotonic() + ENDING_S
            self._set_failure(PeerLostError("the exchange has ended"))
        self._to_start.put(None)
        for thread in self._threads:
            thread.join(FAREWELL_S + GRACE_S)
        stuck = [thread for thread in self._threads if thread.is_alive()]
        self._group.release([*self._left_behind, *stuck])

    # Starting collectives, on a thread of its own

    def _start_all(self) -> None:
        while (start := self._to_start.get()) is not None:
            if not self._failure:
                self._guarded(start)
        self._under_way.put(None)

    def _start_header(self) -> None:
        own = np.frombuffer(_HEADER.pack(self._round, self._digest), np.uint8).copy()
        self._under_way.put((self._group.all_gather(own), self._take_headers))

    def _start_farewell(self) -> None:
        self._under_way.put((self._group.all_gather(np.zeros(1, np.uint8)), self._take_farewells))

    def _start(self, bucket: Bucket) -> None:
        """Encodes a bucket and starts its collective."""
        codec, summed = self._encoder.codec_of(bucket), self._is_summed(bucket)
        if not self._make_room(4 * bucket.n if summed else codec.wire_bytes(bucket.start, bucket.n)):
            return
        if summed:
            values = self._fetch(bucket)
            start_ns = self._timeline.now_ns()
            reduced = self._group.all_reduce(values)
            self._under_way.put((reduced, lambda _: self._take_sum(bucket, start_ns)))
        else:
            own = self._encode(bucket, codec)
            start_ns = self._timeline.now_ns()
            gathered = self._group.all_gather(own)
            self._under_way.put((gathered, lambda rows: self._take_contributions(bucket, codec, rows, start_ns)))
        if bucket.number == len(self._layout.buckets) - 1:
            self._roll_call.say(self._round)

    def _fetch(self, bucket: Bucket) -> Float32:
        """The values of a bucket that is summed as it is, checked.

        Raises:
            CodecError: they are not finite.
        """
        with self._timeline.phase("fetch", self._round, bucket.number, bucket.kind):
            values = self._gradient.fetch(bucket)
            self._encoder.check(bucket, values)
        return values

    def _encode(self, bucket: Bucket, codec: Codec) -> NDArray[np.uint8]:
        """The scales of a bucket, then its payload."""
        own = np.empty(codec.wire_bytes(bucket.start, bucket.n), np.uint8)
        edge = 4 * codec.scale_count(bucket.start, bucket.n)
        with self._timeline.phase("encode", self._round, bucket.number, bucket.kind):
            values = self._room(bucket) if bucket.kind is BucketKind.STATE else None
            encoded = self._encoder.encode(bucket, own[edge:], values=values)
        own[:edge] = encoded.scales.astype("<f4", copy=False).view(np.uint8)
        return own

    def _make_room(self, more_bytes: int) -> bool:
        """Waits until so much more fits into the window beside what is under way; False after a failure."""

        def room() -> bool:
            return not self._held_bytes or self._held_bytes + more_bytes <= self._spec.exchange.window_bytes

        with self._condition:
            self._condition.wait_for(lambda: self._failure or room())
            self._held_bytes += more_bytes
            return self._failure is None

    # Taking what collectives bring, on a thread of its own

    def _take_all(self) -> None:
        while (item := self._under_way.get()) is not None:
            pending, take = item
            if not self._ended(pending):
                self._left_behind.append(pending)
            elif not self._failure:
                self._guarded(lambda: take(pending.result()))  # noqa: B023

    def _ended(self, pending: Pending[Any]) -> bool:
        """Waits for a collective, also after a failure, but not for long after we have left."""
        while True:
            left_s = GLANCE_S if self._leaves_s is None else max(self._leaves_s - time.monotonic(), 0.0)
            if pending.ended(min(left_s, GLANCE_S)):
                return True
            if not left_s:
                return False

    def _take_headers(self, rows: NDArray[np.uint8]) -> None:
        """Compares what the workers begin the round with.

        Raises:
            MismatchError: they differ.
        """
        headers = [_HEADER.unpack(row.tobytes()) for row in rows]
        for name, values in zip(("round", "parameter_digest"), zip(*headers, strict=True), strict=True):
            words = [value.hex() if isinstance(value, bytes) else str(value) for value in values]
            others = [worker for worker, word in enumerate(words) if word != words[0]]
            if others:
                first, *ids = self._admission.worker_ids[0], *(self._admission.worker_ids[x] for x in others)
                where = f"{', '.join(ids)}, round {self._round}"
                text = refusal(f"{name}={words[0]} as on {first}", name, words[others[0]], where)
                raise MismatchError(f"the replicas differ: {text}")
        self._done(_HEADER_NUMBER, 0)

    def _take_farewells(self, _rows: NDArray[np.uint8]) -> None:
        with self._condition:
            self._said_farewell = True
            self._condition.notify_all()

    def _take_sum(self, bucket: Bucket, start_ns: int) -> None:
        self._timeline.add_phase(
            "all-reduce", start_ns, self._round, bucket.number, track="all-reduce", kind=bucket.kind
        )
        self._average(bucket)
        self._done(bucket.number, 4 * bucket.n)

    def _take_contributions(self, bucket: Bucket, codec: Codec, rows: NDArray[np.uint8], start_ns: int) -> None:
        """Equation (A3), in order of worker_index, as `ps.reduce` does it."""
        self._timeline.add_phase(
            "all-gather", start_ns, self._round, bucket.number, track="all-gather", kind=bucket.kind
        )
        values, edge = self._room(bucket), 4 * codec.scale_count(bucket.start, bucket.n)
        with self._timeline.phase("decode", self._round, bucket.number, bucket.kind):
            for worker, row in enumerate(rows):
                key = RandomKey(seed=self._spec.seed, round=self._round, source=worker)
                scales = row[:edge].copy().view("<f4").astype(np.float32, copy=False)
                encoded = Encoded(scales=scales, payload=row[edge:])
                codec.decode(encoded, bucket.start, values, add=worker > 0, key=key)
        self._average(bucket)
        self._done(bucket.number, rows.shape[1])

    def _average(self, bucket: Bucket) -> None:
        """Makes a sum the average.

        Raises:
            CodecError: it is not finite.
        """
        with self._timeline.phase("average", self._round, bucket.number, bucket.kind):
            values = self._room(bucket)
            np.divide(values, np.float32(self._spec.workers), out=values)
            try:
                require_finite(values, bucket, self._plain)
            except CodecError as error:
                where = f"average of round {self._round}, {bucket.kind.value} bucket {bucket.number}"
                raise CodecError(f"{error}; {where}") from None
            if bucket.kind is BucketKind.GRADIENT:
                self._gradient.store(bucket)

    def _done(self, number: int, freed_bytes: int) -> None:
        with self._condition:
            self._awaited.discard(number)
            self._held_bytes -= freed_bytes
            self._condition.notify_all()

    # What the threads share

    def _is_summed(self, bucket: Bucket) -> bool:
        return bucket.kind is BucketKind.GRADIENT and self._spec.codec.name is CodecName.NONE

    def _room(self, bucket: Bucket) -> Float32:
        """Where the host has a bucket's values, or puts its average."""
        if bucket.kind is BucketKind.GRADIENT:
            return self._gradient.room(bucket)
        return self._state[bucket.start : bucket.stop]

    def _guarded(self, work: Callable[[], None]) -> None:
        """Does some work of a thread; what goes wrong is the exchange's failure."""
        try:
            work()
        except DatpsError as error:
            self._set_failure(error)
        except RuntimeError as error:  # torch.distributed knows no other
            with self._condition:
                self._condition.wait_for(lambda: self._failure or self._leaves_s is not None, timeout=GRACE_S)
            self._set_failure(PeerLostError(f"round {self._round} broke off: {first_line(error)}"))
        except Exception as error:
            self._set_failure(PeerLostError(f"defect in the exchange: {error!r}"))
            raise

    def _set_failure(self, error: DatpsError) -> None:
        """The first one counts."""
        with self._condition:
            self._failure = self._failure or error
            self._condition.notify_all()

    # Waiting, on the caller's thread

    def _wait_for_averages(self) -> None:
        """Waits until the round is complete, and says now and then whom it waits for.

        Raises:
            DatpsError: the exchange has failed, or the round takes too long.
        """
        deadlines, started_s, waited_s = self._spec.deadlines, time.monotonic(), 0.0
        while True:
            with self._condition:
                wait_s = min(deadlines.report_s, max(deadlines.round_s - waited_s, 0.0))
                self._condition.wait_for(lambda: self._failure or not self._awaited, timeout=wait_s)
                if self._failure:
                    raise self._failure
                if not self._awaited:
                    return
            late = self._roll_call.late(self._round) or ["averages that are on their way"]
            waited_s = time.monotonic() - started_s
            self._emit("waiting", missing=late, waited_s=round(waited_s, 1), round=self._round)
            if waited_s >= deadlines.round_s:
                text = f"round {self._round} did not close within {deadlines.round_s:g} s"
                self._set_failure(PeerLostError(f"{text}: waiting for {', '.join(late)}"))


def link_bytes(layout: Layout, spec: JobSpec) -> int:
    """What one round puts on a worker's link in each direction, by the ring algorithms that gloo and NCCL use.

    With M workers: of an all-reduce of n float32 values, 2 (M-1)/M * 4 n bytes; of an all-gather of n bytes from each,
    (M-1) n bytes. The libraries' own headers are not counted.
    """
    push, plain, m = push_codec(layout, spec), state_codec(layout), spec.workers
    total = (m - 1.0) * _HEADER.size
    for bucket in layout.buckets:
        if bucket.kind is BucketKind.GRADIENT and spec.codec.name is CodecName.NONE:
            total += 2 * (m - 1) / m * 4 * bucket.n
        else:
            codec = push if bucket.kind is BucketKind.GRADIENT else plain
            total += (m - 1) * codec.wire_bytes(bucket.start, bucket.n)
    return round(total)
