"""How a local cluster is started, watched and ended, as a pure state machine: no processes, no clock.

Rules:

 1. Servers of shards 1 to S-1 start first; shard 0 starts when they listen, for it hands out their addresses; the
    workers start when shard 0 listens.
 2. A process that has said nothing `startup_s` after its start has failed.
 3. A process that ends otherwise than complete, unasked, fails the cluster. The others have `aftermath_s` to end by
    themselves, each with its own account of what happened (servers alone `last_words_s`); then they are terminated.
 4. The first signal terminates the workers: they agree on a last round, save and leave. They have `stop_s` for it, the
    servers go when the workers are gone. A second signal kills everything at once. If one process was stopped by
    somebody else, the workers agree on it likewise; who has not ended `aftermath_s` later is terminated, too.
 5. When all workers are complete, servers have `farewell_s` to end by themselves; then they are terminated.
 6. What was terminated and is still there `kill_s` later (a worker that saves: `stop_s`) is killed.
 7. The cause of a failure is the process whose exit code says most: a lost peer (75) is a consequence, and so may be a
    mismatch (76); among equals the first.

`handle(message, now_s) -> effects`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from common.errors import EXIT_COMPLETE, EXIT_INTERRUPTED, EXIT_MISMATCH, EXIT_RETRY, EXIT_TERMINATED

_KILLED_BY_SIGTERM = -15
STOPPED = (EXIT_TERMINATED, EXIT_INTERRUPTED, _KILLED_BY_SIGTERM)
"""Exit codes of a process that did as it was asked, the last one before it could handle signals."""


class Role(StrEnum):
    SERVER = "server"
    WORKER = "worker"


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Deadlines in seconds, see the rules."""

    startup_s: float = 120.0
    aftermath_s: float = 5.0
    last_words_s: float = 1.0
    stop_s: float = 120.0
    farewell_s: float = 15.0
    kill_s: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Said:
    """A process has said something; `address` if it listens, `error` if it has failed and knows why."""

    process: str
    address: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process is gone; the exit code is negative if a signal, `killed_by`, ended it."""

    process: str
    exit_code: int
    killed_by: str | None = None


@dataclass(frozen=True, kw_only=True)
class Signalled:
    """The launcher has received a signal: Ctrl-C, or one that means SIGTERM."""

    interrupt: bool


@dataclass(frozen=True, kw_only=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Start a process; `addresses` are those of shards 1 to S-1 for shard 0, shard 0's for a worker."""

    process: str
    role: Role
    index: int
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Terminate:
    """Ask a process to end: SIGTERM."""

    process: str


