"""Faults of the whole system in one process and in virtual time: single stories, and storms of everything."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, TypeVar

import pytest

from controller.worker import Worker
from pdserve.clock import run_virtual as run_virtual_to_the_end
from pdserve.contract.errors import DeadlineExceeded, Poisonous
from pdserve.contract.messages import Message
from pdserve.contract.ports import LayersDone
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.contract.work import StepBatch, StepResult
from pdserve.engine.executor import InlineExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.handoff.prefill_job import JobState
from pdserve.rpc.memory_rpc import MemoryNetwork
from router.journey import DEATHS_OF_A_SUSPECT
from router.requests import GenerateRequest
from tests.memory_system import MemorySystem, greedy

T = TypeVar("T")

BLOCK = 4  # of the fake engine; its chunks are 8 tokens
NUM_STORMS = int(os.environ.get("PDSERVE_STORMS", "60"))
FIRST_STORM = int(os.environ.get("PDSERVE_FIRST_STORM", "0"))


def run_virtual(story: Coroutine[Any, Any, None], at_most_s: float = 120) -> None:
    """Run a story; one that is not over after `at_most_s` virtual seconds hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(at_most_s):
            await story

    run_virtual_to_the_end(bounded())


def prompt_of(length: int, seed: int = 1) -> list[int]:
    random = Random(seed)
    return [random.randrange(1, 999) for _ in range(length)]


async def until(condition: Callable[[], bool]) -> None:
    """Looks four times a virtual millisecond."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.00025)


class LateExecutor(InlineExecutor):
    """Steps and copies touch the blocks only some time after they were asked to, as on real threads, and end
    some time later: whoever gives blocks back too early gets wrong tokens."""

    def __init__(self, engine: FakeEngine, clock: Any, delay_s: Callable[[], float]) -> None:
        super().__init__(engine, clock)
        self._delay_s = delay_s

    async def copy(self, job: Callable[[], T]) -> T:
        return await to_its_end(self._late_copy(job))

    async def _timed_step(self, batch: StepBatch, layers_done: LayersDone | None) -> StepResult:
        await self._clock.sleep(self._delay_s())
        return await super()._timed_step(batch, layers_done)

    async def _late_copy(self, job: Callable[[], T]) -> T:
        await self._clock.sleep(self._delay_s())
        result = job()
        await self._clock.sleep(self._delay_s())
        return result


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """As an EngineExecutor must: a cancellation is raised only when the work has ended."""
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


class StormySystem(MemorySystem):
    """A small system of random shape in which messages, steps and copies are late and copies sometimes
    corrupt."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.num_prefill = random.choice([0, 1, 1, 2, 2])
        self.num_decode = random.choice([1, 2, 2])
        self.capacity_blocks = random.randrange(10, 40)
        self._corrupt_share = random.choice([0, 0, 0.05])
        self._longest_delay_s = random.choice([0.0, 0.001, 0.01])
        self._longest_latency_s = random.choice([0.0, 0.001, 0.02])
        super().__init__(
            num_prefill=self.num_prefill,
            num_decode=self.num_decode,
            num_blocks=self.capacity_blocks,
            seed=random.randrange(2**32),
            network=MemoryNetwork(self._latency),
            eos_token_ids=tuple(range(15)),
        )

    def executor_of(self, engine: FakeEngine) -> LateExecutor:
        write = engine.blocks.write

        def write_sometimes_wrongly(block_ids: Any, layers: Any, payload: memoryview) -> None:
            if self.random.random() < self._corrupt_share:
                payload = memoryview(bytes([payload[0] ^ 1]) + bytes(payload[1:]))
            write(block_ids, layers, payload)

        engine.blocks.write = write_sometimes_wrongly  # type: ignore[method-assign]
        return LateExecutor(engine, self.clock, lambda: self.random.random() * self._longest_delay_s)

    def _latency(self, source: str, target: str, message: Message | None) -> float:
        return self.random.random() * self._longest_latency_s


