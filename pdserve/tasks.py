"""Structured concurrency: tasks that live and die together."""

import asyncio
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


def task_scope() -> "TaskScope":
    """A new scope: `async with task_scope() as tasks`."""
    return TaskScope()


class TaskScope:
    """Ends when all its tasks have ended. The first failure, of a task or of the block, ends the others and
    is raised as itself.

    asyncio.TaskGroup with two differences. Whoever is cancelled stays cancelled, also when a task fails while
    it is being cancelled too: the group would raise that failure and forget the cancellation. And tasks are
    cancelled in the order in which they were made, so that runs in virtual time can be reproduced.
    """

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._owner: asyncio.Task[Any] | None = None
        self._num_cancels = 0  # of the owner, before this scope
        self._error: BaseException | None = None
        self._interrupted = False  # the block, by us, because a task has failed
        self._leaving = False

    async def __aenter__(self) -> "TaskScope":
        self._owner = asyncio.current_task()
        assert self._owner is not None, "a task scope belongs to a task"
        self._num_cancels = self._owner.cancelling()
        return self

    def create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `work` within the scope."""
        task = asyncio.ensure_future(work)
        self._tasks[task] = None
        task.add_done_callback(self._task_ended)
        return task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        cancelled = await self._take_back_interruption(error)
        if error is not None:
            self._cancel_tasks()
            if self._error is None and not isinstance(error, asyncio.CancelledError):
                self._error = error
        cancelled |= await self._all_ended()
        if cancelled:
            raise asyncio.CancelledError
        if self._error is not None and self._error is not error:
            raise self._error

    async def _take_back_interruption(self, error: BaseException | None) -> bool:
        """Whether somebody else than we has cancelled the owner."""
        assert self._owner is not None
        if self._interrupted:
            self._owner.uncancel()
            if not isinstance(error, asyncio.CancelledError):  # the block ended before it was interrupted
                await self._absorb_cancellation()
        elif isinstance(error, asyncio.CancelledError):
            return True
        return self._owner.cancelling() > self._num_cancels

    @staticmethod
    async def _absorb_cancellation() -> None:
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            return

    async def _all_ended(self) -> bool:
        """Wait for all tasks; says whether the owner was cancelled meanwhile."""
        cancelled = False
        while self._tasks:
            try:
                await asyncio.wait(self._tasks)
            except asyncio.CancelledError:
                cancelled = True
                self._cancel_tasks()
        return cancelled

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        del self._tasks[task]
        error = None if task.cancelled() else task.exception()
        if error is None or self._error is not None:
            return
        self._error = error
        self._cancel_tasks()
        if not self._leaving and self._owner is not None:
            self._interrupted = True
            self._owner.cancel()

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            task.cancel()


async def outlast(*tasks: asyncio.Task[Any]) -> None:
    """Wait until tasks have ended, however often the caller is cancelled meanwhile; that is raised then. What
    the tasks raise is dropped."""
    cancelled = False
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError:
            cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that nobody reports it as lost
    if cancelled:
        raise asyncio.CancelledError


async def cancel_and_wait(*tasks: asyncio.Task[object]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is dropped."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
