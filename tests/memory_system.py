"""A whole pdserve in one process and in virtual time: real router, loops and hand-off, fake engine."""

from collections.abc import Sequence
from dataclasses import replace

from controller.integrity import inspect
from controller.worker import Worker, WorkerSettings
from pdserve.clock import SeededRng, VirtualClock
from pdserve.contract.ids import RouterId, WorkerId
from pdserve.contract.messages import Members, Role
from pdserve.contract.ports import EngineExecutor, Rpc
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.engine.executor import InlineExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from router.requests import GenerateRequest
from router.router import Router, RouterSettings


class MemorySystem:
    """One router and its workers on one `MemoryNetwork`. Use inside `run_virtual`."""

    def __init__(
        self,
        num_prefill: int = 1,
        num_decode: int = 1,
        num_blocks: int = 64,
        seed: int = 0,
        settings: WorkerSettings | None = None,
        router_settings: RouterSettings | None = None,
        network: MemoryNetwork | None = None,
        **engine: object,
    ) -> None:
        self.clock = VirtualClock()
        self.rng = SeededRng(seed)
        self.network = network or MemoryNetwork()
        self.engines: dict[str, FakeEngine] = {}
        self.workers: dict[str, Worker] = {}
        self._settings = settings or WorkerSettings(transports=("grpc",))
        self._num_blocks = num_blocks
        self._engine_options = engine
        self._epoch = 0
        self.router = Router(
            RouterId("router-0"),
            self.rpc_of("router-0"),
            self.clock,
            self.rng,
            router_settings,
        )
        decode_role = Role.DECODE if num_prefill else Role.UNSPLIT
        self._plan = [(f"prefill-{i}", Role.PREFILL) for i in range(num_prefill)]
        self._plan += [(f"decode-{i}", decode_role) for i in range(num_decode)]

    async def __aenter__(self) -> "MemorySystem":
        for name, role in self._plan:
            await self.start_worker(name, role)
        self.push_members()
        await self.until_ready()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.router.close()
        for worker in self.workers.values():
            await worker.stop()
        for worker in self.workers.values():
            self._assert_nothing_held(worker)

    async def start_worker(self, name: str, role: Role, address: str = "") -> Worker:
        engine = FakeEngine(self._num_blocks, **self._engine_options)  # type: ignore[arg-type]
        worker = Worker(
            WorkerId(name),
            role,
            engine,
            self.executor_of(engine),
            self.rpc_of(name),
            self.clock,
            self.rng,
            self._settings,
        )
        await worker.start(address or f"{name}:0")
        self.engines[name], self.workers[name] = engine, worker
        return worker

    def executor_of(self, engine: FakeEngine) -> EngineExecutor:
        """Runs the engine of a worker that is being started; tests may replace it by a worse one."""
        return InlineExecutor(engine, self.clock)

    def rpc_of(self, name: str) -> Rpc:
        """How a process that is being started reaches the others; tests may replace it by a worse one."""
        return MemoryRpc(self.network, name)

    def kill(self, name: str) -> Worker:
        """As SIGKILL. The controller notices at once; the dead worker is returned, to be buried by `bury`."""
        self.network.kill(name)
        worker = self.workers.pop(name)
        self.push_members()
        return worker

    async def drain(self, name: str, deadline_s: float) -> None:
        """As the controller does it; returns when the worker has ended and the router knows of it."""
        worker = self.workers[name]
        worker.drain(deadline_s)
        self.push_members()
        await worker.ended()
        del self.workers[name]
        self.push_members()
        await self.bury(worker)

    async def bury(self, worker: Worker) -> None:
        """End what is left of a dead worker's objects, and see that its ledger balanced to the end."""
        await worker.stop()
        self._assert_nothing_held(worker)

    def push_members(self) -> None:
        """What the controller does whenever the membership changes."""
        self._epoch += 1
        members = tuple(worker.member() for worker in self.workers.values())
        self.router.set_members(Members(self._epoch, members))

    async def until_ready(self) -> None:
        while not all(view.usable for view in self.router.fleet.workers.values()):
            await self.clock.sleep(0.01)

    async def generate(
        self, prompt: Sequence[int], sampling: SamplingParams, seed: int = 7, **fields: object
    ) -> list[int]:
        """All output tokens of one request."""
        request = GenerateRequest(pack_tokens(prompt), sampling, seed, **fields)  # type: ignore[arg-type]
        output: list[int] = []
        async for delta in self.router.generate(self.router.new_request_id(), request):
            output += unpack_tokens(delta.tokens)
        return output

    def expected(self, prompt: Sequence[int], sampling: SamplingParams, seed: int = 7) -> list[int]:
        """The single process's output."""
        return self.reference(next(iter(self.engines)), prompt, sampling, seed)

    def reference(
        self, worker: str, prompt: Sequence[int], sampling: SamplingParams, seed: int = 7
    ) -> list[int]:
        """What the engine of `worker` would put out by itself."""
        engine = self.engines[worker]
        return engine.reference_output(pack_tokens(prompt), sampling, seed, sampling.max_tokens)

    def metric(self, worker: str, name: str, **labels: str) -> float:
        """A sample of a worker's metrics; 0 before the first event."""
        pool = {"pool": self.workers[worker].role.value}
        return self.workers[worker].registry.get_sample_value(f"pdserve_{name}", pool | labels) or 0.0

    def router_metric(self, name: str, **labels: str) -> float:
        """A sample of the router's metrics; 0 before the first event."""
        return self.router.registry.get_sample_value(f"pdserve_{name}", labels) or 0.0

    async def at_rest(self) -> None:
        """Wait until nothing is held anywhere; raises when something is left behind."""
        for _ in range(200):
            if not any(worker.ledger.owners() for worker in self.workers.values()):
                break
            await self.clock.sleep(0.01)
        for worker in self.workers.values():
            self._assert_nothing_held(worker)
        assert inspect(self.router.owners()).problems == ()

    def _assert_nothing_held(self, worker: Worker) -> None:
        worker.check()
        assert worker.inspect().problems == ()
        assert worker.ledger.owners() == [], f"{worker.worker_id} still holds blocks"
        counts = worker.block_counts()
        assert counts.free + counts.cached == self._num_blocks


def greedy(max_tokens: int, **fields: object) -> SamplingParams:
    return replace(SamplingParams(max_tokens=max_tokens, temperature=0.0), **fields)  # type: ignore[arg-type]
