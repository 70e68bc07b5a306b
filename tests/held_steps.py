"""Stops a worker's engine before its steps, so that a test finds it in the very state that it is about."""

import asyncio
import threading

from controller.worker import Worker
from pdserve.contract.ports import LayersDone
from pdserve.contract.work import StepBatch, StepResult


class HeldSteps:
    """The engine takes `num_free` steps; before the next one it stands still until `release`."""

    def __init__(self, worker: Worker, num_free: int) -> None:
        self._engine = worker._executor._executor._engine  # type: ignore[attr-defined]
        self._step = self._engine.step
        self._num_free = num_free
        self._go = threading.Event()
        self._stands = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._engine.step = self._held_step

    async def standing(self) -> None:
        """Wait until a step is held."""
        await self._stands.wait()

    def release(self) -> None:
        """Let it run, and not be held again."""
        self._engine.step = self._step
        self._go.set()

    def _held_step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """On the engine's thread."""
        if self._num_free:
            self._num_free -= 1
        else:
            self._loop.call_soon_threadsafe(self._stands.set)
            self._go.wait()
        result: StepResult = self._step(batch, layers_done)
        return result