class SlowCopies(MemorySystem):
    """Every KV copy takes 50 ms."""

    def executor_of(self, engine: FakeEngine) -> LateExecutor:
        executor = LateExecutor(engine, self.clock, lambda: 0.025)
        executor.step = InlineExecutor(engine, self.clock).step  # type: ignore[method-assign]
        return executor


def test_a_client_that_reads_late_does_not_cancel_somebody_else() -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=0) as system:
            request = GenerateRequest(pack_tokens(prompt_of(9)), greedy(30), seed=1)
            slow = system.router.generate(system.router.new_request_id(), request)
            await anext(slow)
            system.network.cut(
                "router-0", "decode-0"
            )  # its Session breaks, and the next numbers from 1 again
            await system.clock.sleep(6)
            system.network.heal("router-0", "decode-0")
            await system.clock.sleep(3)
            await system.until_ready()
            prompt = prompt_of(20, seed=2)
            other = asyncio.create_task(system.generate(prompt, greedy(100)))
            await system.clock.sleep(0.05)
            await slow.aclose()
            assert await other == system.expected(prompt, greedy(100))
            await system.at_rest()

    run_virtual(story())


def test_requests_that_pin_cached_prefixes_do_not_wait_for_each_other() -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=0, num_blocks=20) as system:
            prefixes = [prompt_of(32, seed=i) for i in range(2)]  # 8 blocks each
            for prefix in prefixes:
                await system.generate([*prefix, 1], greedy(1))
            await system.generate(prompt_of(15, seed=9), greedy(1))
            prompts = [prefix + prompt_of(26, seed=i) for i, prefix in enumerate(prefixes)]  # 15 blocks each
            outputs = await asyncio.gather(*(system.generate(p, greedy(3)) for p in prompts))
            assert outputs == [system.expected(p, greedy(3)) for p in prompts]
            await system.at_rest()

    run_virtual(story())


def test_a_sequence_that_keeps_twins_of_its_own_blocks_from_eviction_finds_room() -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=0, num_blocks=22) as system:
            prompt = prompt_of(
                33
            )  # two copies of 8 blocks; the later one's next blocks follow the first one's
            brief, long = await asyncio.gather(
                system.generate(prompt, greedy(1)), system.generate(prompt, greedy(50))
            )
            assert brief == system.expected(prompt, greedy(1))
            assert long == system.expected(prompt, greedy(50))
            await system.at_rest()

    run_virtual(story())


def test_one_preemption_is_enough_when_its_blocks_come_a_moment_later() -> None:
    async def story() -> None:
        async with SlowCopies(num_blocks=34) as system:
            grows = prompt_of(8)
            prompts = [prompt_of(36, seed=i) for i in range(2, 5)]  # 9 blocks each
            first = asyncio.create_task(system.generate(grows, greedy(100)))
            await system.clock.sleep(0.3)
            others = [asyncio.create_task(system.generate(p, greedy(3))) for p in prompts]
            preemptions = system.workers["decode-0"].metrics.preemptions._value
            await until(lambda: preemptions.get() > 0)
            await system.clock.sleep(0.03)
            assert preemptions.get() == 1
            assert await first == system.expected(grows, greedy(100))
            for task, p in zip(others, prompts, strict=True):
                assert await task == system.expected(p, greedy(3))
            await system.at_rest()

    run_virtual(story())


def test_a_decode_worker_that_does_not_answer_holds_up_nobody_else() -> None:
    async def story() -> None:
        async with MemorySystem(num_decode=2, network=MemoryNetwork(lambda *_: 0.001)) as system:
            prompt = prompt_of(60)
            silent = asyncio.create_task(system.generate(prompt, greedy(3)))
            calls = system.workers["prefill-0"].calls
            await until(lambda: bool(calls.in_state(JobState.STARTING)))
            (job,) = calls.jobs
            system.network.cut("prefill-0", job.request.decode_worker_id)
            started_at = system.clock.now()
            others = [prompt_of(20, seed=i) for i in range(2, 6)]
            tasks = [asyncio.create_task(system.generate(p, greedy(3))) for p in others]
            await system.clock.sleep(1)
            assert sum(task.done() for task in tasks) >= 2  # those of the other decode worker
            for task, p in zip(tasks, others, strict=True):
                assert await task == system.expected(p, greedy(3))
            assert await silent == system.expected(prompt, greedy(3))
            assert system.clock.now() - started_at < 6
            await system.at_rest()

    run_virtual(story())


