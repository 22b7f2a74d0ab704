"""Exchange streams of one worker: all of them on one event loop, on a thread of its own.

Why an event loop here too: with grpcio's synchronous streams, every message wakes three threads that then wait for each
other's turn at the interpreter. On one loop a message costs a fifth less CPU time, and with six busy streams a third of
the wall-clock time (docs/decisions/0007).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import grpc

from common.timeline import Timeline
from common.wire import rpc
from common.wire.frames import read_server_message
from worker.session import Push

_JOIN_S = 5.0


class StreamLoop:
    """An event loop on a thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Runs a coroutine on the loop; returns its result, or raises what it raises."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, Any]) -> None:
        """Starts a coroutine on the loop and does not wait."""
        asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Calls a function on the loop, soon."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for it any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """Ends the loop and what runs on it."""
        if self._thread.is_alive():
            self.call(self._loop.stop)
            self._thread.join(_JOIN_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            self._loop.close()


class ShardStream:
    """One Exchange stream; made and used on the loop, but for `put`."""

    def __init__(
        self,
        loop: StreamLoop,
        address: str,
        shard: int,
        timeline: Timeline,
        receive_buffer_bytes: int | None = None,
    ) -> None:
        """
        Args:
            loop: that it runs on.
            address: the server's, host:port.
            shard: the server's.
            timeline: of this process.
            receive_buffer_bytes: SO_RCVBUF of the connection; None: the kernel decides.
        """
        self.address = address
        self.shard = shard
        self.incarnation: int | None = None
        self.uses_memory = False
        """Whether payloads lie in the node's memory instead of the messages."""
        self.ended = threading.Event()
        """Set when no more is read."""
        self._loop = loop
        self._receive_buffer_bytes = receive_buffer_bytes
        self._timeline, self._track = timeline, f"push to shard {shard}"
        self._outgoing: asyncio.Queue[tuple[bytes, Push | None] | None] = asyncio.Queue()
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None

    async def connect(self, deadline_s: float, keepalive_s: float) -> bool:
        """Opens a connection; False if the server does not answer in time."""
        if self._channel is None:
            options = rpc.channel_options(keepalive_s, receive_buffer_bytes=self._receive_buffer_bytes)
            self._channel = grpc.aio.insecure_channel(self.address, options=options)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._channel.channel_ready(), deadline_s)
            return True
        return False

    async def talk(self, received: Callable[[ShardStream, Any], None]) -> None:
        """Opens the stream, writes what is queued and hands on what comes, until the server ends the stream.

        Raises:
            grpc.RpcError: the server is gone.
        """
        assert self._channel is not None
        self._call = rpc.stub(self._channel, rpc.AGGREGATOR, "Exchange", reader=read_server_message)()
        writer = asyncio.ensure_future(self._write())
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                received(self, message)
        finally:
            writer.cancel()
            self._call.cancel()
            self.ended.set()

    def put(self, message: bytes, push: Push | None = None) -> None:
        """Queues a message, from any thread; `push`: which contribution it is, if it is one."""
        self._loop.call(self._outgoing.put_nowait, (message, push))

    def end(self) -> None:
        """Ends our side once everything queued is written."""
        self._loop.call(self._outgoing.put_nowait, None)

    async def close(self) -> None:
        """Closes the connection, without a word."""
        if self._channel is not None:
            await self._channel.close(None)

    async def _write(self) -> None:
        while (queued := await self._outgoing.get()) is not None:
            message, push = queued
            start_ns = self._timeline.now_ns()
            try:
                await self._call.write(message)
            except (grpc.RpcError, asyncio.InvalidStateError):
                return  # the reader hears why
            if push is not None:
                self._timeline.add_phase("push", start_ns, push.round, push.bucket, track=self._track)
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            await self._call.done_writing()
