"""The server process: signals, exit codes, events; on its own, or as the shard of a worker's node."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any, TextIO

from common.codecs.cpu import warm
from common.errors import EXIT_INTERRUPTED, EXIT_RETRY, EXIT_TERMINATED, DatpsError, SpecError, refusal
from common.events import Emitter
from common.memory import keep_freed_memory
from common.node_memory import NodeMemory
from common.spec_sources import job_spec_from_json
from ps.membership import FormView
from ps.outcome import Outcome
from ps.server import Server, ServerOptions

__all__ = ["ServerOptions", "run", "run_shard"]

SETTLE_S = 1.0
"""How long the loop goes on for what is left when the server has stopped."""


def run(options: ServerOptions, emit: Emitter) -> int:
    """Serves one job; returns the exit code when it is over, or after SIGTERM or Ctrl-C when the workers have left."""
    keep_freed_memory()
    warm()
    return asyncio.run(_run(options, emit))


def run_shard(words: TextIO, emit: Emitter) -> int:
    """Serves one shard for the worker that started this process; returns the exit code.

    Args:
        words: what the worker says, one JSON object a line (`worker/exchange/colocated.py`); their end is its end.
        emit: told of everything; `listening` gives the address.
    """
    keep_freed_memory()
    try:
        told = json.loads(words.readline())
        spec, host = job_spec_from_json(told["job_spec"]), str(told["host"])
        trace = Path(told["trace"]) if told.get("trace") else None
        memory = NodeMemory(int(told["memory"]))
    except (ValueError, KeyError, TypeError) as error:
        raise SpecError(refusal("a worker that starts this shard", "words", "none", repr(error))) from None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # its worker decides
    warm()
    return asyncio.run(
        _run_shard(ServerOptions(spec=spec, shard=None, host=host, port=0, trace=trace, memory=memory), words, emit)
    )


async def _run_shard(options: ServerOptions, words: TextIO, emit: Emitter) -> int:
    server = Server(options, emit)
    loop = asyncio.get_running_loop()

    def listen() -> None:
        with contextlib.suppress(RuntimeError):  # the job was over, and with it the loop
            gone = Outcome(exit_code=EXIT_RETRY, text="the worker of this shard's node is gone")
            for line in words:
                place = json.loads(line)
                loop.call_soon_threadsafe(_assign, server, place)
                own = place["worker_ids"][place["shard"]]
                text = f"{own} is gone: it does not speak to its node's shard any more"
                gone = Outcome(exit_code=EXIT_RETRY, text=text, worker_ids=(own,))
            loop.call_soon_threadsafe(server.end, gone)

    try:
        await server.start()
        threading.Thread(target=listen, name="words", daemon=True).start()
        outcome = await server.serve()
        await settle(SETTLE_S)
    except DatpsError as error:
        emit("error", text=str(error), exit_code=error.exit_code)
        return error.exit_code
    if outcome.exit_code not in (0, EXIT_TERMINATED):
        emit("error", text=outcome.text, exit_code=outcome.exit_code)
    return outcome.exit_code


def _assign(server: Server, place: dict[str, Any]) -> None:
    view = FormView(
        view=place["view"],
        worker_ids=tuple(place["worker_ids"]),
        connections=(),
        samples=(),
        layout_digest=bytes.fromhex(place["layout_digest"]),
        round=place["round"],
    )
    server.assign(place["shard"], view, place["coordinator_incarnation"])


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
        await settle(SETTLE_S)
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


async def settle(deadline_s: float) -> None:
    """Lets the loop's other tasks end by themselves, for at most `deadline_s` seconds.

    `grpc.aio.Server.stop` returns when gRPC's core is done with a call, which can be some turns of the loop before the
    call's tasks are (grpc issue 37239); `asyncio.run` would cancel them, and grpc print a traceback of that.
    """
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=deadline_s)