@pytest.mark.parametrize("broken", ["prefill-0", "decode-0"])
def test_a_worker_whose_engine_fails_is_as_good_as_dead(broken: str) -> None:
    async def story() -> None:
        async with MemorySystem(num_prefill=2, num_decode=2) as system:
            prompts = [prompt_of(30, seed=i) for i in range(8)]
            tasks = [asyncio.create_task(system.generate(p, greedy(20))) for p in prompts]
            await system.clock.sleep(0.012)

            def fail(batch: StepBatch) -> StepResult:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

            system.engines[broken].step = fail  # type: ignore[method-assign]
            assert await asyncio.gather(*tasks) == [system.expected(p, greedy(20)) for p in prompts]
            worker = system.workers.pop(broken)
            with pytest.raises(RuntimeError, match="CUDA error"):
                await worker.ended()
            await system.at_rest()
            await worker.stop()
            assert worker.ledger.owners() == []

    run_virtual(story())


def test_a_finished_request_does_not_hold_blocks_for_a_source_that_is_cut_off() -> None:
    async def story() -> None:
        async with MemorySystem(network=MemoryNetwork(lambda *_: 0.005)) as system:
            prompt = prompt_of(40)
            task = asyncio.create_task(system.generate(prompt, greedy(3)))
            decode, prefill = system.workers["decode-0"], system.workers["prefill-0"]
            await until(lambda: decode.loop.running_sequences > 0)
            system.network.cut("decode-0", "prefill-0")
            assert await task == system.expected(prompt, greedy(3))
            await system.clock.sleep(0.1)
            assert decode.ledger.owners() == []
            await system.clock.sleep(6)
            assert prefill.ledger.owners() == []

    run_virtual(story())


def test_a_member_that_leaves_and_returns_at_once_stays_usable() -> None:
    async def story() -> None:
        async with MemorySystem() as system:
            prompt = prompt_of(40)
            for _ in range(3):
                decode = system.workers.pop("decode-0")
                system.push_members()
                await asyncio.sleep(0)
                system.workers["decode-0"] = decode
                system.push_members()
                assert await system.generate(prompt, greedy(3)) == system.expected(prompt, greedy(3))
            await system.at_rest()

    run_virtual(story(), at_most_s=5)


def test_the_router_hears_of_new_blocks_at_once() -> None:
    async def story() -> None:
        async with MemorySystem(num_decode=2) as system:
            await system.clock.sleep(3)
            await system.generate(prompt_of(40), greedy(3))
            await system.clock.sleep(0.25)
            names = {view.load.blocks.cached for view in system.router.fleet.workers.values() if view.load}
            assert max(names) >= 10
            assert system.router.fleet.index.num_names >= 10

    run_virtual(story())


