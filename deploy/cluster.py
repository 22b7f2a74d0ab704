"""A local cluster of real processes: servers and workers of one job on 127.0.0.1, watched until all are gone."""

from __future__ import annotations

import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from common.codecs.cpu import warm
from common.config import JobSpec, Split
from common.spec_sources import ENVIRONMENT_PREFIX
from deploy.process import Child, last_stderr_lines
from deploy.runs import CHECKPOINTS, JOB, LOGS, RESIDUALS, TRACES
from deploy.supervision import (
    Done,
    Effect,
    Ended,
    Kill,
    Message,
    Outcome,
    Patience,
    Role,
    Said,
    Signalled,
    Start,
    Supervisor,
    Terminate,
    Tick,
)

HOST = "127.0.0.1"
TICK_S = 0.2
_REPORT_S = 5.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
Observer = Callable[[dict[str, Any]], None]


class Commands(Protocol):
    """How the cluster's processes are run: program and arguments."""

    def server(self, *, shard: int, port: int, shard_addresses: tuple[str, ...]) -> list[str]:
        """A server that listens on 127.0.0.1; port 0 is any free one."""

    def worker(self, *, index: int, server: str) -> list[str]:
        """A worker; `server` is the coordinator's address."""


@dataclass(frozen=True, kw_only=True)
class DatpsCommands:
    """The `datps` daemons of this installation.

    Attributes:
        spec: the job; its `job.yaml` lies in `folder`.
        folder: the run folder.
        data: data folder; with `data.split=own` each worker has its own `worker-<index>` in it.
        device: of the workers.
        devices: several of each worker instead, if not None.
        threads: of each local process of a worker.
        resume: go on from the newest checkpoint in `folder`.
        trace: every process writes its timeline to `traces/` in `folder`.
        unlabeled: file of pseudo-labeled images.
        init: what a new run starts from.
    """

    spec: JobSpec
    folder: Path
    data: Path | None
    device: str
    threads: int
    resume: bool
    trace: bool = False
    devices: str | None = None
    unlabeled: Path | None = None
    init: Path | None = None

    def server(self, *, shard: int, port: int, shard_addresses: tuple[str, ...]) -> list[str]:
        """See `Commands`."""
        job = ["--job", str(self.folder / JOB)]
        command = [*_DATPS, "server", "--json", *job, "--shard", str(shard), "--host", HOST, "--port", str(port)]
        command += self._trace(f"server-{shard}")
        return [*command, "--shard-addresses", ",".join(shard_addresses)] if shard_addresses else command

    def worker(self, *, index: int, server: str) -> list[str]:
        """See `Commands`; only worker-0 writes to the run folder, for all replicas are identical, but for residuals."""
        name = f"worker-{index}"
        command = [*_DATPS, "worker", "--json", "--server", server, "--worker-id", name]
        command += ["--devices", self.devices] if self.devices else ["--device", self.device]
        command += ["--threads", str(self.threads)]
        if self.data is not None:
            own = self.spec.data.split is Split.OWN
            command += ["--data", str(self.data / name if own else self.data)]
        for flag, path in (("--unlabeled", self.unlabeled), ("--init", self.init)):
            command += [flag, str(path)] if path is not None else []
        if index == 0:
            command += ["--out", str(self.folder)]
        if self.spec.codec.keeps_residual:
            command += ["--state", str(self.folder / RESIDUALS)]
        command += self._trace(name)
        return [*command, "--resume", str(self._to_resume())] if self.resume else command

    def _to_resume(self) -> Path:
        """The run folder; of biased codecs the newest checkpoint that has the residuals of all workers beside it."""
        if not self.spec.codec.keeps_residual:
            return self.folder
        from worker.residuals import newest_whole

        return newest_whole(self.folder / RESIDUALS, self.folder / CHECKPOINTS, self.spec.workers) or self.folder

    def _trace(self, name: str) -> list[str]:
        return ["--trace", str(self.folder / TRACES / f"{name}.json")] if self.trace else []


_DATPS = (sys.executable, "-m", "deploy.cli")


