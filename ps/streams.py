"""One peer's stream at the server: a bounded outbox, and a handler that ends when either side does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

from common.timeline import OFF, Timeline
from common.wire.frames import BucketMessage
from common.wire.rpc import Malformed

Outgoing = Message | bytes


@dataclass(frozen=True, slots=True)
class Pull:
    """An average of which the timeline tells when it was written."""

    round: int
    bucket: int
    worker: int


class Outbox:
    """Messages for one peer. A peer that does not read fills its own outbox and nobody else's, and is dropped.

    Attributes:
        limit: messages that may wait; a peer within the protocol never needs as many. May be changed.
        overflowed: set when the limit was reached; the stream ends then.
    """

    def __init__(self, limit: int, timeline: Timeline = OFF) -> None:
        self.limit = limit
        self._timeline = timeline
        self.closed = False
        self.overflowed = asyncio.Event()
        self._queue: asyncio.Queue[tuple[Outgoing, Pull | None] | None] = asyncio.Queue()

    def put(self, message: Outgoing, pull: Pull | None = None) -> None:
        """Queues a message, unless the outbox is closed or the peer has stopped reading.

        `pull`: what the timeline says of it; nothing if None.
        """
        if self.closed:
            return
        if self._queue.qsize() >= self.limit:
            self.closed = True
            self.overflowed.set()
            return
        self._queue.put_nowait((message, pull))

    def close(self) -> None:
        """Ends the stream once everything queued has been written."""
        if not self.closed:
            self.closed = True
            self._queue.put_nowait(None)

    async def drain(self, context: grpc.aio.ServicerContext) -> None:
        """Writes until the outbox is closed and empty."""
        while (queued := await self._queue.get()) is not None:
            message, pull = queued
            start_ns = self._timeline.now_ns()
            await context.write(message)
            if pull:
                track = f"pull of worker {pull.worker}"
                self._timeline.add_phase("pull", start_ns, pull.round, pull.bucket, track=track, worker=pull.worker)


Reader = Callable[[AsyncIterator[Any], Outbox], Awaitable[None]]


async def serve_stream(
    requests: AsyncIterator[Any], context: grpc.aio.ServicerContext, outbox: Outbox, read: Reader
) -> None:
    """Runs a bidirectional stream: `read` consumes requests while the outbox is written.

    It ends when `read` returns and the outbox has been written, or when the outbox has been closed and written
    (`read` is cancelled then), or when the peer goes or does not read.
    """
    reader = asyncio.ensure_future(read(requests, outbox))
    writer = asyncio.ensure_future(outbox.drain(context))
    deaf = asyncio.ensure_future(outbox.overflowed.wait())
    try:
        await asyncio.wait({reader, writer, deaf}, return_when=asyncio.FIRST_COMPLETED)
        if reader.done() and not reader.exception():
            outbox.close()
            await writer
    except asyncio.CancelledError:
        pass  # the peer has gone, or the server stops: nobody is left to hear of it, and grpc would log a traceback
    finally:
        for task in (reader, writer, deaf):
            task.cancel()
        results = await asyncio.gather(reader, writer, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception) and not isinstance(result, (grpc.RpcError, grpc.aio.UsageError)):
            raise result


async def first_message(requests: AsyncIterator[Any], deadline_s: float) -> Any:
    """The next message of a stream; None if it ended or said nothing within the deadline."""
    try:
        return await asyncio.wait_for(anext(requests), deadline_s)
    except (StopAsyncIteration, TimeoutError):
        return None


def kind_of(message: Any) -> str:
    """Which member of its oneof a message carries; `malformed` for bytes that were none."""
    if isinstance(message, BucketMessage):
        return "contribution"
    if isinstance(message, Malformed):
        return "malformed"
    return message.WhichOneof("kind") or "malformed"