class Storm:
    """Random requests, and random faults while they run."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.system = StormySystem(self.random)
        self.dead: list[Worker] = []
        self.faults: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        async with self.system as system:
            guard = asyncio.create_task(self._guard())
            requests = [asyncio.create_task(self._request(i)) for i in range(24)]
            self.faults = [asyncio.create_task(self._fault()) for _ in range(self.random.randrange(5))]
            await asyncio.gather(*requests)
            await asyncio.gather(*self.faults)
            await system.at_rest()
            guard.cancel()
            await asyncio.gather(guard, return_exceptions=True)
            assert system.router.metrics.running_requests._value.get() == 0
            for view in system.router.fleet.workers.values():
                assert not view.booked
            for worker in self.dead:
                await system.bury(worker)

    async def _guard(self) -> None:
        """Looks at every ledger that has changed, more often than steps end."""
        seen: dict[Worker, object] = {}
        while True:
            for worker in [*self.system.workers.values(), *self.dead]:
                now = (worker.loop.num_steps, worker.ledger.owners(), worker.block_counts())
                if seen.get(worker) != now:
                    seen[worker] = now
                    worker.check()
            await self.system.clock.sleep(0.002)

    async def _request(self, index: int) -> None:
        random, system = self.random, self.system
        await system.clock.sleep(random.random() * 0.6)
        request = self._random_request(index)
        expected = system.expected(unpack_tokens(request.prompt_tokens), request.sampling, seed=index)
        patience_s = random.choice([None] * 4 + [random.random() * 0.5])
        output: list[int] = []
        try:
            async with asyncio.timeout(patience_s):
                await self._read(request, output, slow_s=random.choice([0.0] * 5 + [0.3]))
        except TimeoutError:
            assert patience_s is not None
            assert output == expected[: len(output)]
        except DeadlineExceeded:
            assert request.deadline_s is not None
            assert output == expected[: len(output)]
        except Poisonous:  # faults strike whom they like: it has lost three workers, the last one alone
            assert len(self.dead) > DEATHS_OF_A_SUSPECT
            assert output == expected[: len(output)]
        else:
            assert output == expected

    def _random_request(self, index: int) -> GenerateRequest:
        random = self.random
        max_tokens = random.choice([1, 2, 5, 20])
        length = random.randrange(1, min(60, self.system.capacity_blocks * BLOCK - max_tokens))
        prompt = (prompt_of(40, seed=random.randrange(3)) + prompt_of(60, seed=1000 + index))[:length]
        if random.random() < 0.5:
            prompt[-1] = 1 + index
        sampling = SamplingParams(max_tokens=max_tokens, temperature=random.choice([0.0, 1.0]))
        deadline_s = random.choice([None] * 8 + [0.1, 1.0])
        return GenerateRequest(pack_tokens(prompt), sampling, index, deadline_s=deadline_s)

    async def _read(self, request: GenerateRequest, output: list[int], slow_s: float) -> None:
        """Read all into `output`; the stream must finish exactly once, at its end."""
        router = self.system.router
        is_finished = False
        async for delta in router.generate(router.new_request_id(), request):
            assert not is_finished
            is_finished = delta.finish is not None
            output += unpack_tokens(delta.tokens)
            await self.system.clock.sleep(slow_s)
        assert is_finished

    async def _fault(self) -> None:
        system, random = self.system, self.random
        await system.clock.sleep(random.random() * 0.8)
        kind = random.choice(["restart", "restart", "cut", "long cut", "router cut", "flap"])
        names = sorted(system.workers)
        if not names:
            return
        if kind == "restart":
            await self._restart(random.choice(names))
        elif kind == "flap":
            worker_name = random.choice(names)
            worker = system.workers.pop(worker_name)
            system.push_members()
            if random.random() < 0.5:
                await system.clock.sleep(random.random() * 0.2)
            system.workers.setdefault(worker_name, worker)
            system.push_members()
        else:
            one = "router-0" if kind == "router cut" else random.choice(names)
            other = random.choice(names)
            if one != other:
                system.network.cut(one, other)
                await system.clock.sleep(random.random() * (0.5 if kind == "cut" else 8))
                system.network.heal(one, other)

    async def _restart(self, name: str) -> None:
        system = self.system
        role = system.workers[name].role
        address = system.workers[name].address
        self.dead.append(system.kill(name))
        await system.clock.sleep(self.random.random() * 0.3)
        if name not in system.workers:
            await system.start_worker(name, role, address)
            system.push_members()


@pytest.mark.parametrize("seed", range(FIRST_STORM, FIRST_STORM + NUM_STORMS))
def test_a_storm_changes_no_token_and_leaves_nothing(seed: int) -> None:
    run_virtual(Storm(seed).run(), at_most_s=60)
