"""The starting line: every round begins at all workers at once, whatever each did before.

A barrier over a Unix socket with a path: that reaches across network namespaces, and crosses no link.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from common.errors import DatpsError, PeerLostError, refusal

_BYTE = b"."


class StartingLine:
    """The launcher's side: a thread that lets all workers go when all have come."""

    def __init__(self, path: Path, workers: int, everybody_is_here: Callable[[int], None]) -> None:
        """`everybody_is_here` is called with 0, 1, ... just before each start, from another thread."""
        self._path = path
        self._workers = workers
        self._everybody_is_here = everybody_is_here
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lines: list[socket.socket] = []
        self._error: DatpsError | None = None

    def __enter__(self) -> Self:
        self._listener.bind(str(self._path))
        self._listener.listen(self._workers)
        threading.Thread(target=self._serve, name="starting-line", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for line in [self._listener, *self._lines]:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()
        self._path.unlink(missing_ok=True)
        if self._error:
            raise self._error

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(self._workers):
                self._lines.append(self._listener.accept()[0])
            start = 0
            while all(line.recv(1) for line in self._lines):
                try:
                    self._everybody_is_here(start)
                except DatpsError as error:  # the workers see that we are gone; `__exit__` says why
                    self._error = error
                    break
                start += 1
                for line in self._lines:
                    line.sendall(_BYTE)
        for line in self._lines:
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


class Gate:
    """A worker's side."""

    def __init__(self, path: str, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._line.settimeout(deadline_s)
        try:
            self._line.connect(path)
        except OSError as error:
            raise PeerLostError(refusal("a launcher that listens", "path", path, str(error))) from None

    def wait(self) -> None:
        """Returns when all workers are here.

        Raises:
            PeerLostError: the launcher is gone, or not all came within the deadline.
        """
        try:
            self._line.sendall(_BYTE)
            if self._line.recv(1):
                return
            text = "the launcher is gone"
        except OSError as error:
            text = f"{error}"
        raise PeerLostError(refusal(f"a start within {self._deadline_s:g} s", "starting_line", text))
