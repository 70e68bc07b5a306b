"""Runs an engine beside an event loop: on two threads, or inline in virtual time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from pdserve.contract.ports import Clock, Engine
from pdserve.contract.work import StepBatch, StepResult

T = TypeVar("T")


class ThreadExecutor:
    """Steps on one thread, KV copies on another, so that a copy hides behind a step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="kv-transfer")

    async def step(self, batch: StepBatch) -> StepResult:
        """Run one step. Even when cancelled it does not return before the step has ended."""
        return await _run_to_its_end(self._steps, lambda: self._engine.step(batch))

    async def copy(self, job: Callable[[], T]) -> T:
        """Run a KV copy. Even when cancelled it does not return before the copy has ended."""
        return await _run_to_its_end(self._copies, job)

    async def close(self) -> None:
        """Wait for what runs and end both threads."""
        for threads in (self._steps, self._copies):
            await asyncio.to_thread(threads.shutdown)


class InlineExecutor:
    """Runs the engine on the event loop itself; a step then takes its predicted time on `clock`."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._stepping = asyncio.Lock()

    async def step(self, batch: StepBatch) -> StepResult:
        """Run one step. Even when cancelled it does not return before the step has ended."""
        async with self._stepping:
            return await _outlast_cancellation(asyncio.ensure_future(self._timed_step(batch)))

    async def copy(self, job: Callable[[], T]) -> T:
        """Run a KV copy, at once."""
        return job()

    async def close(self) -> None:
        """Nothing outlives a call."""

    async def _timed_step(self, batch: StepBatch) -> StepResult:
        result = self._engine.step(batch)
        await self._clock.sleep(result.seconds)
        return result


async def _run_to_its_end(threads: Executor, job: Callable[[], T]) -> T:
    return await _outlast_cancellation(asyncio.get_running_loop().run_in_executor(threads, job))


async def _outlast_cancellation(running: "asyncio.Future[T]") -> T:
    """The result of `running`. A cancellation is raised only after `running` has ended."""
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            result = await asyncio.shield(running)
        except asyncio.CancelledError as error:
            if running.done():
                raise
            cancelled = error
        else:
            if cancelled is not None:
                raise cancelled
            return result
