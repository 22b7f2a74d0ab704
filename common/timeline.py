"""A timeline of what one process did when, in the Chrome trace format (chrome://tracing, https://ui.perfetto.dev).

Times are of the monotonic clock, which all processes of one machine share, so their timelines can be laid side by side.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

_NOTHING = nullcontext()


class Timeline:
    """Collects spans; safe to use from several threads. Off, it costs next to nothing."""

    def __init__(self, process: str, *, on: bool) -> None:
        """`process`: its name on the timeline, which may be changed as long as nothing is written."""
        self.on = on
        self.process = process
        self._events: list[dict[str, Any]] = []

    @staticmethod
    def now_ns() -> int:
        """The time, for `add`."""
        return time.monotonic_ns()

    def span(self, name: str, **details: Any) -> AbstractContextManager[None]:
        """Times what happens within: `with timeline.span("encode", bucket=3): ...`."""
        return self._timed(name, details) if self.on else _NOTHING

    def add(self, name: str, start_ns: int, track: str | None = None, **details: Any) -> None:
        """A span from `start_ns` until now, on the track of this thread or on another one."""
        if self.on:
            stop_ns = self.now_ns()
            self._events.append(
                {
                    "name": name,
                    "ph": "X",
                    "ts": start_ns / 1000,
                    "dur": (stop_ns - start_ns) / 1000,
                    "tid": track or threading.current_thread().name,
                    "args": details,
                }
            )

    def write(self, path: Path) -> None:
        """Writes everything as one JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": list(self._named())}))

    @contextmanager
    def _timed(self, name: str, details: dict[str, Any]) -> Iterator[None]:
        start_ns = self.now_ns()
        try:
            yield
        finally:
            self.add(name, start_ns, **details)

    def _named(self) -> Iterator[dict[str, Any]]:
        """The events with numbers for process and tracks, as the format wants them, and their names."""
        process, events = os.getpid(), list(self._events)
        tracks = {track: number for number, track in enumerate(dict.fromkeys(event["tid"] for event in events))}
        yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": self.process}}
        for track, number in tracks.items():
            yield {"name": "thread_name", "ph": "M", "pid": process, "tid": number, "args": {"name": track}}
        for event in events:
            yield {**event, "pid": process, "tid": tracks[event["tid"]]}


OFF = Timeline("", on=False)


def merge(paths: Iterable[Path], out: Path) -> None:
    """Lays the timelines of several processes side by side in one file."""
    events = [event for path in sorted(paths) for event in json.loads(path.read_text())["traceEvents"]]
    out.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
