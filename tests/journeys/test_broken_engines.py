"""Engines that hang or whose device fails end their worker, and the client gets the same tokens."""

import asyncio

import pytest

from controller.worker import Worker
from pdserve.contract.errors import EngineBroken
from pdserve.contract.ids import WorkerId
from pdserve.contract.ports import EngineExecutor, LayersDone
from pdserve.contract.work import StepBatch, StepResult
from pdserve.engine.executor import InlineExecutor
from pdserve.engine.fake_engine import FakeEngine
from router.fleet import Fate
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, to_its_end
from tests.memory_system import MemorySystem, greedy


class HangingExecutor(InlineExecutor):
    """Once `hangs`, a step ends only when `released`."""

    def __init__(self, engine: FakeEngine, clock: object) -> None:
        super().__init__(engine, clock)  # type: ignore[arg-type]
        self.hangs = False
        self.released = asyncio.Event()

    async def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        if self.hangs:
            await to_its_end(self.released.wait())
        return await super().step(batch, layers_done)


class HangingSystem(MemorySystem):
    def __init__(self, num_prefill: int = 2, num_decode: int = 2) -> None:
        self.executors: list[HangingExecutor] = []
        super().__init__(num_prefill, num_decode)

    def executor_of(self, engine: FakeEngine) -> EngineExecutor:
        self.executors.append(HangingExecutor(engine, self.clock))
        return self.executors[-1]

    def hang(self, name: str) -> HangingExecutor:
        executor = self.executors[list(self.workers).index(name)]
        executor.hangs = True
        return executor

    async def bury_broken(self, name: str, executor: HangingExecutor) -> None:
        """What is left when its process is gone, which it would be a moment later."""
        worker = self.workers.pop(name)
        executor.released.set()
        await worker.stop()
        assert worker.ledger.owners() == []


async def reason_of_end(worker: Worker) -> str:
    with pytest.raises(EngineBroken) as caught:
        await worker.ended()
    return caught.value.info.message


def test_a_worker_that_has_failed_does_not_say_that_it_was_stopped() -> None:
    """Its end would be excused, and a request that kills workers would go on to the next."""

    async def story() -> None:
        async with HangingSystem() as system:
            task = asyncio.create_task(system.generate(prompt_of(30), greedy(20)))
            await system.clock.sleep(0.012)
            busy = [name for name, worker in system.workers.items() if worker.ledger.owners()]
            (broken,) = [name for name in busy if name.startswith("decode")]
            who = system.router.fleet.workers[WorkerId(broken)].identity
            executor = system.hang(broken)
            await reason_of_end(system.workers[broken])
            system.push_members()  # the last that it says of itself
            await system.clock.sleep(1)
            assert system.router.fleet.fate(who) is Fate.UNKNOWN
            await system.bury_broken(broken, executor)
            system.push_members()
            assert system.router.fleet.fate(who) is Fate.DEAD
            assert await task == system.expected(prompt_of(30), greedy(20))
            await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("broken", ["prefill-0", "decode-0"])
def test_a_worker_whose_engine_hangs_ends_itself(broken: str) -> None:
    async def story() -> None:
        async with HangingSystem() as system:
            prompts = [prompt_of(30, seed=i) for i in range(8)]
            tasks = [asyncio.create_task(system.generate(p, greedy(20))) for p in prompts]
            await system.clock.sleep(0.012)
            executor = system.hang(broken)
            assert "hangs" in await reason_of_end(system.workers[broken])
            assert 10 <= system.clock.now() < 11
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(20)) for p in prompts]
            assert system.clock.now() < 12
            await system.bury_broken(broken, executor)
            await system.at_rest()

    run_virtual(story())


def test_a_device_that_fails_in_a_copy_ends_the_worker() -> None:
    async def story() -> None:
        async with MemorySystem(num_decode=2) as system:

            def fail(*_: object) -> None:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            system.engines["decode-0"].blocks.write = fail  # type: ignore[method-assign]
            prompts = [prompt_of(30, seed=i) for i in range(4)]
            outputs = await asyncio.gather(*(system.generate(p, greedy(20)) for p in prompts))
            assert outputs == [system.expected(p, greedy(20)) for p in prompts]
            assert "CUDA error" in await reason_of_end(system.workers["decode-0"])
            worker = system.workers.pop("decode-0")
            await worker.stop()
            await system.at_rest()

    run_virtual(story())
