"""A whole pdserve over real sockets: real models, gRPC and HTTP, workers in this process or in their own."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from starlette.types import ASGIApp

from controller.worker import Worker, WorkerSettings
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.ids import Incarnation, RouterId, WorkerId
from pdserve.contract.messages import Member, Members, Role, WorkerState
from pdserve.contract.tracing import NO_TRACER, Tracer
from pdserve.engine.engine import ModelEngine
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.settings import EngineSettings
from pdserve.rpc.credentials import AdminToken
from pdserve.rpc.grpc_rpc import GrpcRpc
from router.admin.api import create_admin_app
from router.admin.state import LiveState
from router.api_settings import ApiSettings
from router.grpc_api import GrpcApi, serve_grpc
from router.http_api import create_app
from router.http_server import HttpServer, serve_http
from router.router import Router, RouterSettings
from router.text import TextModel
from tests.credentials import OURS

ADMIN_TOKEN = AdminToken("the token of the admin server")
ROOT = Path(__file__).parent.parent


async def start_worker(
    name: str, role: Role, engine: ModelEngine, settings: WorkerSettings, tracer: Tracer = NO_TRACER
) -> Worker:
    worker = Worker(
        WorkerId(name),
        role,
        engine,
        ThreadExecutor(engine),
        GrpcRpc(OURS),
        LoopClock(),
        SystemRng(),
        settings,
        tracer,
    )
    await worker.start("127.0.0.1:0")
    return worker


class LocalSystem:
    """One router with its HTTP and gRPC APIs and its admin server, and workers in this process."""

    def __init__(
        self,
        engine: EngineSettings,
        num_prefill: int = 1,
        num_decode: int = 1,
        worker_settings: WorkerSettings | None = None,
        router_settings: RouterSettings | None = None,
        api_settings: ApiSettings | None = None,
        tracer_of: Callable[[str], Tracer] = lambda process: NO_TRACER,
    ) -> None:
        """`tracer_of` makes the tracer of each process, `router-0`, `decode-0` and so on."""
        self._tracer_of = tracer_of
        self._api_settings = api_settings or ApiSettings()
        self._tracer = tracer_of("router-0")
        self.router = Router(
            RouterId("router-0"), GrpcRpc(OURS), LoopClock(), SystemRng(), router_settings, self._tracer
        )
        self.workers: dict[str, Worker] = {}
        self._engine = engine
        self._worker_settings = worker_settings or WorkerSettings()
        decode_role = Role.DECODE if num_prefill else Role.UNSPLIT
        self._plan = [(f"prefill-{i}", Role.PREFILL) for i in range(num_prefill)]
        self._plan += [(f"decode-{i}", decode_role) for i in range(num_decode)]
        self._http: HttpServer | None = None
        self._grpc: GrpcApi | None = None
        self._admin: HttpServer | None = None
        self._admin_app: ASGIApp | None = None
        self.live = LiveState(self.router, LoopClock(), engine.served_name or "small", "chat")
        self._epoch = 0

    @property
    def url(self) -> str:
        assert self._http is not None
        return f"http://127.0.0.1:{self._http.port}"

    @property
    def grpc_address(self) -> str:
        assert self._grpc is not None
        return f"127.0.0.1:{self._grpc.port}"

    @property
    def admin_url(self) -> str:
        assert self._admin is not None
        return f"http://127.0.0.1:{self._admin.port}"

    async def __aenter__(self) -> "LocalSystem":
        await self.start_workers(self._plan)
        await self.push_members()
        text = TextModel.load(self._engine.model)
        api = create_app(self.router, text, self._api_settings, tracer=self._tracer)
        self._http = await serve_http(api, "127.0.0.1", 0)
        self._grpc = await serve_grpc(
            self.router, text, "127.0.0.1", 0, self._api_settings, tracer=self._tracer
        )
        self._admin_app = create_admin_app(
            self.live, self.router.reports, api, ADMIN_TOKEN, ["admin.example"]
        )
        self.live.start()
        await self.start_admin()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._http is not None
        assert self._grpc is not None
        await self.live.close()
        await self.stop_admin()
        await self._grpc.stop()
        await self._http.stop()
        await self.router.close()
        await self.stop_workers()
        await self._tracer.close()

    async def start_admin(self, port: int = 0) -> None:
        assert self._admin_app is not None
        self._admin = await serve_http(self._admin_app, "127.0.0.1", port)

    async def stop_admin(self) -> int:
        """The port that it had."""
        assert self._admin is not None
        port = self._admin.port
        await self._admin.stop(grace_s=0)
        return port

    async def start_workers(self, plan: Sequence[tuple[str, Role]]) -> None:
        for name, role in plan:
            engine = ModelEngine.load(self._engine)
            tracer = self._tracer_of(name)
            self.workers[name] = await start_worker(name, role, engine, self._worker_settings, tracer)

    async def replace_worker(self, name: str) -> None:
        """Put a new worker, which holds nothing, in the place of a running one."""
        role = self.workers[name].role
        await self._stop_worker(name)
        await self.start_workers([(name, role)])
        await self.push_members()

    async def stop_workers(self) -> None:
        for name in self.workers:
            await self._stop_worker(name)

    async def _stop_worker(self, name: str) -> None:
        worker = self.workers[name]
        await worker.stop()
        worker.check()
        assert worker.ledger.owners() == [], f"{worker.worker_id} still holds blocks"

    def members(self) -> tuple[Member, ...]:
        return tuple(worker.member() for worker in self.workers.values())

    async def push_members(self) -> None:
        """Tell the router, and wait until it can use all workers."""
        self._epoch += 1
        self.router.set_members(Members(self._epoch, self.members()))
        async with asyncio.timeout(20):
            while not all(view.usable for view in self.router.fleet.workers.values()):
                self.router.fleet.changed.clear()
                await self.router.fleet.changed.wait()

    def metric(self, worker: str, name: str, **labels: str) -> float:
        """A sample of a worker's metrics; 0 before the first event."""
        pool = {"pool": self.workers[worker].role.value}
        return self.workers[worker].registry.get_sample_value(f"pdserve_{name}", pool | labels) or 0.0

    async def at_rest(self) -> None:
        """Wait until no worker holds anything for a request."""
        async with asyncio.timeout(10):
            while any(worker.ledger.owners() for worker in self.workers.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        for worker in self.workers.values():
            worker.check()


class WorkerProcess:
    """A worker in a process of its own, for tests that kill or freeze it."""

    def __init__(self, process: asyncio.subprocess.Process, member: Member) -> None:
        self.process = process
        self.member_at_start = member

    @classmethod
    async def start(cls, name: str, role: Role, engine: EngineSettings) -> "WorkerProcess":
        arguments = json.dumps({"name": name, "role": role.value, "engine": asdict(engine)})
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.worker_process",
            arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        assert process.stdout is not None
        line = await process.stdout.readline()
        fields = json.loads(line)
        member = Member(
            WorkerId(name), fields["address"], Incarnation(fields["incarnation"]), role, "", WorkerState.READY
        )
        return cls(process, member)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    async def block_counts(self) -> dict[str, int]:
        """Asks the process for its blocks by state, and for its holds' owners."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"blocks\n")
        answer: dict[str, int] = json.loads(await self.process.stdout.readline())
        return answer

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
        await self.process.communicate()
