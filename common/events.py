"""What a daemon tells the world: one event per line, as JSON for programs or as a sentence for people.

Events are the daemons' only standard output. `datps train` reads those of its processes from pipes; by hand on a
terminal they appear as sentences. Every event has `event`, `process` and `time` (seconds since the epoch).
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from typing import Any, TextIO

_SENTENCES = {
    "listening": "shard {shard} of job {job_id} listens on {address}",
    "connecting": "connecting to {address}",
    "offered": "job {job_id}: {model} on {data}, {workers} workers, {servers} servers",
    "joined": "{worker_id} joined, {joined} of {expected} workers are here",
    "left": "{worker_id} left: {ending}",
    "view": "view {view}: {workers}",
    "initialized": "initial parameters: {text}",
    "admitted": "worker_index {worker_index} of {workers} in view {view}, {parameters} parameters, {rounds} rounds",
    "waiting": "waiting for {missing} ({waited_s:.0f} s)",
    "refused": "refused {worker_id}: {text}",
    "evaluation": "round {round}: clean accuracy {clean_accuracy:.3f}, robust accuracy {robust_accuracy:.3f}",
    "overfitting_check": "round {round}: training images attacked {attacked_accuracy:.3f}, by PGD {pgd_accuracy:.3f}",
    "overfitting": "warning: {text}",
    "checkpoint": "saved {path} (round {round})",
    "stopping": "stopping: {text}",
    "error": "error: {text}",
    "complete": "complete: {rounds} rounds in {seconds:.1f} s",
}


class Emitter:
    """Writes events to a stream; safe to call from several threads."""

    def __init__(self, process: str, *, as_json: bool | None = None, stream: TextIO | None = None) -> None:
        """`as_json` defaults to what suits the stream: sentences on a terminal, JSON lines otherwise."""
        self.process = process
        self._stream = stream if stream is not None else sys.stdout
        self._as_json = not self._stream.isatty() if as_json is None else as_json
        self._lock = threading.Lock()

    def __call__(self, event: str, **fields: Any) -> None:
        """Writes one event; a closed, broken or full stream is not an error of the job."""
        if self._as_json:
            line = json.dumps({"event": event, "process": self.process, "time": round(time.time(), 3), **fields})
        else:
            line = f"{time.strftime('%H:%M:%S')} {self.process}: {_sentence(event, fields)}"
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()


def _sentence(event: str, fields: dict[str, Any]) -> str:
    if event == "round":
        return (
            f"round {fields['round']}/{fields['rounds']} loss {fields['loss']:.4f} "
            f"attack {fields['attack_s']:.2f} s, compute {fields['compute_s']:.2f} s, "
            f"communication {fields['communication_s']:.2f} s"
        )
    template = _SENTENCES.get(event)
    try:
        if template is not None:
            readable = {name: ", ".join(map(str, v)) if isinstance(v, list) else v for name, v in fields.items()}
            return template.format(**readable)
    except (KeyError, ValueError, TypeError):
        pass
    return f"{event} " + " ".join(f"{name}={value}" for name, value in fields.items())
