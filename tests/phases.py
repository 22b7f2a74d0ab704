"""Timelines as tests read them: spans with the names of processes and tracks, and what must hold of them."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.layout import BucketKind, Layout

OF_BUCKETS = frozenset(
    ("fetch", "encode", "push", "held", "add", "average", "pull", "decode", "all-reduce", "all-gather")
)
"""Names of the phases of buckets: those of docs/tracing.md."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One span, in nanoseconds."""

    process: str
    track: str
    name: str
    start_ns: int
    stop_ns: int
    args: dict[str, Any]


def spans_of(path: Path) -> list[Span]:
    """The spans of a file, once it is clear that it is sound: see below what is asserted of any."""
    events = json.loads(path.read_text())["traceEvents"]
    named = [event for event in events if event["ph"] == "M"]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    tracks = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    assert len(named) == len(processes) + len(tracks)  # each is named once
    assert len(set(processes.values())) == len(processes)
    assert len({(pid, name) for (pid, _), name in tracks.items()}) == len(tracks)
    assert {event["ph"] for event in events} <= {"M", "X"}
    found = [
        Span(
            process=processes[event["pid"]],
            track=tracks[event["pid"], event["tid"]],
            name=event["name"],
            start_ns=round(1000 * event["ts"]),
            stop_ns=round(1000 * event["ts"]) + round(1000 * event["dur"]),
            args=event["args"],
        )
        for event in events
        if event["ph"] == "X"
    ]
    assert_they_nest(found)
    assert_buckets_are_said(found)
    return found


def assert_they_nest(spans: Iterable[Span]) -> None:
    """Spans of one track nest or follow each other, and none ends before it begins."""
    by_track: dict[tuple[str, str], list[Span]] = defaultdict(list)
    for span in spans:
        assert span.start_ns <= span.stop_ns, span
        by_track[span.process, span.track].append(span)
    for each in by_track.values():
        around: list[Span] = []
        for span in sorted(each, key=lambda span: (span.start_ns, -span.stop_ns)):
            while around and around[-1].stop_ns <= span.start_ns:
                around.pop()
            assert not around or span.stop_ns <= around[-1].stop_ns, (around[-1], span)
            around.append(span)


def assert_buckets_are_said(spans: Iterable[Span]) -> None:
    """Every phase of a bucket says which round and bucket, in the same words, and nothing else speaks of buckets."""
    for span in spans:
        if span.name in OF_BUCKETS:
            assert type(span.args["round"]) is type(span.args["bucket"]) is int, span
            assert set(span.args) <= {"round", "bucket", "worker", "kind"}, span
        else:
            assert "bucket" not in span.args, span


def counted(spans: Iterable[Span], name: str) -> Counter[tuple[str, int, int, int | None]]:
    """How often there is a phase, by (process, round, bucket, worker or None)."""
    return Counter(
        (span.process, span.args["round"], span.args["bucket"], span.args.get("worker"))
        for span in spans
        if span.name == name
    )


def assert_servers_took_part(
    spans: Sequence[Span], layout: Layout, rounds: int, workers: Sequence[str], servers: Sequence[str]
) -> None:
    """Every phase of an exchange with parameter servers is there, as often as it must be, and there is no other.

    Args:
        spans: of all processes.
        layout: of the job.
        rounds: from round 0.
        workers: names of their processes, by worker_index.
        servers: names of their processes, by shard.
    """
    places = [(round_, bucket) for round_ in range(rounds) for bucket in layout.buckets]
    at_workers = Counter((worker, round_, bucket.number, None) for round_, bucket in places for worker in workers)
    for name in ("encode", "push", "decode"):
        assert counted(spans, name) == at_workers, name
    of_workers = Counter(
        (servers[bucket.shard], round_, bucket.number, index)
        for round_, bucket in places
        for index in range(len(workers))
    )
    for name in ("add", "pull"):
        assert counted(spans, name) == of_workers, name
    at_servers = Counter((servers[bucket.shard], round_, bucket.number, None) for round_, bucket in places)
    assert counted(spans, "average") == at_servers
    assert_none_overlap(span for span in spans if span.name in ("add", "average"))  # one thread does them
    assert counted(spans, "held") <= of_workers
    assert phases_of(spans) - {"held"} == {"encode", "push", "add", "average", "pull", "decode"}
    assert_in_order(spans, WITH_SERVERS)


def assert_collectives_took_part(
    spans: Sequence[Span], layout: Layout, rounds: int, workers: Sequence[str], *, summed: bool
) -> None:
    """The same of collectives; `summed`: gradient buckets travel in float32, by all-reduce."""
    reduced = {b.number for b in layout.buckets if summed and b.kind is BucketKind.GRADIENT}
    gathered = {bucket.number for bucket in layout.buckets} - reduced

    def once(numbers: Iterable[int]) -> Counter[tuple[str, int, int, int | None]]:
        return Counter((w, round_, number, None) for w in workers for round_ in range(rounds) for number in numbers)

    for name in ("fetch", "all-reduce"):
        assert counted(spans, name) == once(reduced), name
    for name in ("encode", "all-gather", "decode"):
        assert counted(spans, name) == once(gathered), name
    assert counted(spans, "average") == once(reduced | gathered)
    assert not phases_of(spans) & {"push", "held", "add", "pull"}
    assert_in_order(spans, WITHOUT_SERVERS)


def assert_none_overlap(spans: Iterable[Span]) -> None:
    """Of each process the spans follow each other, none within another one."""
    by_process: dict[str, list[Span]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: (span.start_ns, span.stop_ns)):
        by_process[span.process].append(span)
    for each in by_process.values():
        for before, after in itertools.pairwise(each):
            assert before.stop_ns <= after.start_ns, (before, after)


def phases_of(spans: Iterable[Span]) -> set[str]:
    """Names of the phases of buckets that there are."""
    return {span.name for span in spans} & OF_BUCKETS


WITH_SERVERS = (
    ("encode", "stop_ns", "average", "start_ns"),
    ("push", "start_ns", "average", "start_ns"),
    ("held", "stop_ns", "average", "start_ns"),
    ("add", "stop_ns", "average", "start_ns"),
    ("average", "stop_ns", "pull", "start_ns"),
    ("average", "stop_ns", "decode", "start_ns"),
)
"""(a, edge, b, edge): of one bucket, the edge of every a comes before that of any b, whosever they are."""
WITHOUT_SERVERS = (
    ("fetch", "stop_ns", "all-reduce", "stop_ns"),
    ("all-reduce", "start_ns", "all-reduce", "stop_ns"),
    ("all-reduce", "start_ns", "average", "start_ns"),
    ("encode", "stop_ns", "all-gather", "stop_ns"),
    ("all-gather", "start_ns", "all-gather", "stop_ns"),
    ("all-gather", "start_ns", "decode", "start_ns"),
)


def assert_in_order(spans: Iterable[Span], orders: Sequence[tuple[str, str, str, str]]) -> None:
    """What has to come before what, in processes with one clock: no collective ends before all have begun it."""
    by_phase: dict[tuple[str, int, int], list[Span]] = defaultdict(list)
    for span in spans:
        if span.name in OF_BUCKETS:
            by_phase[span.name, span.args["round"], span.args["bucket"]].append(span)
    for (name, *place), first in by_phase.items():
        for earlier, first_edge, later, later_edge in orders:
            second = by_phase.get((later, *place), []) if earlier == name else []
            for a, b in itertools.product(first, second):
                assert getattr(a, first_edge) <= getattr(b, later_edge), (a, b)
