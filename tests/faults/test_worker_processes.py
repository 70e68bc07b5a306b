"""Workers in processes of their own are killed and frozen; the client's tokens stay the same and nothing is
left behind."""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

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
from tests.local_system import WorkerProcess
from tests.reference import greedy_references
from tests.small_models import SmallModel, make_model

PROMPT = list(range(3, 123))
NUM_OUTPUT = 120
PLAN = [("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE), ("decode-1", Role.DECODE)]

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
        self.router = Router(RouterId("router-0"), GrpcRpc(), LoopClock(), SystemRng())
        self.workers: dict[str, WorkerProcess] = {}
        self._epoch = 0

    async def __aenter__(self) -> "Processes":
        await self.all_running()
        return self

    async def all_running(self) -> None:
        """Start what has never run or has been killed, and wait until the router can use all three."""
        missing = [
            (name, role)
            for name, role in PLAN
            if name not in self.workers or self.workers[name].process.returncode is not None
        ]
        started = await asyncio.gather(
            *(WorkerProcess.start(name, role, self.engine) for name, role in missing)
        )
        self.workers |= {name: worker for (name, _), worker in zip(missing, started, strict=True)}
        self._epoch += 1
        members = tuple(worker.member_at_start for worker in self.workers.values())
        self.router.set_members(Members(self._epoch, members))
        await self.until_usable(len(PLAN))

    async def __aexit__(self, *exc_info: object) -> None:
        await self.router.close()
        for worker in self.workers.values():
            await worker.stop()

    async def until_usable(self, count: int) -> None:
        async with asyncio.timeout(20):
            while sum(view.usable for view in self.router.fleet.workers.values()) != count:
                self.router.fleet.changed.clear()
                await self.router.fleet.changed.wait()

    async def tokens(self) -> AsyncIterator[int]:
        sampling = SamplingParams(max_tokens=NUM_OUTPUT, temperature=0.0, ignore_eos=True)
        request = GenerateRequest(pack_tokens(PROMPT), sampling, seed=1)
        async for delta in self.router.generate(self.router.new_request_id(), request):
            for token in unpack_tokens(delta.tokens):
                yield token

    def decoding(self) -> WorkerProcess:
        """The decode worker that has the only request."""
        busy = [name for name, view in self.router.fleet.workers.items() if view.booked]
        (name,) = (name for name in busy if name.startswith("decode"))
        return self.workers[name]

    async def assert_at_rest(self, *names: str) -> None:
        for name in names:
            async with asyncio.timeout(10):
                while (await self.workers[name].block_counts())["holds"]:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.05)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_processes(model: SmallModel) -> AsyncIterator[Processes]:
    async with Processes(model.folder) as processes:
        yield processes


@pytest_asyncio.fixture(loop_scope="module")
async def processes(shared_processes: Processes) -> Processes:
    await shared_processes.all_running()
    return shared_processes


async def test_a_decode_worker_killed_in_mid_stream(processes: Processes, expected: list[int]) -> None:
    output = []
    async for token in processes.tokens():
        output.append(token)
        if len(output) == 40:
            processes.decoding().signal(signal.SIGKILL)
    assert output == expected
    alive = [name for name, worker in processes.workers.items() if worker.process.returncode is None]
    await processes.assert_at_rest(*alive)


async def test_a_prefill_worker_killed_while_it_computes(processes: Processes, expected: list[int]) -> None:
    processes.router.fleet.changed.clear()
    stream = processes.tokens()
    first = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)  # placed and submitted
    processes.workers["prefill-0"].signal(signal.SIGKILL)
    output = [await first]
    output += [token async for token in stream]
    assert output == expected
    await processes.assert_at_rest("decode-0", "decode-1")


async def test_a_frozen_decode_worker_counts_as_dead_and_its_late_messages_change_nothing(
    processes: Processes, expected: list[int]
) -> None:
    output = []
    frozen = None
    async for token in processes.tokens():
        output.append(token)
        if len(output) == 40:
            frozen = processes.decoding()
            frozen.signal(signal.SIGSTOP)
    assert output == expected
    assert frozen is not None
    frozen.signal(signal.SIGCONT)
    await processes.until_usable(3)
    assert [token async for token in processes.tokens()] == expected
    await processes.assert_at_rest(*processes.workers)


async def test_a_router_that_goes_away_leaves_nothing_at_the_workers(processes: Processes) -> None:
    stream = processes.tokens()
    await anext(stream)
    await processes.router.close()
    await processes.assert_at_rest(*processes.workers)
    await stream.aclose()
