"""When the watchdog over an engine barks, and when it does not."""

import asyncio
from collections.abc import Callable

import pytest

from pdserve.clock import VirtualClock, run_virtual
from pdserve.contract.errors import EngineBroken
from pdserve.contract.work import SequenceStep, StepBatch, StepCost, StepResult
from pdserve.engine.executor import InlineExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.engine.watchdog import WatchedExecutor

COST = StepCost(1.0, per_prefill_token_s=0.0, per_decode_sequence_s=0.0)
HUNG_AFTER_S = 20.0
BATCH = StepBatch([SequenceStep(bytes(4), 0, [0])])


class FrozenClock(VirtualClock):
    """Of a process that is frozen for a minute, once, while it sleeps."""

    frozen_s = 60.0

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds + self.frozen_s)
        self.frozen_s = 0.0


def watch(clock: VirtualClock, step_s: float) -> float | None:
    """When the watchdog barks at a step of `step_s`; None when it does not."""
    barked_at: float | None = None

    async def story() -> None:
        nonlocal barked_at
        engine = FakeEngine(8, cost=COST)
        executor = InlineExecutor(engine, VirtualClock())
        engine.step = lambda *_: StepResult([None], step_s)  # type: ignore[method-assign]
        watched = WatchedExecutor(executor, COST, clock)
        watching = asyncio.create_task(watched.watch())
        await asyncio.sleep(5)  # idle before, and that does not count
        stepping = asyncio.create_task(watched.step(BATCH))
        await asyncio.wait({watching, stepping}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            with pytest.raises(EngineBroken, match="hangs"):
                watching.result()
            barked_at = clock.now() - 5
        watching.cancel()
        await asyncio.gather(watching, stepping, return_exceptions=True)

    run_virtual(story())
    return barked_at


def test_a_step_hangs_after_twenty_times_its_prediction() -> None:
    assert watch(VirtualClock(), HUNG_AFTER_S - 1) is None
    assert watch(VirtualClock(), HUNG_AFTER_S + 1) == pytest.approx(HUNG_AFTER_S)


def test_the_time_in_which_the_process_was_frozen_does_not_count() -> None:
    assert watch(FrozenClock(), HUNG_AFTER_S + FrozenClock.frozen_s) is None
    bark_at = watch(FrozenClock(), 1000.0)
    assert bark_at == pytest.approx(2 * HUNG_AFTER_S + FrozenClock.frozen_s)


def test_many_steps_one_after_the_other_do_not_add_up() -> None:
    async def story() -> None:
        watched = WatchedExecutor(
            InlineExecutor(FakeEngine(8, cost=COST), VirtualClock()), COST, VirtualClock()
        )
        watching = asyncio.create_task(watched.watch())
        for _ in range(100):
            await watched.step(BATCH)
        assert not watching.done()
        watching.cancel()

    run_virtual(story())


@pytest.mark.parametrize(
    ("error", "is_broken"),
    [(RuntimeError("CUDA error: unspecified launch failure"), True), (OSError("the peer is gone"), False)],
)
def test_a_copy_that_fails_breaks_the_engine_only_when_its_device_has_failed(
    error: Exception, is_broken: bool
) -> None:
    async def story() -> None:
        watched = WatchedExecutor(InlineExecutor(FakeEngine(8), VirtualClock()), COST, VirtualClock())
        watching = asyncio.create_task(watched.watch())
        with pytest.raises(type(error)):
            await watched.copy(_raising(error))
        await asyncio.sleep(0)
        await asyncio.sleep(1)
        assert watching.done() == is_broken
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)

    run_virtual(story())


def _raising(error: Exception) -> Callable[[], None]:
    def job() -> None:
        raise error

    return job
