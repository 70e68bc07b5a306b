"""What a simulated process stands on: a clock that stops with it and an executor that goes wrong with it."""

import asyncio
from collections.abc import Callable
from random import Random
from types import TracebackType
from typing import Any, TypeVar

from pdserve.contract.work import StepResult
from pdserve.engine.executor import InlineExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.rpc.memory_rpc import MemoryNetwork

T = TypeVar("T")


class EngineFailure(RuntimeError):
    """A step that fails on purpose, as with a CUDA error."""


class HostClock:
    """Virtual time as a process on `host` sees it: while it is frozen its timers wait."""

    def __init__(self, network: MemoryNetwork, host: str) -> None:
        self._network = network
        self._host = host
        self._loop = asyncio.get_running_loop()

    def now(self) -> float:
        return self._loop.time()

    def unix_time(self) -> float:
        return self.now()

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        over: asyncio.Future[None] = self._loop.create_future()
        timer = self.call_later(seconds, lambda: over.done() or over.set_result(None))
        try:
            await over
        except asyncio.CancelledError:
            timer.cancel()
            raise

    def timeout(self, seconds: float | None) -> "HostTimeout":
        return HostTimeout(self, seconds)

    def call_later(self, seconds: float, callback: Callable[[], object]) -> asyncio.TimerHandle:
        return self._loop.call_later(max(0.0, seconds), self._network.happen, self._host, callback)


class HostTimeout:
    """asyncio.timeout, on a host's clock. The whole run is full of them, so it has only the parts that the
    rooms use."""

    def __init__(self, clock: HostClock, seconds: float | None) -> None:
        self._clock = clock
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None  # inside
        self._num_cancels = 0  # of the task, before this timeout
        self._expired = False

    async def __aenter__(self) -> "HostTimeout":
        self._task = asyncio.current_task()
        assert self._task is not None, "a timeout belongs to a task"
        self._num_cancels = self._task.cancelling()
        if self._seconds is not None:
            self._timer = self._clock.call_later(self._seconds, self._expire)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
        if self._expired and task is not None:
            was_only_us = task.uncancel() <= self._num_cancels
            if was_only_us and kind is asyncio.CancelledError:
                raise TimeoutError from error

    def _expire(self) -> None:
        """Also called late, by a frozen host that wakes after the block has ended."""
        if self._task is not None:
            self._expired = True
            self._task.cancel()


class SimulatedExecutor(InlineExecutor):
    """Steps and copies touch the blocks only some time after they were asked to and end some time later, as
    on real threads: whoever gives blocks back too early gets wrong tokens. An engine can hang, or fail."""

    def __init__(
        self,
        engine: FakeEngine,
        clock: HostClock,
        random: Random,
        late_s: float,
        step_ended: Callable[[], None],
    ) -> None:
        super().__init__(engine, clock)
        self.fails = False
        self.copy_s = 0.0
        """How much longer than usual a copy takes."""
        self._random = random
        self._late_s = late_s
        self._step_ended = step_ended
        self._moving = asyncio.Event()
        self._moving.set()
        self._dead = False
        self._copying = asyncio.Lock()

    def hang(self) -> None:
        """The running step never ends, nor does another."""
        self._moving.clear()

    @property
    def hangs(self) -> bool:
        """And a step waits."""
        return not self._moving.is_set() and self._stepping.locked()

    def die(self) -> None:
        """The process is gone; who still waits for a step or copy need not."""
        self._dead = True
        self._moving.set()

    async def copy(self, job: Callable[[], T]) -> T:
        """Run a KV copy. Even when cancelled it does not return before the copy has ended."""
        if not self._late_s and not self.copy_s:
            return job()
        async with self._copying:
            return await _to_its_end(self._late_copy(job))

    async def _timed_step(self, *step: Any) -> StepResult:
        if self._late_s:
            await self._clock.sleep(self._random.random() * self._late_s)
        await self._moving.wait()
        if self.fails or self._dead:
            raise EngineFailure("CUDA error: an illegal memory access was encountered")
        result = await super()._timed_step(*step)
        await self._moving.wait()
        self._step_ended()
        return result

    async def _late_copy(self, job: Callable[[], T]) -> T:
        await self._clock.sleep(self._random.random() * self._late_s + self.copy_s / 2)
        result = job()
        await self._clock.sleep(self._random.random() * self._late_s + self.copy_s / 2)
        return result


async def _to_its_end(work: Any) -> Any:
    running = asyncio.ensure_future(work)
    cancelled = False
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
    return running.result()
