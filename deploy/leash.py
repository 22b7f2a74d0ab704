"""Runs a command that dies with its parent: `python leash.py PARENT_PID COMMAND ...`, standard library only.

Why not `preexec_fn`: between fork and exec it runs Python in a copy of a process that has threads, which can deadlock.
Here an interpreter of its own asks the kernel for the signal and then becomes the command: the setting survives exec.
Why SIGKILL: if the launcher cannot stop its processes in good order any more, none of them may stay behind.
Elsewhere than on Linux the launcher's own cleanup has to do.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def leashed(command: Sequence[str]) -> list[str]:
    """The command that runs `command` on a leash held by this process's calling thread."""
    return [sys.executable, "-I", "-S", str(Path(__file__)), str(os.getpid()), *command]


def main() -> None:
    """Asks for the signal, then becomes the command."""
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        sys.exit(1)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
