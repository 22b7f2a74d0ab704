"""The other local processes of a worker, as its own process, local process 0, sees them.

They are started by it and end with it: each is spoken to on its standard input, one JSON object a line, and ends when
that does. First they get their orders (`Order`), then, once the view has formed, the admission. They answer on their
standard output with events: `built`, `ended`, or `error`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from common.errors import EXIT_RETRY, DatpsError, MismatchError, PeerLostError, refusal
from worker.exchange.coordination import Admission
from worker.local.devices import describe
from worker.local.group import GroupBrokenError, Store
from worker.local.team import LocalTeam
from worker.workplace import Workplace

COMMAND = (sys.executable, "-m", "worker.local.member")
_KILL_S = 5.0
_EXPLANATION_S = 2.0
"""How long after an error another process may still say that it is the cause."""


class About(StrEnum):
    """Whose failure an error of a local process is."""

    OWN = "own"
    PEERS = "peers"
    """A server's or another worker's."""
    GROUP = "group"
    """Another local process's."""


class LocalProcessError(DatpsError):
    """A local process of this worker has failed; the text says which, and how."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a local process is told first.

    Attributes:
        job_spec: JSON.
        devices: of all local processes.
        threads: of each, on the CPU.
        data: data folder, if the data set needs one.
        unlabeled: file of pseudo-labeled images, if the job has any.
        init: file or folder of initial parameters, if the job starts from any.
        checkpoint: folder to load the state from.
        saves: whether process 0 saves checkpoints.
        connect_s: how long to wait for a server to answer.
        trace: file that process 0 writes its timeline to, if it does; the others' lie beside it (`trace_beside`).
        local_rank: filled in for each.
        store_port: of the store where they meet; filled in.
    """

    job_spec: str
    devices: tuple[str, ...]
    threads: int | None
    data: str | None
    checkpoint: str | None
    saves: bool
    connect_s: float
    trace: str | None = None
    unlabeled: str | None = None
    init: str | None = None
    local_rank: int = 0
    store_port: int = 0


