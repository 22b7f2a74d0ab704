"""The receive buffers of connections: of what a listener accepts, and of all that carry an exchange."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from common.codecs import Float32
from common.errors import SpecError
from common.wire.listeners import limit_receive_buffers
from tests.support import DIGEST, Member, in_threads, job, members, running_server

SIZE_BYTES = 24 << 10
DOUBLED_BYTES = 2 * SIZE_BYTES
"""As Linux tells it: half of it is for its own bookkeeping."""


def test_what_is_accepted_has_the_buffer_and_others_do_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours, socket.create_server(("127.0.0.1", 0)) as other:
        limit_receive_buffers(ours.getsockname()[1], SIZE_BYTES)
        sizes = []
        for listener in (ours, other):
            with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
                sizes.append(accepted.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
    assert sizes[0] == DOUBLED_BYTES
    assert sizes[1] > DOUBLED_BYTES


def test_a_port_that_nobody_listens_on_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(SpecError, match=rf"listens on port {port} .* got exchange.receive_buffer_bytes={SIZE_BYTES}"):
        limit_receive_buffers(port, SIZE_BYTES)


def test_more_than_the_kernel_gives_is_refused() -> None:
    limit_bytes = int(Path("/proc/sys/net/core/rmem_max").read_text())
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(SpecError, match=rf"at most {limit_bytes} bytes .* got exchange.receive_buffer_bytes="),
    ):
        limit_receive_buffers(listener.getsockname()[1], limit_bytes + 1)


@pytest.mark.parametrize("limited", [False, True])
def test_both_ends_of_every_stream_have_it(limited: bool) -> None:
    spec = job("workers=2", f"exchange.receive_buffer_bytes={SIZE_BYTES if limited else 'null'}")
    with running_server(spec) as server, members(spec, server.address) as joined:
        d, e = joined[0].layout.d, joined[0].layout.e
        gradients = np.random.default_rng(3).standard_normal((2, d)).astype(np.float32)

        def average(member: Member, gradient: Float32) -> None:
            member.exchange.average(0, gradient, np.zeros(e, np.float32), DIGEST)

        in_threads([partial(average, *each) for each in zip(joined, gradients, strict=True)])
        served, connected = sizes_of(int(server.address.rpartition(":")[2]))
    assert gradients[0].tobytes() == gradients[1].tobytes()
    assert all((size == DOUBLED_BYTES) is limited for size in served)
    assert (DOUBLED_BYTES in connected) is limited  # Join's connection is left alone


def sizes_of(port: int) -> tuple[list[int], list[int]]:
    """SO_RCVBUF of this process's connections from the port and to it."""
    served, connected = [], []
    for each in open_connections():
        size = each.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        if each.getsockname()[1] == port:
            served.append(size)
        elif each.getpeername()[1] == port:
            connected.append(size)
    assert served
    return served, connected


def open_connections() -> Iterator[socket.socket]:
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as each:
                if each.family in (socket.AF_INET, socket.AF_INET6):
                    each.getpeername()
                    yield each
        except OSError:
            continue
