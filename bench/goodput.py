"""What one link really carries: one TCP stream for about a second.

`python -m bench.goodput receive ADDRESS` and `python -m bench.goodput send ADDRESS PORT`. The receiver says where it
listens, and at the end how many payload bytes per second arrived after a short start.
"""

from __future__ import annotations

import socket
import sys
import time

from common.events import Emitter

STREAM_S = 1.2
IGNORED_S = 0.2
"""At the start: the shaper's burst, and TCP's slow start."""
_DEADLINE_S = 30.0
_CHUNK = 1 << 18


def receive(address: str, emit: Emitter) -> None:
    """Receives one stream; emits `listening`, then `goodput`."""
    buffer = bytearray(_CHUNK)
    with socket.create_server((address, 0)) as listener:
        listener.settimeout(_DEADLINE_S)
        emit("listening", address=address, port=listener.getsockname()[1])
        stream, _ = listener.accept()
    with stream:
        stream.settimeout(_DEADLINE_S)
        started_s = counted_s = time.monotonic()
        last_s, received = started_s, 0
        while size := stream.recv_into(buffer):
            last_s = time.monotonic()
            if last_s - started_s < IGNORED_S:
                counted_s = last_s
            else:
                received += size
    emit("goodput", bytes=received, seconds=last_s - counted_s, bits_per_s=8 * received / max(last_s - counted_s, 1e-9))


def send(address: str, port: int) -> None:
    """Sends zeros for `STREAM_S`."""
    zeros = bytes(_CHUNK)
    with socket.create_connection((address, port), timeout=_DEADLINE_S) as stream:
        until_s = time.monotonic() + STREAM_S
        while time.monotonic() < until_s:
            stream.sendall(zeros)


def main(arguments: list[str]) -> None:
    """Runs one end."""
    if arguments[0] == "receive":
        receive(arguments[1], Emitter("goodput", as_json=True))
    else:
        send(arguments[1], int(arguments[2]))


if __name__ == "__main__":
    main(sys.argv[1:])
