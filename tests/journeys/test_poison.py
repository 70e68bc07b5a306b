"""Requests that kill the worker that computes them are found out, and nobody else pays for it."""

import asyncio

import pytest

from pdserve.contract.errors import Poisonous
from pdserve.contract.messages import Role
from pdserve.contract.ports import EngineExecutor, LayersDone
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import StepBatch, StepResult
from pdserve.engine.executor import InlineExecutor
from pdserve.engine.fake_engine import FakeEngine
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.memory_system import MemorySystem, greedy

POISON = [999, 5, 999]


class PoisonedExecutor(InlineExecutor):
    """The process dies in a step that computes POISON as a part of a prompt."""

    async def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        if any(pack_tokens(POISON) in sequence.tokens for sequence in batch.sequences):
            raise RuntimeError("CUDA error: device-side assert triggered")
        return await super().step(batch, layers_done)


class KeptSystem(MemorySystem):
    """Workers that die are replaced half a second later, as by the controller."""

    def __init__(self, num_prefill: int, num_decode: int) -> None:
        self.num_deaths = 0
        self._keeping: list[asyncio.Task[None]] = []
        super().__init__(num_prefill, num_decode, num_blocks=100)

    def executor_of(self, engine: FakeEngine) -> EngineExecutor:
        return PoisonedExecutor(engine, self.clock)

    async def __aenter__(self) -> "KeptSystem":
        await super().__aenter__()
        self._keeping = [asyncio.create_task(self._keep(name)) for name in list(self.workers)]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._keeping:
            task.cancel()
        await super().__aexit__(*exc_info)

    async def die(self, name: str) -> None:
        """The process of `name` dies; returns when another has taken its place."""
        self.num_deaths += 1
        role = self.workers[name].role
        worker = self.kill(name)
        await self.clock.sleep(0.5)
        await self.bury_dead(worker)
        await self.start_worker(name, role)
        self.push_members()

    async def bury_dead(self, worker: object) -> None:
        await worker.stop()  # type: ignore[attr-defined]
        assert worker.ledger.owners() == []  # type: ignore[attr-defined]

    async def _keep(self, name: str) -> None:
        while True:
            try:
                await self.workers[name].ended()
            except RuntimeError:
                await self.die(name)
            else:
                await until(lambda: name in self.workers)  # somebody else replaces it


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(2, 2), (1, 1), (0, 2), (0, 1)])
def test_a_poison_request_is_condemned_alone_and_the_others_live(num_prefill: int, num_decode: int) -> None:
    async def story() -> None:
        async with KeptSystem(num_prefill, num_decode) as system:
            prompts = [prompt_of(30, seed=i) for i in range(8)]
            tasks = [asyncio.create_task(system.generate(p, greedy(60))) for p in prompts]
            await system.clock.sleep(0.02)
            with pytest.raises(Poisonous, match="do not send it again"):
                await system.generate([*prompt_of(20, seed=50), *POISON, 1], greedy(10))
            assert system.num_deaths == 3
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(60)) for p in prompts]
            assert system.router_metric("router_requests_total", outcome="poisonous") == 1
            await system.until_ready()
            await system.at_rest()

    run_virtual(story())


def test_innocents_that_were_at_two_deaths_run_alone_and_live_on() -> None:
    async def story() -> None:
        async with KeptSystem(0, 1) as system:
            prompts = [prompt_of(30, seed=i) for i in range(5)]
            tasks = [asyncio.create_task(system.generate(p, greedy(200))) for p in prompts]
            for _ in range(2):
                await until(lambda: system.workers["decode-0"].loop.running_sequences == len(prompts))
                await system.die("decode-0")
            late = asyncio.create_task(system.generate(prompt_of(9), greedy(10)))
            await until(lambda: system.router_metric("router_suspects_total") == len(prompts))
            await late
            assert sum(task.done() for task in tasks) < len(prompts)  # it did not wait for all suspects
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(200)) for p in prompts]
            assert late.result() == system.expected(prompt_of(9), greedy(10))
            await system.at_rest()

    run_virtual(story())


def test_a_suspect_does_not_wait_for_long_sequences_and_does_not_keep_the_worker_for_long() -> None:
    async def story() -> None:
        async with KeptSystem(0, 2) as system:
            suspect_prompt, long_prompt = prompt_of(30, seed=1), prompt_of(8, seed=2)
            suspect = asyncio.create_task(system.generate(suspect_prompt, greedy(300)))
            for _ in range(2):
                await until(lambda: any(w.loop.running_sequences for w in system.workers.values()))
                (busy,) = [name for name, w in system.workers.items() if w.loop.running_sequences]
                await system.die(busy)
                await system.until_ready()
            others = [asyncio.create_task(system.generate(long_prompt, greedy(300))) for _ in range(4)]
            assert await suspect == system.expected(suspect_prompt, greedy(300))
            assert await asyncio.gather(*others) == [system.expected(long_prompt, greedy(300))] * 4
            await system.at_rest()

    run_virtual(story())


def test_a_router_that_is_cut_off_from_a_worker_condemns_nobody() -> None:
    async def story() -> None:
        async with KeptSystem(0, 1) as system:
            prompt = prompt_of(30)
            task = asyncio.create_task(system.generate(prompt, greedy(300)))
            for _ in range(2):
                await until(lambda: system.workers["decode-0"].loop.running_sequences == 1)
                await system.die("decode-0")
            await until(lambda: system.workers["decode-0"].loop.running_sequences == 1)
            system.network.cut("router-0", "decode-0")
            await system.clock.sleep(6)
            system.network.heal("router-0", "decode-0")
            assert await task == system.expected(prompt, greedy(300))
            assert system.workers["decode-0"].role is Role.UNSPLIT
            await system.at_rest()

    run_virtual(story())
