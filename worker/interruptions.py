"""What stops a worker from outside: signals, and what the coordinator says on the Join stream."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, MismatchError, PeerLostError
from worker.exchange.base import Exchange


class Stopped(BaseException):
    """A signal came while nothing had to be saved yet."""


class StopFlag:
    """SIGTERM and Ctrl-C: at once while joining, after the round while training, at once if they come again."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.training = False

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handles signals in the main thread; elsewhere they are not ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED
        if self.exit_code is not None:
            os._exit(code)
        self.exit_code = code
        if not self.training:
            raise Stopped


class AbortRelay:
    """What comes on the Join stream, an Abort or a request to stop, may come before there is an exchange to tell."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abort: tuple[str, bool] | None = None
        self._stop: str | None = None
        self._exchange: Exchange | None = None

    def aborted(self, text: str, retry: bool) -> None:
        """The job has been aborted, or the coordinator is gone."""
        with self._lock:
            self._abort = self._abort or (text, retry)
            self._pass_on()

    def stop_requested(self, text: str) -> None:
        """The coordinator asks to stop after the round."""
        with self._lock:
            self._stop = text
            self._pass_on()

    def attach(self, exchange: Exchange) -> None:
        """From now on everything is passed on at once; also what has come already."""
        with self._lock:
            self._exchange = exchange
            self._pass_on()

    def _pass_on(self) -> None:
        if self._exchange and self._abort:
            self._exchange.fail(*self._abort)
        if self._exchange and self._stop:
            self._exchange.stop_requested = self._stop

    def raise_if_aborted(self) -> None:
        """Raises what an Abort means.

        Raises:
            PeerLostError: a new try can succeed.
            MismatchError: it cannot.
        """
        with self._lock:
            if self._abort:
                text, retry = self._abort
                raise (PeerLostError if retry else MismatchError)(text)
