"""A daemon that plays a script: `python fake_daemon.py '[["say", {...}], ["hang"], ...]'`, standard library only.

Steps: `say` an event, `print` a line that is no event, `stderr` a line, `write` a file, `term` what SIGTERM does from
now on (an exit code, or null to be deaf), `hold` a FIFO open and say so in it, `environment` says the variables of a
prefix, `hang` until a signal, `die` by a signal, `exit`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

HELD: list[int] = []


def say(event: dict[str, Any]) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")  # in one piece, also from a signal handler


def on_sigterm(exit_code: int | None) -> None:
    def end(_number: int, _frame: object) -> None:
        say({"event": "stopping", "text": "state saved"})
        os._exit(exit_code or 0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if exit_code is None else end)


def hold(path: str) -> None:
    HELD.append(os.open(path, os.O_WRONLY))
    os.write(HELD[-1], b".")


def play(step: str, *arguments: Any) -> None:
    match step:
        case "say":
            say(*arguments)
        case "print":
            print(*arguments, flush=True)
        case "stderr":
            print(*arguments, file=sys.stderr, flush=True)
        case "write":
            path, text = arguments
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)
        case "term":
            on_sigterm(*arguments)
        case "hold":
            hold(*arguments)
        case "environment":
            found = {name: value for name, value in os.environ.items() if name.startswith(arguments[0])}
            say({"event": "environment", "found": found})
        case "hang":
            while True:
                signal.pause()
        case "die":
            os.kill(os.getpid(), arguments[0])
        case "exit":
            sys.exit(arguments[0])


if __name__ == "__main__":
    for script_step in json.loads(sys.argv[1]):
        play(*script_step)
