"""The shard that a worker's own node runs: a server process, started by the worker and ended with it.

It is spoken to on its standard input, one JSON object a line: first the job spec and the address to listen on, then,
once the view has formed, its place. When its standard input ends, its worker is gone, and so is it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.config import JobSpec
from common.errors import PeerLostError, refusal
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
            PeerLostError: it does not come up.
        """
        self._emit = emit
        self._spec = spec
        self._deadline_s = deadline_s
        self.memory = NodeMemory.make()
        """Where payloads between worker and shard lie, once it is assigned."""
        self._listening: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        memory = self.memory.descriptor
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            start_new_session=True,
            pass_fds=(memory,),
        )
        self._reader = threading.Thread(target=self._read, name="shard", daemon=True)
        self._reader.start()
        traced = str(trace) if trace else None
        self._say({"job_spec": spec.to_json(), "host": host, "trace": traced, "memory": memory})
        try:
            address = self._listening.get(timeout=deadline_s)
        except queue.Empty:
            address = None
        if address is None:
            self.close(0.0)
            raise PeerLostError(refusal(f"a shard that listens on {host} within {deadline_s:g} s", "shard", "none"))
        self.address = address

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
            except ValueError:
                continue
            if event.get("event") == "listening":
                self._listening.put(str(event["address"]))
            elif event.get("event") in _FORWARDED:
                text = f"this node's shard: {event.get('text')}"
                self._emit("refused", worker_id=event.get("worker_id", ""), text=text)
        self._process.stdout.close()
        self._listening.put(None)
