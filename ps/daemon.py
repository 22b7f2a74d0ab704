"""The server process: signals, exit codes, events."""

from __future__ import annotations

import asyncio
import os
import signal

from common.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, DatpsError
from common.events import Emitter
from ps.server import Server, ServerOptions

__all__ = ["ServerOptions", "run"]


def run(options: ServerOptions, emit: Emitter) -> int:
    """Serves one job; returns the exit code when it is over, or after SIGTERM or Ctrl-C when the workers have left."""
    return asyncio.run(_run(options, emit))


async def _run(options: ServerOptions, emit: Emitter) -> int:
    server = Server(options, emit)
    loop = asyncio.get_running_loop()
    signalled: list[int] = []

    def on_signal(number: signal.Signals) -> None:
        code = EXIT_INTERRUPTED if number is signal.SIGINT else EXIT_TERMINATED
        if signalled:
            os._exit(code)
        signalled.append(code)
        server.request_stop(f"{options.spec.job_id} server got {number.name}")

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await server.start()
        outcome = await server.serve()
    except DatpsError as error:
        emit("error", text=str(error), exit_code=error.exit_code)
        return error.exit_code
    if outcome.exit_code == EXIT_TERMINATED and signalled:
        emit("stopping", text=outcome.text)
        return signalled[0]
    if outcome.exit_code == 0:
        emit("complete", rounds=server.aggregator.round, seconds=round(server.seconds, 3))
    elif outcome.exit_code == EXIT_TERMINATED:
        emit("stopping", text=outcome.text)
    else:
        emit("error", text=outcome.text, exit_code=outcome.exit_code)
    return outcome.exit_code
