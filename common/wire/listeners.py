"""The receive buffer of connections that a grpc server will accept, for which grpc has no option.

A connection that is accepted has the buffer of the socket that listened, so it is set there, found in the process's
table of open files: grpc keeps its sockets to itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from common.errors import SpecError, refusal

_OPEN_FILES = Path("/proc/self/fd")


def limit_receive_buffers(port: int, size_bytes: int) -> None:
    """Sets SO_RCVBUF of all sockets of this process that listen on a TCP port.

    Linux makes it twice that, for its own bookkeeping.

    Raises:
        SpecError: more than `net.core.rmem_max`; or no such socket is found, as without /proc (it is Linux's).
    """
    given_bytes = []
    for listener in _listeners(port):
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size_bytes)
        given_bytes.append(listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2)
    if not given_bytes:
        rule = f"Linux, where a socket that listens on port {port} can be found in {_OPEN_FILES}"
        raise SpecError(refusal(rule, "exchange.receive_buffer_bytes", size_bytes))
    if min(given_bytes) < size_bytes:
        rule = f"at most {min(given_bytes)} bytes (net.core.rmem_max of this machine)"
        raise SpecError(refusal(rule, "exchange.receive_buffer_bytes", size_bytes))


def _listeners(port: int) -> Iterator[socket.socket]:
    """Each is closed when the next is asked for; what it stands for stays open."""
    for entry in _OPEN_FILES.iterdir() if _OPEN_FILES.is_dir() else ():
        with contextlib.suppress(OSError):  # closed meanwhile, or no socket
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as each:
                if each.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and each.getsockname()[1] == port:
                    yield each
