"""What both executors promise: one step at a time, in order, and no return before the work has ended."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

import pytest

from pdserve.clock import LoopClock, VirtualClock, run_virtual
from pdserve.contract.model_work import Roofline
from pdserve.contract.ports import BlockStore, EngineExecutor, LayersDone
from pdserve.contract.work import ModelInfo, StepBatch, StepCost, StepResult
from pdserve.engine.executor import InlineExecutor, Stage, ThreadExecutor

STEP_S = 0.02


class SlowEngine:
    """Notes when steps begin and end. `hold` keeps steps on a thread from ending until it is set."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.threads: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.fail = False

    @property
    def info(self) -> ModelInfo:
        raise NotImplementedError

    @property
    def blocks(self) -> BlockStore:
        raise NotImplementedError

    @property
    def cost(self) -> StepCost:
        return StepCost(STEP_S, 0.0, 0.0)

    @property
    def roofline(self) -> Roofline:
        raise NotImplementedError

    def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        stages = self.stages(batch)
        while True:
            try:
                stage = next(stages)
            except StopIteration as end:
                result: StepResult = end.value
                return result
            if layers_done is not None:
                layers_done(stage.num_layers)

    def stages(self, batch: StepBatch) -> Generator[Stage, None, StepResult]:
        self.threads.add(threading.current_thread().name)
        self.log.append("begin")
        yield Stage(1, STEP_S / 4)
        assert self.hold.wait(10)
        yield Stage(3, STEP_S / 2)
        if self.fail:
            raise ValueError("malformed batch")
        self.log.append("end")
        return StepResult([], STEP_S)


Scenario = Callable[[EngineExecutor, SlowEngine], Awaitable[None]]
BATCH = StepBatch([])


@pytest.fixture(params=["thread", "inline", "inline in virtual time"])
def play(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario with one kind of executor and closes it."""

    async def scene(scenario: Scenario) -> None:
        engine = SlowEngine()
        executor: EngineExecutor
        if request.param == "thread":
            executor = ThreadExecutor(engine)
        else:
            executor = InlineExecutor(engine, VirtualClock() if "virtual" in request.param else LoopClock())
        try:
            await scenario(executor, engine)
        finally:
            engine.hold.set()
            await executor.close()

    runner: Callable[[Coroutine[Any, Any, None]], None]
    runner = run_virtual if "virtual" in request.param else asyncio.run
    return lambda scenario: runner(scene(scenario))


async def begun(log: list[str]) -> None:
    """Another thread appends to `log`, so there is no event of this loop to wait for."""
    while "begin" not in log:  # noqa: ASYNC110
        await asyncio.sleep(0)


def test_steps_run_one_at_a_time_and_in_order(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        results = await asyncio.gather(*(executor.step(BATCH) for _ in range(3)))
        assert [result.seconds for result in results] == [STEP_S] * 3
        assert engine.log == ["begin", "end"] * 3
        assert len(engine.threads) == 1

    play(scenario)


def test_layers_are_told_of_while_the_step_runs_and_never_after_it(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        told: list[tuple[int, str, bool]] = []
        first = asyncio.Event()

        def layers_done(num_layers: int) -> None:
            told.append((num_layers, threading.current_thread().name, step.done()))
            first.set()

        if isinstance(executor, ThreadExecutor):
            engine.hold.clear()
        step = asyncio.create_task(executor.step(BATCH, layers_done))
        await first.wait()
        assert not step.done()
        engine.hold.set()
        await step
        loop_thread = threading.current_thread().name
        assert told == [(1, loop_thread, False), (3, loop_thread, False)]

    play(scenario)


def test_a_step_that_fails_tells_nothing_more(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        told: list[int] = []
        engine.fail = True
        with pytest.raises(ValueError, match="malformed batch"):
            await executor.step(BATCH, told.append)
        assert told == [1, 3]
        await asyncio.sleep(0)
        assert told == [1, 3]

    play(scenario)


def test_an_error_of_the_engine_reaches_the_caller(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        engine.fail = True
        with pytest.raises(ValueError, match="malformed batch"):
            await executor.step(BATCH)
        engine.fail = False
        await executor.step(BATCH)

    play(scenario)


def test_a_cancelled_step_returns_after_it_has_ended(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        engine.hold.clear() if isinstance(executor, ThreadExecutor) else None
        step = asyncio.create_task(executor.step(BATCH))
        await begun(engine.log)
        for _ in range(3):  # cancelling again changes nothing
            step.cancel()
            await asyncio.sleep(0)
            assert engine.log == ["begin", "end"] or not step.done()
        engine.hold.set()
        with pytest.raises(asyncio.CancelledError):
            await step
        assert engine.log == ["begin", "end"]

    play(scenario)


def test_a_cancelled_copy_returns_after_it_has_ended(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        log: list[str] = []
        may_end = threading.Event()
        if not isinstance(executor, ThreadExecutor):
            may_end.set()  # a copy on the loop itself cannot be interrupted at all

        def job() -> None:
            log.append("begin")
            assert may_end.wait(10)
            log.append("end")

        copy = asyncio.create_task(executor.copy(job))
        await begun(log)
        copy.cancel()
        await asyncio.sleep(0)
        assert log == ["begin", "end"] or not copy.done()
        may_end.set()
        await asyncio.gather(copy, return_exceptions=True)
        assert log == ["begin", "end"]

    play(scenario)


def test_copies_return_what_the_job_returns(play: Callable[[Scenario], None]) -> None:
    async def scenario(executor: EngineExecutor, engine: SlowEngine) -> None:
        assert await executor.copy(lambda: 7) == 7
        with pytest.raises(KeyError):
            await executor.copy(lambda: {}["missing"])

    play(scenario)


def test_a_step_takes_its_time_on_the_virtual_clock() -> None:
    async def scene() -> float:
        executor = InlineExecutor(SlowEngine(), VirtualClock())
        await executor.step(BATCH)
        await executor.step(BATCH)
        return VirtualClock().now()

    assert run_virtual(scene()) == pytest.approx(2 * STEP_S)


def test_a_step_that_tells_of_its_layers_takes_the_same_time() -> None:
    async def scene() -> list[tuple[int, float]]:
        clock = VirtualClock()
        told: list[tuple[int, float]] = []
        executor = InlineExecutor(SlowEngine(), clock)
        await executor.step(BATCH, lambda num_layers: told.append((num_layers, clock.now())))
        return [*told, (0, clock.now())]

    at_s = [(1, STEP_S / 4), (3, STEP_S / 2), (0, STEP_S)]
    assert run_virtual(scene()) == [(num_layers, pytest.approx(seconds)) for num_layers, seconds in at_s]


def test_copies_run_beside_steps() -> None:
    async def scene() -> None:
        engine = SlowEngine()
        executor = ThreadExecutor(engine)
        engine.hold.clear()
        step = asyncio.create_task(executor.step(BATCH))
        assert await executor.copy(lambda: "copied") == "copied"
        assert not step.done()
        engine.hold.set()
        await step
        await executor.close()

    asyncio.run(scene())
