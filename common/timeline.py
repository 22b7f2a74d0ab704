"""A timeline of what one process did when, in the Chrome trace format (chrome://tracing, https://ui.perfetto.dev).

Times are of the monotonic clock, which all processes of one machine share, so their timelines can be laid side by side.
What is recorded, and what each name means, stands in docs/tracing.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NOTHING = nullcontext()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    name: str
    start_ns: int
    stop_ns: int
    track: str
    is_thread: bool
    """The track is a thread's: its spans nest or follow each other, for a thread does one thing at a time."""
    details: dict[str, Any]


class Timeline:
    """Collects spans; safe to use from several threads.

    Off, what is called for every bucket (`now_ns`, `phase`, `add_phase`) costs a call and allocates nothing; so these
    have no `**details`, for which each call would make a dictionary.
    """

    def __init__(self, process: str, *, on: bool) -> None:
        """`process`: its name on the timeline, which may be changed as long as nothing is written."""
        self.on = on
        self.process = process
        self._spans: list[_Span] = []

    def now_ns(self) -> int:
        """The time, for `add` and `add_phase`; 0 if the timeline is off."""
        return time.monotonic_ns() if self.on else 0

    def phase(self, name: str, round_: int, bucket: int, kind: str | None = None) -> AbstractContextManager[None]:
        """Times a phase of a bucket, on this thread's track: `with timeline.phase("encode", 0, 3, "gradient"): ...`."""
        return self._timed(name, round_, bucket, kind) if self.on else _NOTHING

    def add_phase(
        self,
        name: str,
        start_ns: int,
        round_: int,
        bucket: int,
        *,
        track: str | None = None,
        worker: int | None = None,
        kind: str | None = None,
    ) -> None:
        """A phase of a bucket from `start_ns` until now, on this thread's track or on another one.

        Args:
            name: one of those in docs/tracing.md.
            start_ns: from `now_ns`.
            round_: of the bucket.
            bucket: its number.
            track: not a thread's; its spans may overlap.
            worker: whose contribution or average it is, at a server.
            kind: of the vector that the bucket is cut from, where it is known.
        """
        if self.on:
            optional = {"worker": worker, "kind": kind}
            given = {key: value for key, value in optional.items() if value is not None}
            self.add(name, start_ns, track, round=round_, bucket=bucket, **given)

    def add(self, name: str, start_ns: int, track: str | None = None, **details: Any) -> None:
        """A span of anything else from `start_ns` until now, on the track of this thread or on another one."""
        if self.on:
            self._spans.append(
                _Span(
                    name=name,
                    start_ns=start_ns,
                    stop_ns=self.now_ns(),
                    track=track or threading.current_thread().name,
                    is_thread=track is None,
                    details=details,
                )
            )

    def write(self, path: Path, *, failing: bool = False) -> None:
        """Writes everything as one JSON file, which is whole whenever it is there.

        Args:
            path: of the file.
            failing: the process has failed already, and that the file cannot be written does not hide why.
        """
        unfinished = path.with_name(f"{path.name}.part")
        with contextlib.suppress(OSError) if failing else contextlib.nullcontext():
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps({"traceEvents": list(self._events())}))
            unfinished.replace(path)

    @contextmanager
    def _timed(self, name: str, round_: int, bucket: int, kind: str | None) -> Iterator[None]:
        start_ns = self.now_ns()
        try:
            yield
        finally:
            self.add_phase(name, start_ns, round_, bucket, kind=kind)

    def _events(self) -> Iterator[dict[str, Any]]:
        """Names of the process and its tracks, and the spans, as the format wants them."""
        process, numbers = os.getpid(), dict[str, int]()
        yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": self.process}}
        for track, span in _laid_out(list(self._spans)):
            if track not in numbers:
                numbers[track] = len(numbers)
                named = {"pid": process, "tid": numbers[track], "args": {"name": track}}
                yield {"name": "thread_name", "ph": "M", **named}
            yield {
                "name": span.name,
                "ph": "X",
                "ts": span.start_ns / 1000,
                "dur": (span.stop_ns - span.start_ns) / 1000,
                "pid": process,
                "tid": numbers[track],
                "args": span.details,
            }


OFF = Timeline("", on=False)


def _laid_out(spans: Iterable[_Span]) -> Iterator[tuple[str, _Span]]:
    """Spans by start, with their tracks; `push`, `push (2)`, ... where a track's spans overlap: the format has no such.

    A span that begins when another one ends does not overlap it.
    """
    free_ns: dict[str, list[int]] = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, -span.stop_ns)):
        if span.is_thread:
            yield span.track, span
            continue
        stops_ns = free_ns.setdefault(span.track, [])
        lane = next((lane for lane, stop_ns in enumerate(stops_ns) if stop_ns <= span.start_ns), len(stops_ns))
        stops_ns[lane : lane + 1] = [span.stop_ns]
        yield (span.track if lane == 0 else f"{span.track} ({lane + 1})"), span


def merge(paths: Iterable[Path], out: Path) -> None:
    """Lays the timelines of several processes side by side in one file."""
    events = [event for path in sorted(paths) for event in json.loads(path.read_text())["traceEvents"]]
    out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
