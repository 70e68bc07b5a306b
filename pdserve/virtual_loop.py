"""An event loop whose time stands still while anything is ready, and then jumps to the next timer."""

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import TypeVarTuple, Unpack

Arguments = TypeVarTuple("Arguments")

MIN_TIMERS = 1000
"""With fewer timers it does not matter how many of them are cancelled."""


class VirtualDeadlock(RuntimeError):
    """Nothing is ready and no timer is set: the simulated system can never move again."""


class VirtualLoop(asyncio.BaseEventLoop):
    """Callbacks run in the order in which they became ready, timers in that of their time and then of being
    set, so the same program runs in the same way every time. No thread and no socket may be used."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._handles: deque[asyncio.Handle] = deque()  # ready
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []  # a heap
        self._order = itertools.count()
        self._sweep_at = MIN_TIMERS
        self._stops = False

    def time(self) -> float:
        return self._now

    def stop(self) -> None:
        super().stop()
        self._stops = True

    def run_forever(self) -> None:
        """Until `stop`. Raises VirtualDeadlock."""
        self._stops = False
        super().run_forever()

    def close(self) -> None:
        super().close()
        self._handles.clear()
        self._timers.clear()

    def call_soon(
        self,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._handles.append(handle)
        return handle

    def call_soon_threadsafe(
        self,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.Handle:
        """From the handler of a signal, which runs on this thread."""
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self,
        delay: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Arguments]], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        if len(self._timers) >= self._sweep_at:
            self._sweep()
        return timer

    def _run_once(self) -> None:
        """What `run_forever` of the base class repeats."""
        if not self._handles:
            self._jump()
        while self._handles and not self._stops:
            handle = self._handles.popleft()
            if not handle.cancelled():
                handle._run()

    def _jump(self) -> None:
        """To the time of the next timer; it and all others of that time become ready."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
        if not timers:
            raise VirtualDeadlock("no task is ready and no timer is set")
        self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            self._handles.append(heapq.heappop(timers)[2])

    def _sweep(self) -> None:
        """Throw cancelled timers away: timeouts leave many."""
        self._timers = [entry for entry in self._timers if not entry[2].cancelled()]
        heapq.heapify(self._timers)
        self._sweep_at = max(MIN_TIMERS, 2 * len(self._timers))
