"""Notices an engine that will never go on: a step that hangs, or a device that has failed for good.

A hung engine leaves its process looking alive: it answers pings, and its event loop runs. So the loop looks
after the step. Loading, self-check and calibration, in which a step may take as long as it likes, are over
before there is an executor.
"""

import asyncio
from collections.abc import Callable
from typing import TypeVar

from pdserve.contract.errors import EngineBroken
from pdserve.contract.ports import Clock, EngineExecutor, LayersDone
from pdserve.contract.work import StepBatch, StepCost, StepResult, hung_after_s

T = TypeVar("T")

FROZEN_S = 1.0
"""Whoever wakes so much too late was frozen, and so was the step."""


class WatchedExecutor:
    """An EngineExecutor whose `watch` ends when the engine is broken."""

    def __init__(self, executor: EngineExecutor, cost: StepCost, clock: Clock) -> None:
        self._executor = executor
        self._cost = cost
        self._clock = clock
        self._stepping = asyncio.Event()  # a step runs
        self._patience_s = 0.0  # how long it may take
        self._hung_at = 0.0  # when it counts as hung
        self._failed: asyncio.Event = asyncio.Event()
        self._failure = ""  # of the device, once `_failed` is set

    async def watch(self) -> None:
        """Raises EngineBroken as soon as that is known."""
        hung = asyncio.create_task(self._until_hung())
        failed = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait({hung, failed}, return_when=asyncio.FIRST_COMPLETED)
            raise EngineBroken(self._failure or hung.result())
        finally:
            hung.cancel()
            failed.cancel()

    async def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        self._patience_s = hung_after_s(self._cost.predict_batch_s(batch))
        self._hung_at = self._clock.now() + self._patience_s
        self._stepping.set()
        try:
            return await self._executor.step(batch, layers_done)
        finally:
            self._stepping.clear()

    async def copy(self, job: Callable[[], T]) -> T:
        try:
            return await self._executor.copy(job)
        except Exception as error:
            if _is_device_failure(error):
                self._failure = f"a KV copy failed for good: {error}"
                self._failed.set()
            raise

    async def close(self) -> None:
        await self._executor.close()

    async def _until_hung(self) -> str:
        """Returns what is wrong. Looks again only when the step that ran at the last look would be hung."""
        while True:
            await self._stepping.wait()
            wake_at = self._hung_at
            await self._clock.sleep(wake_at - self._clock.now())
            if self._clock.now() - wake_at > FROZEN_S:
                self._hung_at = self._clock.now() + self._patience_s
            if self._stepping.is_set() and self._clock.now() >= self._hung_at:
                return "an engine step has taken 20 times as long as predicted, and hangs"


def _is_device_failure(error: Exception) -> bool:
    """Whether every later use of the device will fail, too. By name: not every torch has the type."""
    is_typed = any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__)
    return is_typed or (isinstance(error, RuntimeError) and "CUDA error" in str(error))
