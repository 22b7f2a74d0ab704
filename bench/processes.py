"""The laboratory's processes: started on their nodes, listened to, ended in any case, and what they use."""

from __future__ import annotations

import os
import queue
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from bench.signals import signals_held
from common.errors import EXIT_MISMATCH, EXIT_RETRY, EXIT_USAGE, DatpsError, MismatchError, PeerLostError, SpecError
from deploy.cluster import child_environment
from deploy.process import Child, last_stderr_lines

REPORT_S = 5.0
_END_S = 5.0
_LOOK_S = 0.2
_LAST_WORDS_S = 1.0
"""What other processes get to say why, once one has failed."""
_RAISED: dict[int, type[DatpsError]] = {EXIT_USAGE: SpecError, EXIT_MISMATCH: MismatchError}
Say = Callable[[str], None]


class Host(Protocol):
    """Where a process can run."""

    @property
    def address(self) -> str:
        """IP address that the other hosts reach it by."""

    @property
    def device(self) -> str:
        """Name of its network device."""

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` there."""


@dataclass(frozen=True, kw_only=True)
class Loopback:
    """This machine."""

    address: str = "127.0.0.1"
    device: str = "lo0" if sys.platform == "darwin" else "lo"

    def command(self, command: Sequence[str]) -> list[str]:
        """See `Host`."""
        return list(command)


class Crew:
    """The processes of one measurement; on leaving, all are gone."""

    def __init__(self, logs: Path, say: Say) -> None:
        """`logs`: an existing folder; `say` is told what is waited for."""
        self._logs = logs
        self._say = say
        self._inbox: queue.SimpleQueue[tuple[str, dict[str, Any] | int]] = queue.SimpleQueue()
        self._children: dict[str, Child] = {}
        self._said: list[tuple[str, dict[str, Any]]] = []
        self._ended: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with signals_held():
            for child in self._children.values():
                child.kill()
            for child in self._children.values():
                child.join(_END_S)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
        """Starts a process with one thread for arithmetic; returns its number."""
        child = Child(
            name,
            command,
            environment={**child_environment(1), **(environment or {})},
            logs=self._logs,
            said=lambda name, event: self._inbox.put((name, event)),
            ended=lambda name, exit_code: self._inbox.put((name, exit_code)),
        )
        self._children[name] = child
        return child.pid

    def collect(self, kind: str, names: Sequence[str], deadline_s: float, what: str) -> dict[str, dict[str, Any]]:
        """Waits until each of these processes has said one more event of a kind; returns them by name.

        Args:
            kind: of the event.
            names: of the processes.
            deadline_s: for all of them together.
            what: the event, for people.

        Raises:
            PeerLostError: a process failed or ended, or the deadline has passed.
            DatpsError: a process refused what it was told, and says why.
        """
        found: dict[str, dict[str, Any]] = {}

        def missing() -> list[str]:
            for name in names:
                at = next((i for i, (who, e) in enumerate(self._said) if who == name and e["event"] == kind), None)
                if name not in found and at is not None:
                    found[name] = self._said.pop(at)[1]
            return [name for name in names if name not in found]

        self._wait(missing, what, deadline_s)
        return found

    def join(self, deadline_s: float) -> None:
        """Waits until all processes have ended well.

        Raises:
            DatpsError: one has not.
        """
        self._wait(
            lambda: [name for name in self._children if name not in self._ended], "the end", deadline_s, end=True
        )

    def _wait(self, missing: Callable[[], list[str]], what: str, deadline_s: float, *, end: bool = False) -> None:
        started_s = reported_s = time.monotonic()
        while names := missing():
            failed = any(code != 0 for code in self._ended.values())
            if failed or (not end and any(name in self._ended for name in names)):
                self._raise_failure()
            now_s = time.monotonic()
            awaited = f"{what} of {', '.join(names)}"
            if now_s - started_s > deadline_s:
                raise PeerLostError(f"expected {awaited} within {deadline_s:g} s, got nothing")
            if now_s - reported_s >= REPORT_S:
                reported_s = now_s
                self._say(f"waiting for {awaited} ({now_s - started_s:.0f} s)")
            self._take(_LOOK_S)

    def _take(self, wait_s: float) -> None:
        with suppress(queue.Empty):
            name, what = self._inbox.get(timeout=wait_s)
            if isinstance(what, int):
                self._ended[name] = what
            else:
                self._said.append((name, what))

    def _raise_failure(self) -> None:
        """Raises the likeliest cause: a process that died without a word, then one whose reason is not a lost peer."""
        until_s = time.monotonic() + _LAST_WORDS_S
        while (left_s := until_s - time.monotonic()) > 0:
            self._take(left_s)
        errors = [(who, event) for who, event in self._said if event["event"] == "error"]
        explained = {who for who, _ in errors}
        for name, exit_code in self._ended.items():
            if exit_code != 0 and name not in explained:
                words = "\n".join(last_stderr_lines(self._logs, name))
                raise PeerLostError(f"{name} ended with exit code {exit_code}" + (f":\n{words}" if words else ""))
        errors.sort(key=lambda error: error[1].get("exit_code") == EXIT_RETRY)
        for name, event in errors:
            raised = _RAISED.get(event.get("exit_code", EXIT_RETRY), PeerLostError)
            raise raised(f"{name}: {event.get('text')}")
        raise PeerLostError(f"{', '.join(self._ended)} ended too early")


@dataclass(frozen=True, kw_only=True)
class ProcessCount:
    """What the kernel knows of a process; zeros where there is no /proc.

    Attributes:
        rss_bytes, peak_rss_bytes: memory now, and the most since `forget_peak`.
        cpu_s: user and system time so far, in steps of 10 ms.
    """

    rss_bytes: int
    peak_rss_bytes: int
    cpu_s: float


def count_process(pid: int) -> ProcessCount:
    """Reads /proc."""
    folder = Path(f"/proc/{pid}")
    try:
        status = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        return ProcessCount(
            rss_bytes=1024 * int(status["VmRSS"].split()[0]),
            peak_rss_bytes=1024 * int(status["VmHWM"].split()[0]),
            cpu_s=sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK"),
        )
    except (OSError, KeyError, ValueError, IndexError):
        return ProcessCount(rss_bytes=0, peak_rss_bytes=0, cpu_s=0.0)


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and that still run, oldest first; none where there is no /proc."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                children.append((int(fields[19]), int(folder.name)))
    return [child for _, child in sorted(children)]


def forget_peak(pid: int) -> None:
    """Lets the kernel measure the peak from now on, where it can."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")
