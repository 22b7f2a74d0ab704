"""What a server's loop does for the tasks that are left when it has stopped."""

from __future__ import annotations

import asyncio

from ps.daemon import settle

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
