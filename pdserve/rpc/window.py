"""A bounded queue of messages in one direction of one stream."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from pdserve.contract.errors import StreamBroken

T = TypeVar("T")

Waiters = dict["asyncio.Future[None]", "asyncio.Task[object] | None"]
Tasks = set["asyncio.Task[object] | None"]


class Window(Generic[T]):
    """At most `capacity` messages that were put and not yet got; `put` waits for room.

    Each end is broken for itself. A cancelled `put` has put nothing, a cancelled `get` has taken nothing.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._arrived: deque[T] = deque()
        self._num_travelling = 0
        self._entry_broken: StreamBroken | None = None
        self._exit_broken: StreamBroken | None = None
        self._putters: Waiters = {}
        self._getters: Waiters = {}

    async def put(self, message: T) -> None:
        """Wait for room, then let the message arrive at once. Raises StreamBroken."""
        await self.reserve()
        self.arrive(message)

    async def reserve(self) -> None:
        """Wait for room and take it for a message that will `arrive` later. Raises StreamBroken."""
        while self._entry_broken is None and len(self._arrived) + self._num_travelling >= self._capacity:
            await _wait_in(self._putters)
        if self._entry_broken is not None:
            raise _anew(self._entry_broken)
        self._num_travelling += 1

    def expect(self, num_more: int) -> None:
        """A carrier that doubles messages brings `num_more` for which no room was reserved, or, below 0, has
        lost some."""
        self._num_travelling += num_more
        if num_more < 0:
            _wake(self._putters)

    def arrive(self, message: T) -> None:
        """The message for which room was reserved is here."""
        self._num_travelling -= 1
        if self._exit_broken is None:
            self._arrived.append(message)
            _wake(self._getters)

    async def get(self) -> T:
        """The next message. Raises StreamBroken when the exit is broken and all that arrived was got."""
        while not self._arrived:
            if self._exit_broken is not None:
                raise _anew(self._exit_broken)
            await _wait_in(self._getters)
        _wake(self._putters)
        return self._arrived.popleft()

    def break_entry(self, broken: StreamBroken) -> Tasks:
        """Every `put` raises the like of `broken` from now on. Returns the tasks that were waiting in one."""
        self._entry_broken = self._entry_broken or broken
        _wake(self._putters)
        return set(self._putters.values())

    def break_exit(self, broken: StreamBroken, *, drop: bool) -> Tasks:
        """Nothing arrives any more; `drop` also forgets what has arrived. Returns the tasks that were
        waiting in a `get` which now raises the like of `broken`."""
        self._exit_broken = self._exit_broken or broken
        if drop:
            self._arrived.clear()
        _wake(self._getters)
        return set() if self._arrived else set(self._getters.values())


def _anew(broken: StreamBroken) -> StreamBroken:
    """For each who is told one of its own: raising adds to an exception where it came by."""
    return type(broken)(str(broken))


async def _wait_in(waiters: Waiters) -> None:
    woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters[woken] = asyncio.current_task()
    try:
        await woken
    finally:
        del waiters[woken]


def _wake(waiters: Waiters) -> None:
    for woken in waiters:
        if not woken.done():
            woken.set_result(None)
