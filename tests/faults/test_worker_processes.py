"""Workers in processes of their own are killed and frozen; the client's tokens stay the same and nothing is
left behind."""

import asyncio
import json
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.ids import RouterId
from pdserve.contract.messages import Members, Role
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.engine.settings import EngineSettings
from pdserve.rpc.grpc_rpc import GrpcRpc
from router.requests import GenerateRequest
from router.router import Router
from tests.credentials import OURS
from tests.local_system import WorkerProcess
from tests.reference import greedy_references
from tests.small_models import SmallModel, make_model

PROMPT = list(range(3, 123))
NUM_OUTPUT = 120
DECODE = ("decode-0", "decode-1")
PLAN = [("prefill-0", Role.PREFILL), *((name, Role.DECODE) for name in DECODE)]

# One set of processes for all stories here; what a story kills is started again for the next.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    torch.set_num_threads(1)
    return make_model("llama", tmp_path_factory.mktemp("llama"), seed=3)


@pytest.fixture(scope="module")
def expected(model: SmallModel) -> list[int]:
    return greedy_references(model.reference, [tuple(PROMPT)], NUM_OUTPUT)[tuple(PROMPT)]


class Processes:
    """One prefill and two decode processes behind a router in this process."""

    def __init__(self, folder: Path) -> None:
        self.engine = EngineSettings(
            str(folder), dtype="float32", threads=1, kv_memory_bytes=8 << 20, chunk_tokens=32
        )
        self.router = Router(RouterId("router-0"), GrpcRpc(OURS), LoopClock(), SystemRng())
        self.workers: dict[str, WorkerProcess] = {}
        self._epoch = 0

    async def __aenter__(self) -> "Processes":
        await self.all_running()
        return self

    async def all_running(self) -> None:
        """Start what has never run or has been killed, and wait until the router can use all three."""
        missing = [(name, role) for name, role in PLAN if name not in self.workers]
        started = await asyncio.gather(
            *(WorkerProcess.start(name, role, self.engine) for name, role in missing)
        )
        self.workers |= {name: worker for (name, _), worker in zip(missing, started, strict=True)}
        self._epoch += 1
        self.router.set_members(self.members())
        await until_usable(self.router)

    def members(self) -> Members:
        return Members(self._epoch, tuple(worker.member_at_start for worker in self.workers.values()))

    async def __aexit__(self, *exc_info: object) -> None:
        await self.router.close()
        for worker in self.workers.values():
            await worker.stop()

    async def kill(self, name: str) -> None:
        worker = self.workers.pop(name)
        worker.signal(signal.SIGKILL)
        await worker.process.communicate()

    def decoding(self) -> str:
        """The decode worker that has the only request."""
        busy = [name for name, view in self.router.fleet.workers.items() if view.booked]
        (name,) = (name for name in busy if name.startswith("decode"))
        return name

    async def hold(self, num_free: int, *names: str) -> None:
        """Let these engines take `num_free` steps and no more."""
        for name in names:
            await self.ask(name, f"hold {num_free}")

    async def release(self, *names: str) -> None:
        for name in names:
            await self.ask(name, "release")

    async def ask(self, name: str, question: str) -> dict[str, Any]:
        """See `tests.worker_process`."""
        process = self.workers[name].process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{question}\n".encode())
        answer: dict[str, Any] = json.loads(await process.stdout.readline())
        return answer

    async def metric(self, name: str, metric: str, **labels: str) -> float:
        shown = " ".join(f"{label}={value}" for label, value in labels.items())
        value: float = (await self.ask(name, f"metric {metric} {shown}"))["value"]
        return value

    async def assert_at_rest(self) -> None:
        """Every process that lives holds nothing, soon."""
        for worker in self.workers.values():
            async with asyncio.timeout(10):
                while (await worker.block_counts())["holds"]:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)


async def until_usable(router: Router) -> None:
    """Until `router` can use all workers."""
    async with asyncio.timeout(20):
        while sum(view.usable for view in router.fleet.workers.values()) != len(PLAN):
            router.fleet.changed.clear()
            await router.fleet.changed.wait()


async def tokens(router: Router) -> AsyncGenerator[int, None]:
    sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(pack_tokens(PROMPT), sampling, seed=1)
    async with aclosing(router.generate(router.new_request_id(), request)) as deltas:
        async for delta in deltas:
            for token in unpack_tokens(delta.tokens):
                yield token


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_processes(model: SmallModel) -> AsyncIterator[Processes]:
    async with Processes(model.folder) as processes:
        yield processes


@pytest_asyncio.fixture(loop_scope="module")
async def processes(shared_processes: Processes) -> Processes:
    await shared_processes.all_running()
    return shared_processes


async def test_a_decode_worker_killed_in_mid_stream(processes: Processes, expected: list[int]) -> None:
    await processes.hold(40, *DECODE)
    stream = tokens(processes.router)
    output = [await anext(stream) for _ in range(41)]  # the first is the prefill worker's
    victim = processes.decoding()
    await processes.ask(victim, "standing")
    await processes.kill(victim)
    await processes.release(*(name for name in DECODE if name != victim))
    output += [token async for token in stream]
    assert output == expected
    await processes.assert_at_rest()
    (report,) = processes.router.reports.recent(1)
    assert report.recoveries == {"worker_lost": 1}
    (survivor,) = (name for name in DECODE if name != victim)
    ends = [(attempt.decode_worker, attempt.end) for attempt in report.attempts]
    assert ends == [(victim, "worker_lost"), (survivor, "length")]


async def test_a_prefill_worker_killed_while_it_computes(processes: Processes, expected: list[int]) -> None:
    await processes.hold(0, "prefill-0")
    stream = tokens(processes.router)
    first = asyncio.ensure_future(anext(stream))
    await processes.ask("prefill-0", "standing")  # within a step of the prompt
    await processes.kill("prefill-0")
    output = [await first]
    output += [token async for token in stream]
    assert output == expected
    await processes.assert_at_rest()


async def test_a_frozen_decode_worker_counts_as_dead_and_its_late_messages_change_nothing(
    processes: Processes, expected: list[int]
) -> None:
    await processes.hold(40, *DECODE)
    stream = tokens(processes.router)
    output = [await anext(stream) for _ in range(41)]
    frozen = processes.decoding()
    await processes.ask(frozen, "standing")
    processes.workers[frozen].signal(signal.SIGSTOP)
    await processes.release(*(name for name in DECODE if name != frozen))
    output += [token async for token in stream]
    assert output == expected
    processes.workers[frozen].signal(signal.SIGCONT)
    await processes.release(frozen)  # it takes the step that it stood before, for nobody
    await until_usable(processes.router)
    assert [token async for token in tokens(processes.router)] == expected
    await processes.assert_at_rest()


async def test_a_router_that_goes_away_leaves_nothing_at_the_workers(processes: Processes) -> None:
    await processes.hold(20, *DECODE)
    before = [await ended_by_their_router(processes, name) for name in DECODE]
    router = Router(RouterId("router-1"), GrpcRpc(OURS), LoopClock(), SystemRng())
    router.set_members(processes.members())
    await until_usable(router)
    stream = tokens(router)
    for _ in range(21):
        await anext(stream)
    await router.close()
    async with asyncio.timeout(10):
        while [await ended_by_their_router(processes, name) for name in DECODE] == before:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await processes.release(*DECODE)
    await processes.assert_at_rest()
    await stream.aclose()


async def ended_by_their_router(processes: Processes, name: str) -> float:
    return await processes.metric(name, "worker_requests_total", outcome="cancelled")