def trace_beside(trace: str, local_rank: int) -> Path:
    """`worker-0.local-1.json` beside `worker-0.json`."""
    return Path(trace).with_suffix(f".local-{local_rank}.json")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How a process has failed."""

    text: str
    exit_code: int
    about: About


class _Process:
    """One of them; everything that is told of it is told under `changed`."""

    def __init__(self, name: str, command: Sequence[str], changed: threading.Condition) -> None:
        self.name = name
        self.built: dict[str, Any] | None = None
        self.ended = False
        self.failure: Failure | None = None
        self.told = False
        """Whether `watch` has told of its failure."""
        self._changed = changed
        self._popen = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, name=name, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    def say(self, words: dict[str, Any]) -> None:
        """One line; if it is gone, its reader tells."""
        assert self._popen.stdin
        with contextlib.suppress(OSError):
            self._popen.stdin.write(json.dumps(words) + "\n")

    def close(self) -> None:
        """Ends it, whatever it is doing."""
        assert self._popen.stdin
        with contextlib.suppress(OSError):
            self._popen.stdin.close()
        self._popen.terminate()  # it ends by itself, unless it has only begun to import
        try:
            self._popen.wait(_KILL_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._reader.join(_KILL_S)

    def _read(self) -> None:
        assert self._popen.stdout
        for line in self._popen.stdout:
            try:
                event = json.loads(line)
                self._hear(event)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a library has printed something
        self._popen.stdout.close()
        code = self._popen.wait()
        with self._changed:
            if not self.ended and self.failure is None:
                how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                text = f"it ended without a word, {how}"
                self.failure = Failure(text=text, exit_code=EXIT_RETRY, about=About.OWN)
            self._changed.notify_all()

    def _hear(self, event: dict[str, Any]) -> None:
        with self._changed:
            match event["event"]:
                case "built":
                    self.built = event
                case "ended":
                    self.ended = True
                case "error":
                    self.failure = Failure(
                        text=str(event["text"]), exit_code=int(event["exit_code"]), about=About(event["about"])
                    )
            self._changed.notify_all()


def built(workplace: Workplace) -> dict[str, str]:
    """What all local processes must have built alike."""
    return {
        "layout": workplace.layout.digest().hex(),
        "parameters": workplace.replica.parameter_digest().hex(),
        "round": str(workplace.round),
    }


class LocalProcesses:
    """All of them; none if the worker has one device."""

    def __init__(self, devices: tuple[str, ...], command: Sequence[str] = COMMAND) -> None:
        """Starts them.

        Args:
            devices: of all local processes; the first is this process's.
            command: what runs one: program and arguments.
        """
        self._changed = threading.Condition()
        self._closing = False
        self._watcher: threading.Thread | None = None
        self._store = Store() if len(devices) > 1 else None
        self._team: LocalTeam | None = None
        self._processes = [_Process(describe(devices, rank), command, self._changed) for rank in range(1, len(devices))]

    @property
    def pids(self) -> tuple[int, ...]:
        """The operating system's numbers of them."""
        return tuple(process.pid for process in self._processes)

    def order(self, order: Order) -> None:
        """Tells each what to build."""
        for rank, process in enumerate(self._processes, start=1):
            assert self._store
            filled = dataclasses.replace(order, local_rank=rank, store_port=self._store.port)
            process.say(dataclasses.asdict(filled))

    def join(self, workplace: Workplace) -> None:
        """Waits until all have built the same as this process, then connects them; nothing if this one is alone.

        Raises:
            LocalProcessError: one has failed, is late, or has built something else.
            GroupBrokenError: one does not connect.
        """
        if workplace.team is None:
            return
        assert self._store
        deadline_s = workplace.spec.deadlines.join_s
        self._wait_for(lambda process: process.built is not None, deadline_s, "has not built its model")
        expected = built(workplace)
        for process in self._processes:
            got = {name: (process.built or {}).get(name) for name in expected}
            if got != expected:
                text = refusal(f"{expected} as in local process 0", "built", got, process.name)
                raise LocalProcessError(text, MismatchError.exit_code)
        self._team = workplace.team
        try:
            self._team.meet(self._store.store, workplace.device)
        except GroupBrokenError as error:
            raise self.cause(error) from None

    def admit(self, admission: Admission) -> None:
        """Tells them their place: they open their streams and begin."""
        for process in self._processes:
            process.say({"admission": dataclasses.asdict(admission)})

    def watch(self, failed: Callable[[str, bool], None]) -> None:
        """From now on calls `failed(text, retry)` when one of them fails, and ends this process's waiting for them.

        Also when one tells of nothing but having lost another: it waits for its end then, and we would wait for it. Who
        was the cause, `cause` finds out.
        """

        def look() -> None:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self._news())
                    news = self._news()
                    if self._closing:
                        return
                    for process in news:
                        process.told = True
                for process in news:
                    assert process.failure is not None
                    failed(f"{process.name}: {process.failure.text}", process.failure.exit_code == EXIT_RETRY)
                    if self._team:
                        self._team.abort()

        if self._processes:
            self._watcher = threading.Thread(target=look, name="local-processes", daemon=True)
            self._watcher.start()

    def finish(self, deadline_s: float) -> None:
        """Waits until all have ended in good order.

        Raises:
            LocalProcessError: one has not.
        """
        self._wait_for(lambda process: process.ended, deadline_s, "has not ended")

    def cause(self, error: DatpsError) -> DatpsError:
        """The error that is behind an error of this process: a local process's own, or what servers told it.

        Where none says more than that it has lost the others, that is it, if `watch` is how this process heard of it.
        """
        if not self._processes or not isinstance(error, (PeerLostError, MismatchError, GroupBrokenError)):
            return error
        with self._changed:
            self._changed.wait_for(
                lambda: self._failures(About.OWN) or all(p.failure or p.ended for p in self._processes),
                timeout=_EXPLANATION_S,
            )
            own, peers, group = (self._failures(about) for about in (About.OWN, About.PEERS, About.GROUP))
        heard_of = own or (group if isinstance(error, PeerLostError) and not peers else [])
        if heard_of:
            failure = heard_of[0].failure
            assert failure is not None
            return LocalProcessError(f"{heard_of[0].name}: {failure.text}", failure.exit_code)
        if peers and isinstance(error, GroupBrokenError):
            failure = peers[0].failure
            assert failure is not None
            return (PeerLostError if failure.exit_code == EXIT_RETRY else MismatchError)(failure.text)
        return error

    def close(self) -> None:
        """Ends all of them."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for process in self._processes:
            process.close()
        if self._watcher:
            self._watcher.join(_KILL_S)

    def _news(self) -> list[_Process]:
        return [process for process in self._processes if process.failure and not process.told]

    def _failures(self, about: About) -> list[_Process]:
        return [process for process in self._processes if process.failure and process.failure.about is about]

    def _wait_for(self, done: Callable[[_Process], bool], deadline_s: float, what_not: str) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._failures(About.OWN) or all(done(p) or p.failure for p in self._processes),
                timeout=deadline_s,
            )
            own = self._failures(About.OWN) or [process for process in self._processes if process.failure]
            late = [process for process in self._processes if not done(process)]
        if own:
            failure = own[0].failure
            assert failure is not None
            raise LocalProcessError(f"{own[0].name}: {failure.text}", failure.exit_code)
        if late:
            raise LocalProcessError(f"{late[0].name} {what_not} within {deadline_s:g} s", EXIT_RETRY)
