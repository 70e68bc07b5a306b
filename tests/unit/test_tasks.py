"""Tasks that live and die together."""

# ruff: noqa: PT012  # a scope is a block

import asyncio
import contextlib

import pytest

from pdserve.contract.errors import StreamBroken
from pdserve.tasks import outlast, task_scope


async def test_the_first_failure_ends_all_tasks_and_is_raised_as_itself() -> None:
    async def fail() -> None:
        raise StreamBroken("gone")

    with pytest.raises(StreamBroken, match="gone"):
        async with task_scope() as tasks:
            other = tasks.create_task(asyncio.Event().wait())
            tasks.create_task(fail())
    assert other.cancelled()


async def test_who_is_cancelled_stays_cancelled_when_a_task_fails_meanwhile() -> None:
    async def fail_when_cancelled() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        raise StreamBroken("gone")

    async def scope() -> None:
        async with task_scope() as tasks:
            tasks.create_task(fail_when_cancelled())

    running = asyncio.create_task(scope())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_the_block_itself_is_interrupted_and_its_error_ends_the_tasks() -> None:
    async def fail() -> None:
        raise StreamBroken("gone")

    with pytest.raises(StreamBroken):
        async with task_scope() as tasks:
            tasks.create_task(fail())
            await asyncio.Event().wait()
    assert not asyncio.current_task().cancelling()  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        async with task_scope() as tasks:
            other = tasks.create_task(asyncio.Event().wait())
            raise KeyError("of the block")
    assert other.cancelled()


async def test_a_task_that_fails_as_the_block_ends_interrupts_nobody_later() -> None:
    async def fail() -> None:
        raise StreamBroken("gone")

    with pytest.raises(StreamBroken):
        async with task_scope() as tasks:
            task = tasks.create_task(fail())
            await asyncio.wait([task])
    await asyncio.sleep(0)


async def test_tasks_are_cancelled_in_the_order_in_which_they_were_made() -> None:
    ended: list[int] = []

    async def wait(number: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(number)

    with pytest.raises(KeyError):
        async with task_scope() as tasks:
            for number in range(20):
                tasks.create_task(wait(number))
            await asyncio.sleep(0)
            raise KeyError
    assert ended == list(range(20))


async def test_who_is_cancelled_twice_still_waits_for_what_it_must_outlast() -> None:
    go = asyncio.Event()
    lasting = asyncio.create_task(go.wait())
    waiting = asyncio.create_task(outlast(lasting))
    for _ in range(2):
        await asyncio.sleep(0)
        waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
