"""The timelines of workers and servers: every phase of every bucket, by round and bucket."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from common.timeline import Timeline
from tests.exchange.raw import RawMember
from tests.phases import assert_servers_took_part, counted, spans_of
from tests.support import DEADLINE_S, DIGEST, Member, in_threads, job, join, running_server

WORKERS, SERVERS, ROUNDS = ("worker-0", "worker-1"), ("server-0", "server-1"), 2
SMALL = ("workers=2", "exchange.bucket_bytes=1024")


@pytest.mark.parametrize(
    "codec",
    [
        ("codec.name=none",),
        ("codec.bits=8", "codec.two_sided=true"),
        ("codec.name=paper", "codec.two_sided=true"),
        ("codec.name=shared", "codec.bits=4"),
        ("codec.name=sign",),
    ],
    ids=["none", "8 bits both ways", "averages published together", "scales first", "error feedback"],
)
def test_every_phase_of_every_bucket_is_there_once_for_each_who_takes_part(
    codec: tuple[str, ...], tmp_path: Path
) -> None:
    spec = job(*SMALL, "servers=2", *codec)
    files = [tmp_path / f"{name}.json" for name in SERVERS]
    timelines = {name: Timeline(name, on=True) for name in WORKERS}
    with ExitStack() as stack:
        second = stack.enter_context(running_server(spec, shard=1, trace=files[1]))
        addresses = ["coordinator", second.address]
        first = stack.enter_context(running_server(spec, shard_addresses=addresses, trace=files[0]))
        with ThreadPoolExecutor(2) as pool:
            joining = [pool.submit(join, first.address, name, timeline=timelines[name]) for name in WORKERS]
            joined = [future.result(DEADLINE_S) for future in joining]
        for member in joined:
            stack.callback(member.vanish)
        for round_ in range(ROUNDS):
            in_threads([lambda each=member, now=round_: average(each, now) for member in joined])
        in_threads([member.leave for member in joined])
        layout = joined[0].layout
    for name, timeline in timelines.items():
        files.append(tmp_path / f"{name}.json")
        timeline.write(files[-1])
    spans = [span for file in files for span in spans_of(file)]
    assert len(layout.buckets) > 4
    assert_servers_took_part(spans, layout, ROUNDS, WORKERS, SERVERS)
    kinds = {(span.args["bucket"], span.args["kind"]) for span in spans if span.name in ("encode", "decode")}
    assert kinds == {(bucket.number, bucket.kind.value) for bucket in layout.buckets}


def average(member: Member, round_: int) -> None:
    gradient, state = np.ones(member.layout.d, np.float32), np.ones(member.layout.e, np.float32)
    member.exchange.average(round_, gradient, state, DIGEST)


def test_what_comes_before_its_turn_is_held_until_then(tmp_path: Path) -> None:
    """Worker 1 has pushed everything, and the server has read it, before worker 0 pushes anything."""
    spec, file = job(*SMALL, "codec.bits=8"), tmp_path / "server-0.json"
    with running_server(spec, trace=file) as server, RawMember(spec, server) as two:
        stream, incarnation = two.open()
        numbers = range(len(two.layout.buckets))
        for number in numbers:
            stream.put(two.contribution(incarnation, number))
        stream.put(two.contribution(incarnation, 0, incarnation=0))
        stream.next_of("refusal")  # so all before it have been read
        average(two.honest, 0)
        stream.end()
    spans = spans_of(file)
    held = [span for span in spans if span.name == "held"]
    assert counted(held, "held") == Counter(("server-0", 0, number, 1) for number in numbers)
    added = {span.args["bucket"]: span for span in spans if span.name == "add" and span.args["worker"] == 1}
    assert all(span.stop_ns <= added[span.args["bucket"]].start_ns for span in held)
    first = "held of worker 1"
    assert {span.track for span in held} == {first, *(f"{first} ({number + 1})" for number in numbers[1:])}


def test_an_average_that_is_sent_again_is_pulled_again(tmp_path: Path) -> None:
    spec, file = job(*SMALL, "codec.bits=8"), tmp_path / "server-0.json"
    with running_server(spec, trace=file) as server, RawMember(spec, server) as two:
        stream, incarnation = two.open()
        two.finish_round(stream, incarnation)
        for _ in two.layout.buckets:
            stream.next_of("average")
        stream.put(two.contribution(incarnation, 2))
        assert stream.next_of("average").bucket == 2
        stream.put(two.contribution(incarnation, 0, incarnation=0))
        stream.next_of("refusal")  # so the average before it has been written
        stream.end()
    pulls = counted(spans_of(file), "pull")
    assert pulls["server-0", 0, 2, 1] == 2
    assert pulls["server-0", 0, 1, 1] == pulls["server-0", 0, 2, 0] == 1
