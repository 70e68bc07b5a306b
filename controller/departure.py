"""How a worker leaves in good order: it finishes what it can in time, and gives back the rest."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from pdserve.contract.ports import Clock
from pdserve.tasks import task_scope


class Departure:
    """Of one worker, from the first `call` until nothing is left."""

    def __init__(
        self, clock: Clock, give_back: Callable[[], None], emptied: Callable[[], Awaitable[None]]
    ) -> None:
        """`give_back` ends all that the worker still has, `emptied` returns when it has nothing."""
        self._clock = clock
        self._give_back = give_back
        self._emptied = emptied
        self._deadline_at: float | None = None
        self._called = asyncio.Event()

    def call(self, deadline_s: float) -> None:
        """The worker is to leave within that time. Of several calls the earliest deadline counts."""
        deadline_at = self._clock.now() + deadline_s
        if self._deadline_at is None or deadline_at < self._deadline_at:
            self._deadline_at = deadline_at
            self._called.set()

    async def over(self) -> None:
        """Wait until it has been called and nothing is left."""
        await self._called.wait()
        async with task_scope() as tasks:
            timer = tasks.create_task(self._give_back_in_time())
            await self._emptied()
            timer.cancel()

    async def _give_back_in_time(self) -> None:
        while (left_s := self._left_s()) > 0:
            self._called.clear()
            with suppress(TimeoutError):
                async with self._clock.timeout(left_s):
                    await self._called.wait()
        self._give_back()

    def _left_s(self) -> float:
        assert self._deadline_at is not None, "nobody has called"
        return self._deadline_at - self._clock.now()
