"""The shard that a worker's own node runs: a server process, started by the worker and ended with it.

It is spoken to on its standard input, one JSON object a line: first the job spec and the address to listen on, then,
once the view has formed, its place. When its standard input ends, its worker is gone, and so is it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import JobSpec
from common.errors import EXIT_USAGE, PeerLostError, SpecError, refusal
from common.events import Emitter
from common.layout import Layout
from common.node_memory import NodeMemory
from worker.exchange.coordination import Admission

_FORWARDED = frozenset({"error", "refused"})
_KILL_S = 5.0


def local_address(peer: str) -> str:
    """The address of this machine that traffic to `peer` (host:port) leaves from.

    Raises:
        PeerLostError: there is no way there.
    """
    host, _, port = peer.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=10.0) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise PeerLostError(refusal("an address that answers", "server", peer, str(error))) from None


class ShardProcess:
    """One shard's server as a child process."""

    def __init__(
        self,
        command: Sequence[str],
        spec: JobSpec,
        host: str,
        deadline_s: float,
        emit: Emitter,
        trace: Path | None = None,
    ) -> None:
        """Starts it and waits until it listens.

        Args:
            command: what runs it: program and arguments.
            spec: the job.
            host: address to listen on, as the other workers reach it.
            deadline_s: how long to wait.
            emit: told of its errors.
            trace: file that it writes its timeline to.

        Raises:
            SpecError: there is no such command, or the shard refuses what it is told, as an address that is not ours.
            PeerLostError: it does not come up.
        """
        self._emit = emit
        self._error: str | None = None
        self._spec = spec
        self._deadline_s = deadline_s
        self.memory = NodeMemory.make()
        """Where payloads between worker and shard lie, once it is assigned."""
        self._listening: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        memory = self.memory.descriptor
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                start_new_session=True,
                pass_fds=(memory,),
            )
        except OSError as error:
            self.memory.close()
            raise SpecError(refusal("a command that runs this node's shard", "shard_command", str(error))) from None
        self._reader = threading.Thread(target=self._read, name="shard", daemon=True)
        self._reader.start()
        traced = str(trace) if trace else None
        self.address = self._started({"job_spec": spec.to_json(), "host": host, "trace": traced, "memory": memory})

    def _started(self, words: dict[str, Any]) -> str:
        """Tells it the job; returns the address that it listens on, or ends it and raises why there is none."""
        try:
            with contextlib.suppress(PeerLostError):  # how it ended says more
                self._say(words)
            address = self._listening.get(timeout=self._deadline_s)
        except queue.Empty:
            self.close(0.0)
            rule = f"a shard that listens on {words['host']} within {self._deadline_s:g} s"
            raise PeerLostError(refusal(rule, "shard", "none")) from None
        if address is not None:
            return address
        self.close()
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        text = f"this node's shard: {self._error or f'it ended before it listened, {how}'}"
        raise (SpecError if code == EXIT_USAGE else PeerLostError)(text)

    def assign(self, admission: Admission, layout: Layout, round_: int) -> None:
        """Tells it which shard it is: the one of its worker's index.

        Raises:
            PeerLostError: it is gone, or there is no memory to share with it.
        """
        self.memory.lay_out(layout, self._spec, admission.worker_index, grow=True)
        self._say(
            {
                "shard": admission.worker_index,
                "view": admission.view,
                "coordinator_incarnation": admission.coordinator_incarnation,
                "worker_ids": admission.worker_ids,
                "layout_digest": layout.digest().hex(),
                "round": round_,
            }
        )

    def finish(self) -> None:
        """Waits until all workers have left it in good order; a worker may still be saving its last checkpoint."""
        try:
            self._process.wait(self._deadline_s)
        except subprocess.TimeoutExpired:
            self._emit("stopping", text=f"this node's shard still had workers after {self._deadline_s:g} s")
        self.close()

    def close(self, kill_s: float = _KILL_S) -> None:
        """Ends it, whatever it is doing."""
        if self._process.stdin:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(kill_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(_KILL_S)
        self.memory.close()

    def _say(self, words: dict[str, Any]) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
        except OSError as error:
            raise PeerLostError(f"this node's shard is gone: {error}") from None

    def _read(self) -> None:
        """Reads its events."""
        assert self._process.stdout
        for line in self._process.stdout:
            try:
                event = json.loads(line)
                kind = event["event"]
            except (ValueError, KeyError, TypeError):
                continue  # a library has printed something
            if kind == "listening":
                self._listening.put(str(event.get("address")))
            elif kind in _FORWARDED:
                if kind == "error":
                    self._error = str(event.get("text"))
                text = f"this node's shard: {event.get('text')}"
                self._emit("refused", worker_id=event.get("worker_id", ""), text=text)
        self._process.stdout.close()
        self._listening.put(None)
