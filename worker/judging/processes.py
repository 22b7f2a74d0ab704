"""Several devices: one process for each, which is given one unit after the other and ends with this process.

Which process judges a unit changes nothing of its verdict, on like hardware: batches and random numbers are the unit's.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, get_context, resource_tracker
from types import TracebackType
from typing import Any, Self

from common.errors import EXIT_RETRY, DatpsError
from worker.judging.judge import Begins, Judge, Order, Unit
from worker.judging.verdicts import Verdict
from worker.local.devices import describe

EXIT_DEFECT = 1
_END_S = 5.0


class JudgeProcessError(DatpsError):
    """A process of this evaluation has failed; the text says which, and how."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class _Process:
    """One of them, as its starter sees it."""

    def __init__(self, name: str, order: Order, device: str) -> None:
        self.name = name
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, order, device), name=name, daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()

    def tell(self, unit: Unit) -> None:
        """Hands it a unit; if it has died meanwhile, `hear` says so."""
        with contextlib.suppress(OSError):
            self.connection.send(unit)

    def hear(self) -> tuple[Any, ...]:
        """Its next message.

        Raises:
            JudgeProcessError: it has failed, or is gone.
        """
        try:
            message: tuple[Any, ...] = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(_END_S)
            code = self._process.exitcode
            how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
            raise JudgeProcessError(f"{self.name} ended without a word, {how}", EXIT_RETRY) from None
        if message[0] == "failed":
            raise JudgeProcessError(f"{self.name}: {message[1]}", message[2])
        return message

    def end(self) -> None:
        """Asks it to end, whatever it is doing."""
        self._process.terminate()

    def ended(self) -> None:
        """Sees to it that it has."""
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.connection.close()
        self._process.close()


class Processes:
    """All of them; leaving the context ends them."""

    def __init__(self, order: Order, devices: tuple[str, ...]) -> None:
        """Starts them; `devices` has one for each."""
        self._processes: list[_Process] = []
        try:
            for rank, device in enumerate(devices):
                self._processes.append(_Process(describe(devices, rank), order, device))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def judge(self, units: Iterable[Unit], begins: Begins) -> Iterator[tuple[Unit, Verdict]]:
        """Units in the order in which they are done.

        Raises:
            JudgeProcessError: a process has failed.
        """
        waiting = deque(units)
        busy: dict[Any, _Process] = {}
        for process in self._processes:
            if waiting:
                process.tell(waiting.popleft())
                busy[process.connection] = process
        while busy:
            for ready in connection.wait(list(busy)):
                process = busy[ready]
                match process.hear():
                    case ("begins", unit, stage):
                        begins(unit, stage)
                    case ("judged", unit, verdict):
                        if waiting:
                            process.tell(waiting.popleft())
                        else:
                            del busy[ready]
                        yield unit, verdict

    def close(self) -> None:
        """Ends all of them."""
        for process in self._processes:
            process.end()
        for process in self._processes:
            process.ended()
        self._processes = []


def _serve(to_parent: Any, order: Order, device: str) -> None:
    """What such a process does; its exit code is read only if it ends without a word."""
    units = _leash(to_parent)
    try:
        judge = Judge(order.open(device), order)
        while True:
            unit = units.get()
            verdict = judge.judge_one(unit, lambda unit, stage: to_parent.send(("begins", unit, stage)))
            to_parent.send(("judged", unit, verdict))
    except DatpsError as error:
        to_parent.send(("failed", str(error), error.exit_code))
    except Exception as error:  # a module of somebody else may raise anything
        traceback.print_exc(file=sys.stderr)
        to_parent.send(("failed", f"{type(error).__name__}: {error}", EXIT_DEFECT))


def _leash(from_parent: Any) -> queue.SimpleQueue[Unit]:
    """The units; where they end because the parent is gone, so does this process, whatever it is doing."""
    units: queue.SimpleQueue[Unit] = queue.SimpleQueue()

    def read() -> None:
        while True:
            try:
                units.put(from_parent.recv())
            except (EOFError, OSError):
                os._exit(EXIT_RETRY)

    threading.Thread(target=read, name="leash", daemon=True).start()
    return units


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that is started meanwhile never hears Ctrl-C: what it means is its starter's to decide."""
    resource_tracker.ensure_running()  # the first start would do it, and unblock interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
