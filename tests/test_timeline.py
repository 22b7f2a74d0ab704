"""The timeline of one process: what its spans say, how overlapping ones are laid out, and that off it does nothing."""

from __future__ import annotations

import inspect
import json
import threading
from pathlib import Path

import pytest

from common.timeline import OFF, Timeline, merge
from tests.phases import Span, spans_of

HOT = (Timeline.phase, Timeline.add_phase, Timeline.now_ns)


class Clock:
    """Stands for the monotonic clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 0
        monkeypatch.setattr("common.timeline.time.monotonic_ns", lambda: self.now_ns)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def written(timeline: Timeline, folder: Path) -> list[Span]:
    timeline.write(folder / "trace.json")
    return spans_of(folder / "trace.json")


def test_a_phase_says_its_round_and_bucket_and_what_else_is_known(clock: Clock, tmp_path: Path) -> None:
    timeline = Timeline("worker-0", on=True)
    clock.now_ns = 1_000_500
    with timeline.phase("encode", 7, 3, "gradient"):
        clock.now_ns = 1_002_000
    timeline.add_phase("add", 1_001_000, 7, 3, worker=0)
    first, second = written(timeline, tmp_path)
    main = threading.current_thread().name
    assert first == Span(
        process="worker-0",
        track=main,
        name="encode",
        start_ns=1_000_500,
        stop_ns=1_002_000,
        args={"round": 7, "bucket": 3, "kind": "gradient"},
    )
    assert second.args == {"round": 7, "bucket": 3, "worker": 0}
    assert (second.start_ns, second.stop_ns, second.track) == (1_001_000, 1_002_000, main)


def test_a_phase_that_fails_is_on_the_timeline_too(clock: Clock, tmp_path: Path) -> None:
    timeline = Timeline("worker-0", on=True)

    def fail() -> None:
        clock.now_ns = 5000
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), timeline.phase("decode", 0, 1):
        fail()
    (span,) = written(timeline, tmp_path)
    assert (span.name, span.stop_ns, span.args) == ("decode", 5000, {"round": 0, "bucket": 1})


def test_spans_that_overlap_get_tracks_beside_each_other_and_no_more_than_needed(clock: Clock, tmp_path: Path) -> None:
    timeline = Timeline("server-0", on=True)
    for bucket, (start_ns, stop_ns) in enumerate([(0, 20), (10, 30), (20, 40), (25, 28), (30, 50)]):
        clock.now_ns = stop_ns
        timeline.add_phase("held", start_ns, 0, bucket, track="held of worker 1", worker=1)
    tracks = {span.args["bucket"]: span.track for span in written(timeline, tmp_path)}
    one, two, three = "held of worker 1", "held of worker 1 (2)", "held of worker 1 (3)"
    assert tracks == {0: one, 1: two, 2: one, 3: three, 4: two}


def test_each_thread_has_a_track_and_its_spans_nest_there(clock: Clock, tmp_path: Path) -> None:
    timeline = Timeline("worker-0", on=True)

    def work() -> None:
        with timeline.phase("decode", 0, 0):
            clock.now_ns += 1000
            with timeline.phase("average", 0, 0):
                clock.now_ns += 1000
            clock.now_ns += 1000

    thread = threading.Thread(target=work, name="average")
    thread.start()
    thread.join()
    spans = written(timeline, tmp_path)
    assert [(span.name, span.track, span.start_ns, span.stop_ns) for span in spans] == [
        ("decode", "average", 0, 3000),
        ("average", "average", 1000, 2000),
    ]


def test_timelines_of_several_processes_are_merged_by_name_of_file(tmp_path: Path) -> None:
    for name in ("b", "a"):
        Timeline(name, on=True).write(tmp_path / "traces" / f"{name}.json")
    merge((tmp_path / "traces").glob("*.json"), tmp_path / "trace.json")
    merged = json.loads((tmp_path / "trace.json").read_text())
    assert [event["args"]["name"] for event in merged["traceEvents"]] == ["a", "b"]


def test_off_nothing_is_timed_kept_or_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One and the same context for all phases, and no function that a bucket calls takes `**details`."""

    def no_clock() -> int:
        raise AssertionError("nobody asks for the time")

    monkeypatch.setattr("common.timeline.time.monotonic_ns", no_clock)
    first, *others = [OFF.phase("encode", round_, 2**40 + round_, "gradient") for round_ in range(3)]
    assert all(other is first for other in others)
    assert OFF.now_ns() == 0
    OFF.add_phase("push", 0, 0, 0, track="push to shard 0", worker=0)
    OFF.add("round", 0, "rounds", round=0)
    with OFF.phase("encode", 0, 0):
        pass
    assert written(OFF, tmp_path) == []
    for function in HOT:
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, function