@dataclass(frozen=True, kw_only=True)
class Kill:
    """End a process: SIGKILL."""

    process: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the cluster ended; `process` and `reason` tell who failed and why, as far as they are known."""

    exit_code: int
    text: str
    process: str | None = None
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Done:
    """All processes are gone."""

    outcome: Outcome


Message = Said | Ended | Signalled | Tick
Effect = Start | Terminate | Kill | Done


@dataclass(kw_only=True)
class _Process:
    name: str
    role: Role
    started_s: float
    heard: bool = False
    address: str | None = None
    error: str | None = None
    exit_code: int | None = None
    killed_by: str | None = None
    terminated_s: float | None = None
    killed: bool = False

    @property
    def live(self) -> bool:
        return self.exit_code is None


class Supervisor:
    """The launcher's decisions for one cluster of `servers` servers and `workers` workers."""

    def __init__(self, *, servers: int, workers: int, patience: Patience) -> None:
        self._servers, self._workers = servers, workers
        self._patience = patience
        self._processes: dict[str, _Process] = {}
        self._failures: list[_Process] = []
        self._failed_s: float | None = None
        self._complete_s: float | None = None
        self._stop_s: float | None = None
        self._signalled: Signalled | None = None
        self._at_once = False

    def begin(self, now_s: float) -> list[Effect]:
        """The first effects."""
        shards = range(1, self._servers) if self._servers > 1 else range(1)
        return [self._start(Role.SERVER, shard, now_s) for shard in shards]

    @property
    def awaited(self) -> list[str]:
        """Processes that were asked to end and have not."""
        return [process.name for process in self._live() if process.terminated_s is not None]

    def handle(self, message: Message, now_s: float) -> list[Effect]:
        """One message in, effects out."""
        effects: list[Effect] = []
        match message:
            case Said():
                effects += self._said(message, now_s)
            case Ended():
                self._ended(message, now_s)
            case Signalled():
                effects += self._stop(message, now_s)
            case Tick():
                effects += self._overdue(now_s)
        effects += self._proceed(now_s)
        return effects

    def _said(self, said: Said, now_s: float) -> Iterator[Effect]:
        process = self._processes[said.process]
        process.heard = True
        process.error = process.error or said.error
        if said.address is None or self._ending:
            return
        process.address = said.address
        shards = [self._processes.get(f"server-{shard}") for shard in range(self._servers)]
        addresses = [shard.address if shard else None for shard in shards]
        if addresses[0] is None and None not in addresses[1:] and shards[0] is None:
            yield self._start(Role.SERVER, 0, now_s, addresses[1:])
        elif None not in addresses and "worker-0" not in self._processes:
            for index in range(self._workers):
                yield self._start(Role.WORKER, index, now_s, addresses[:1])

    def _ended(self, ended: Ended, now_s: float) -> None:
        process = self._processes[ended.process]
        process.exit_code, process.killed_by = ended.exit_code, ended.killed_by
        if process.killed or ended.exit_code == EXIT_COMPLETE:
            return
        asked, stopped = process.terminated_s is not None, ended.exit_code in STOPPED
        if stopped and not asked and not self._ending:
            self._stop_s = now_s  # somebody else has asked one of them; the workers agree on it
        elif not (asked if self._stop_s is None else stopped):
            self._fail(process, now_s)

    def _stop(self, signalled: Signalled, now_s: float) -> Iterator[Effect]:
        if self._signalled is not None:
            self._at_once = True
            yield from self._kill(self._live())
            return
        self._signalled = signalled
        if self._stop_s is None and self._failed_s is None:
            self._stop_s = now_s
        yield from self._terminate(self._live(Role.WORKER) or self._live(), now_s)

    def _overdue(self, now_s: float) -> Iterator[Effect]:
        for process in self._live():
            if process.killed:
                continue
            if process.terminated_s is not None:
                saves = self._stop_s is not None and process.role is Role.WORKER
                grace_s = self._patience.stop_s if saves else self._patience.kill_s
                if now_s - process.terminated_s >= grace_s:
                    yield from self._kill([process])
            elif not process.heard and now_s - process.started_s >= self._patience.startup_s:
                process.error = f"expected a first word within {self._patience.startup_s:g} s of its start, got none"
                self._fail(process, now_s)
                yield from self._kill([process])

    def _proceed(self, now_s: float) -> Iterator[Effect]:
        """What follows from the state as it is now."""
        live, workers = self._live(), self._live(Role.WORKER)
        if not live and (self._ending or len(self._processes) == self._servers + self._workers):
            yield Done(outcome=self._outcome())
        elif self._failed_s is not None:
            patience_s = self._patience.aftermath_s if workers else self._patience.last_words_s
            if now_s - self._failed_s >= patience_s:
                yield from self._terminate(live, now_s)
        elif self._stop_s is not None:
            if not workers:
                yield from self._terminate(live, now_s)
            elif now_s - self._stop_s >= self._patience.aftermath_s:
                yield from self._terminate(workers, now_s)
        elif live and not workers and "worker-0" in self._processes:
            if self._complete_s is None:
                self._complete_s = now_s
            elif now_s - self._complete_s >= self._patience.farewell_s:
                yield from self._terminate(live, now_s)

    def _outcome(self) -> Outcome:
        worker = self._processes.get("worker-0")
        code = EXIT_INTERRUPTED if self._signalled and self._signalled.interrupt else EXIT_TERMINATED
        if self._at_once:
            return Outcome(exit_code=code, text="ended at once by a second signal")
        if self._failures and not (self._stop_s is not None and worker and worker.exit_code in STOPPED):
            return self._failure()
        if self._stop_s is None or (worker and worker.exit_code == EXIT_COMPLETE):
            return Outcome(exit_code=EXIT_COMPLETE, text="complete")
        if worker and worker.exit_code not in STOPPED:
            text = f"worker-0 did not stop within {self._patience.stop_s:g} s and was ended"
            return Outcome(exit_code=EXIT_RETRY, text=text, process=worker.name)
        return Outcome(exit_code=code, text="stopped")

    def _failure(self) -> Outcome:
        causes = [process for process in self._failures if not process.killed or process.error]
        cause = min(causes or self._failures, key=lambda process: _consequence(process.exit_code or 0))
        code = cause.exit_code or 0
        if code > 0:
            return Outcome(
                exit_code=code,
                text=f"{cause.name} failed with exit code {code}",
                process=cause.name,
                reason=cause.error,
            )
        how = "failed" if cause.killed else f"was killed by {cause.killed_by}"
        return Outcome(exit_code=EXIT_RETRY, text=f"{cause.name} {how}", process=cause.name, reason=cause.error)

    @property
    def _ending(self) -> bool:
        return self._failed_s is not None or self._stop_s is not None

    def _fail(self, process: _Process, now_s: float) -> None:
        self._failures.append(process)
        if self._failed_s is None:
            self._failed_s = now_s

    def _live(self, role: Role | None = None) -> list[_Process]:
        return [p for p in self._processes.values() if p.live and role in (None, p.role)]

    def _start(self, role: Role, index: int, now_s: float, addresses: Iterable[str | None] = ()) -> Start:
        name = f"{role}-{index}"
        self._processes[name] = _Process(name=name, role=role, started_s=now_s)
        return Start(process=name, role=role, index=index, addresses=tuple(a for a in addresses if a is not None))

    def _terminate(self, processes: list[_Process], now_s: float) -> Iterator[Effect]:
        for process in processes:
            if process.terminated_s is None:
                process.terminated_s = now_s
                yield Terminate(process=process.name)

    def _kill(self, processes: list[_Process]) -> Iterator[Effect]:
        for process in processes:
            if not process.killed:
                process.killed = True
                yield Kill(process=process.name)


def _consequence(exit_code: int) -> int:
    """How much a failure looks like the consequence of another one."""
    return {EXIT_MISMATCH: 1, EXIT_RETRY: 2, **dict.fromkeys(STOPPED, 3)}.get(exit_code, 0)
