"""One process of a local cluster: its start, its output as messages and logs, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from deploy.leash import leashed

STDERR_LINES = 12
_LAST_WORDS_S = 2.0
"""How long output may still arrive after a process is gone (a process of its own may hold the pipe open)."""


class Child:
    """A running process, leashed to the thread that starts it, in a session of its own: a terminal's Ctrl-C reaches
    the launcher only, which decides what it means.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        logs: Path,
        said: Callable[[str, dict[str, Any]], None],
        ended: Callable[[str, int], None],
    ) -> None:
        """Starts it.

        Args:
            name: of the process, and of its logs: `<name>.jsonl` (standard output) and `<name>.stderr`.
            command: program and arguments.
            environment: all of its environment.
            logs: an existing folder; logs of an earlier start are continued.
            said: called with (name, event) for each event, from another thread.
            ended: called once with (name, exit code), after the last event, from another thread.
        """
        self.name = name
        self._said = said
        self._ended = ended
        self._log = (logs / f"{name}.jsonl").open("ab")
        with (logs / f"{name}.stderr").open("ab") as stderr:
            self._popen = subprocess.Popen(
                leashed(command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=dict(environment),
                start_new_session=True,
            )
        assert self._popen.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._popen.stdout,), name=f"read-{name}", daemon=True)
        self._reader.start()
        self._waiter = threading.Thread(target=self._wait, name=f"wait-{name}", daemon=True)
        self._waiter.start()

    @property
    def pid(self) -> int:
        """The operating system's number of it."""
        return self._popen.pid

    def terminate(self) -> None:
        """SIGTERM; nothing if it is gone."""
        self._popen.terminate()

    def kill(self) -> None:
        """SIGKILL to it and to what it started; nothing if it is gone."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._popen.pid, signal.SIGKILL)

    def join(self, timeout_s: float) -> None:
        """Waits until it is gone and its end has been told."""
        self._waiter.join(timeout_s)

    def _read(self, stdout: IO[bytes]) -> None:
        with self._log, stdout:
            for line in stdout:
                self._log.write(line)
                self._log.flush()
                if event := parse_event(line):
                    self._said(self.name, event)

    def _wait(self) -> None:
        exit_code = self._popen.wait()
        self._reader.join(_LAST_WORDS_S)
        self._ended(self.name, exit_code)


def parse_event(line: bytes) -> dict[str, Any] | None:
    """The event on a line of a daemon's output; None for anything else that a library may print there."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def last_stderr_lines(logs: Path, name: str) -> list[str]:
    """What a process that died without an error event said last."""
    try:
        text = (logs / f"{name}.stderr").read_text(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-STDERR_LINES:]
