"""Signals while a laboratory runs: all of them unwind the stack as Ctrl-C does, so that cleaning up is one path."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.errors import EXIT_TERMINATED, DatpsError

_TERMINATING = (signal.SIGTERM, signal.SIGHUP)


class TerminatedError(DatpsError):
    """We were asked to end."""

    exit_code = EXIT_TERMINATED


@contextmanager
def signals_unwind() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP raise `TerminatedError` in the main thread."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise TerminatedError(f"{signal.Signals(number).name}: the measurement is given up")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(number, terminate) for number in _TERMINATING]
    try:
        yield
    finally:
        for number, handler in zip(_TERMINATING, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """Within it signals wait, for cleaning up is not to be cut short.

    By handlers and not by a mask: a mask is one thread's, and the signal would be delivered to another one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, *_TERMINATING)
    before = [signal.signal(number, lambda number, _frame: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
