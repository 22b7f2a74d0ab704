"""What a server's loop does for the tasks that are left when it has stopped."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from common.events import Emitter
from ps import daemon
from ps.daemon import ServerOptions, settle
from ps.outcome import Outcome
from tests.support import job

WAIT_S = 60.0


def test_a_task_that_is_about_to_end_ends_by_itself_and_is_not_cancelled() -> None:
    ended: list[str] = []

    async def last_words() -> None:
        for _ in range(20):  # gRPC needs some turns of the loop between the end of a call and that of its tasks
            await asyncio.sleep(0)
        ended.append("by itself")

    async def main() -> None:
        task = asyncio.ensure_future(last_words())
        await settle(WAIT_S)
        assert task.done()

    asyncio.run(main())
    assert ended == ["by itself"]


def test_a_task_that_does_not_end_is_given_up() -> None:
    async def main() -> asyncio.Task[bool]:
        task = asyncio.create_task(asyncio.Event().wait())
        await settle(0.01)
        assert not task.done()
        return task

    assert asyncio.run(main()).cancelled()


@pytest.mark.parametrize(
    "serve",
    [daemon._run, lambda options, emit: daemon._run_shard(options, io.StringIO(), emit)],
    ids=["server", "shard"],
)
def test_a_server_lets_what_its_end_has_left_end(
    monkeypatch: pytest.MonkeyPatch, serve: Callable[[ServerOptions, Emitter], Awaitable[int]]
) -> None:
    ended: list[str] = []

    async def last_words() -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        ended.append("by itself")

    class Stopped:
        """A server that is over at once and leaves a task behind, as gRPC may."""

        def __init__(self, *_: Any) -> None:
            pass

        async def start(self) -> None:
            pass

        async def serve(self) -> Outcome:
            self.task = asyncio.ensure_future(last_words())
            return Outcome(exit_code=75, text="enough")

        def end(self, outcome: Outcome) -> None:
            pass

    monkeypatch.setattr(daemon, "Server", Stopped)

    async def main() -> int:
        return await serve(ServerOptions(spec=job()), Emitter("server", stream=io.StringIO()))

    assert asyncio.run(main()) == 75
    assert ended == ["by itself"]
