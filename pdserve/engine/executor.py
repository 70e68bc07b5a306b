"""Runs an engine beside an event loop: on two threads, or inline in virtual time."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

from pdserve.contract.ports import Clock, Engine, LayersDone
from pdserve.contract.work import StepBatch, StepResult

T = TypeVar("T")


class ThreadExecutor:
    """Steps on one thread, KV copies on another, so that a copy hides behind a step."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._steps = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="kv-transfer")

    async def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """Run one step. Even when cancelled it does not return before the step has ended."""
        tell = None if layers_done is None else _on_this_loop(layers_done)
        return await _run_to_its_end(self._steps, lambda: self._engine.step(batch, tell))

    async def copy(self, job: Callable[[], T]) -> T:
        """Run a KV copy. Even when cancelled it does not return before the copy has ended."""
        return await _run_to_its_end(self._copies, job)

    async def close(self) -> None:
        """Wait for what runs and end both threads."""
        for threads in (self._steps, self._copies):
            await asyncio.to_thread(threads.shutdown)


class Stage(NamedTuple):
    """Layers [0, num_layers) of a step are computed `at_s` seconds after its beginning."""

    num_layers: int
    at_s: float


class StagedEngine(Engine, Protocol):
    """An engine that can stop between groups of layers, so that virtual time can pass there."""

    def stages(self, batch: StepBatch) -> Generator[Stage, None, StepResult]:
        """The same as `step`, bit by bit: writes the KV of some layers and yields, until all is done."""
        ...


class InlineExecutor:
    """Runs the engine on the event loop itself; a step then takes its predicted time on `clock`."""

    def __init__(self, engine: StagedEngine, clock: Clock) -> None:
        self._engine = engine
        self._clock = clock
        self._stepping = asyncio.Lock()

    async def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """Run one step. Even when cancelled it does not return before the step has ended."""
        async with self._stepping:
            return await _outlast_cancellation(asyncio.ensure_future(self._timed_step(batch, layers_done)))

    async def copy(self, job: Callable[[], T]) -> T:
        """Run a KV copy, at once."""
        return job()

    async def close(self) -> None:
        """Nothing outlives a call."""

    async def _timed_step(self, batch: StepBatch, layers_done: LayersDone | None) -> StepResult:
        if layers_done is None:
            result = self._engine.step(batch)
            await self._clock.sleep(result.seconds)
            return result
        return await self._step_in_stages(batch, layers_done)

    async def _step_in_stages(self, batch: StepBatch, layers_done: LayersDone) -> StepResult:
        stages = self._engine.stages(batch)
        passed_s = 0.0
        while True:
            try:
                stage = next(stages)
            except StopIteration as end:
                result: StepResult = end.value
                await self._clock.sleep(result.seconds - passed_s)
                return result
            await self._clock.sleep(stage.at_s - passed_s)
            passed_s = stage.at_s
            layers_done(stage.num_layers)


def _on_this_loop(layers_done: LayersDone) -> LayersDone:
    """Told on any thread, tells on the loop that runs now; before the end of the step, which comes the same
    way."""
    loop = asyncio.get_running_loop()

    def tell(num_layers: int) -> None:
        loop.call_soon_threadsafe(layers_done, num_layers)

    return tell


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