def threads_per_worker(workers: int) -> int:
    """The cores that this process may use, divided among the workers; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def child_environment(threads: int, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment for a daemon.

    Without `DATPS_*`: the resolved job.yaml and the flags say everything, and a variable would win over job.yaml.
    """
    inherited = os.environ if environment is None else environment
    kept = {name: value for name, value in inherited.items() if not name.startswith(ENVIRONMENT_PREFIX)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


class LocalCluster:
    """Runs one job; call `run` once, from the main thread."""

    def __init__(
        self, *, spec: JobSpec, folder: Path, commands: Commands, observe: Observer, patience: Patience | None = None
    ) -> None:
        """
        Args:
            spec: how many servers and workers.
            folder: the run folder; logs go to `logs/` in it.
            commands: how the processes are run.
            observe: called with every event of the processes and of the launcher itself, and with `tick` now and then;
                in the main thread.
            patience: deadlines; the usual ones if None.
        """
        self._spec = spec
        self._logs = folder / LOGS
        self._commands = commands
        self._observe = observe
        self._supervisor = Supervisor(
            servers=spec.servers, workers=spec.workers, patience=patience if patience is not None else Patience()
        )
        self._environment = child_environment(threads_per_worker(spec.workers))
        self._inbox: queue.SimpleQueue[tuple[Message, dict[str, Any]]] = queue.SimpleQueue()
        self._children: dict[str, Child] = {}
        self._tick_s = self._reported_s = 0.0

    def run(self) -> Outcome:
        """Starts the processes and returns when all of them are gone, whatever happens."""
        self._logs.mkdir(parents=True, exist_ok=True)
        warm()  # once here, not in every process at the same time
        with self._signals():
            try:
                outcome = self._perform(self._supervisor.begin(time.monotonic()))
                while outcome is None:
                    outcome = self._perform(self._supervisor.handle(self._next(), time.monotonic()))
                return self._explained(outcome)
            finally:
                for child in self._children.values():
                    child.kill()
                for child in self._children.values():
                    child.join(timeout_s=5.0)

    def _next(self) -> Message:
        """The next message; a tick whenever one is due, however much the processes have to say."""
        wait_s = self._tick_s - time.monotonic()
        if wait_s > 0:
            try:
                message, event = self._inbox.get(timeout=wait_s)
            except queue.Empty:
                pass
            else:
                self._observe(event)
                return message
        self._tick_s = time.monotonic() + TICK_S
        self._report_awaited()
        self._observe(_event("tick", "train"))
        return Tick()

    def _perform(self, effects: list[Effect]) -> Outcome | None:
        for effect in effects:
            match effect:
                case Start():
                    self._start(effect)
                case Terminate():
                    self._children[effect.process].terminate()
                case Kill():
                    self._children[effect.process].kill()
                case Done():
                    return effect.outcome
        return None

    def _start(self, start: Start) -> None:
        if start.role is Role.WORKER:
            command = self._commands.worker(index=start.index, server=start.addresses[0])
        else:
            several = start.index == 0 and self._spec.servers > 1
            # shard 0's own entry is not used: workers reach it as the coordinator
            addresses = (f"{HOST}:0", *start.addresses) if several else ()
            command = self._commands.server(shard=start.index, port=0, shard_addresses=addresses)
        child = Child(
            start.process,
            command,
            environment=self._environment,
            logs=self._logs,
            said=self._on_said,
            ended=self._on_ended,
        )
        self._children[start.process] = child
        self._observe(_event("started", start.process, role=start.role.value, pid=child.pid))

    def _explained(self, outcome: Outcome) -> Outcome:
        """With the last lines of standard error if the failed process gave no reason."""
        if outcome.process is None or outcome.reason is not None:
            return outcome
        return replace(outcome, reason="\n".join(last_stderr_lines(self._logs, outcome.process)) or None)

    def _report_awaited(self) -> None:
        awaited, now_s = self._supervisor.awaited, time.monotonic()
        if awaited and now_s - self._reported_s >= _REPORT_S:
            self._reported_s = now_s
            self._observe(_event("stopping", "train", text=f"waiting for {', '.join(awaited)} to end"))

    def _on_said(self, process: str, event: dict[str, Any]) -> None:
        kind = event["event"]
        address = str(event.get("address")) if kind == "listening" else None
        error = str(event.get("text")) if kind == "error" else None
        self._inbox.put((Said(process=process, address=address, error=error), {**event, "process": process}))

    def _on_ended(self, process: str, exit_code: int) -> None:
        killed_by = signal.Signals(-exit_code).name if exit_code < 0 else None
        event = _event("ended", process, exit_code=exit_code, killed_by=killed_by)
        self._inbox.put((Ended(process=process, exit_code=exit_code, killed_by=killed_by), event))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Signals become messages; the queue may be put to from a signal handler."""

        def on_signal(number: int, _frame: FrameType | None) -> None:
            name = signal.Signals(number).name
            text = f"{name}: finishing the round and saving; once more ends everything at once"
            self._inbox.put((Signalled(interrupt=number == signal.SIGINT), _event("stopping", "train", text=text)))

        before = [signal.signal(number, on_signal) for number in _STOP_SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(_STOP_SIGNALS, before, strict=True):
                signal.signal(number, handler)


def _event(event: str, process: str, **fields: Any) -> dict[str, Any]:
    return {"event": event, "process": process, "time": round(time.time(), 3), **fields}
