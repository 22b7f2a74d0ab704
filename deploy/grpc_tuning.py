"""How grpc reads its sockets, which is set in the environment before it is imported."""

from __future__ import annotations

import os

_EXPERIMENTS = (
    *("tcp_frame_size_tuning", "tcp_rcv_lowat"),
    *("-event_engine_client", "-event_engine_listener"),
    *("-event_engine_callback_cq", "-event_engine_for_all_other_endpoints"),
)
"""A reader is woken when a message is there, not for each packet of it; and the thread that waits for a message reads
it, not one of a pool (docs/decisions/0007).
"""


def tune_grpc() -> None:
    """Sets `GRPC_EXPERIMENTS` for this process and those that it starts; one that is set already is left alone."""
    os.environ.setdefault("GRPC_EXPERIMENTS", ",".join(_EXPERIMENTS))
