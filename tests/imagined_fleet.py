"""A router that believes in workers which are not there: the real thing would need a hundred processes."""

from dataclasses import replace
from random import Random

from starlette.applications import Starlette

from pdserve.clock import LoopClock, SeededRng
from pdserve.contract.ids import Incarnation, RequestId, RouterId, SubmitNumber, WorkerId
from pdserve.contract.messages import Hello, Member, Members, Report, Role, WorkerLoad, WorkerState
from pdserve.contract.work import BlockCounts, ModelInfo
from pdserve.engine.fake_engine import DEFAULT_COST, FakeEngine
from pdserve.rpc.credentials import AdminToken
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from router.admin.api import create_admin_app
from router.admin.state import LiveState
from router.http_server import HttpServer, serve_http
from router.request_reports import AttemptReport, Origin, RequestReport
from router.router import Router

NUM_BLOCKS = 1000
IDLE = WorkerLoad(
    WorkerState.READY, 0, 0, 0, 0, BlockCounts(NUM_BLOCKS, 0, 0, 0), 0, SubmitNumber(0), 0.0, 0.0, 1.0, 1.0
)
TOKEN = AdminToken("the token of an imagined system")


class ImaginedFleet:
    """Its router has a real admin server. What its workers report is told to its fleet as links would."""

    def __init__(self, num_prefill: int, num_decode: int) -> None:
        network = MemoryNetwork()
        self.router = Router(RouterId("router-0"), MemoryRpc(network, "router-0"), LoopClock(), SeededRng(0))
        self._model: ModelInfo = replace(FakeEngine(num_blocks=8).info, num_blocks=NUM_BLOCKS)
        self._random = Random(1)
        self._live = LiveState(self.router, LoopClock(), "an-imagined-model", "chat")
        self._server: HttpServer | None = None
        names = [(f"prefill-{i}", Role.PREFILL) for i in range(num_prefill)]
        names += [(f"decode-{i}", Role.DECODE) for i in range(num_decode)]
        self._enter(names)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.port}/admin/#token={TOKEN.secret}"

    async def __aenter__(self) -> "ImaginedFleet":
        self._server = await serve_http(
            create_admin_app(self._live, self.router.reports, Starlette(), TOKEN), "127.0.0.1", 0
        )
        self._live.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        assert self._server is not None
        await self._live.close()
        await self._server.stop()
        await self.router.close()

    def report(self, name: str, load: WorkerLoad) -> None:
        """The worker tells its load."""
        view = self.router.fleet.workers[WorkerId(name)]
        report = Report(view.member.incarnation, (), (), 0, 0, load)
        self.router.fleet.report(view, report, LoopClock().now())

    def report_anything(self) -> None:
        """Every worker tells another load than before."""
        for worker_id, view in self.router.fleet.workers.items():
            view.num_output_tokens += self._random.randrange(200)
            self.report(worker_id, self._any_load(view.load or IDLE))

    def _any_load(self, before: WorkerLoad) -> WorkerLoad:
        draw = self._random.randrange
        active, cached = draw(NUM_BLOCKS // 2), draw(NUM_BLOCKS // 2)
        return replace(
            before,
            waiting_requests=draw(20),
            waiting_tokens=draw(20_000),
            running_sequences=draw(64),
            running_context_tokens=draw(64_000),
            blocks=BlockCounts(NUM_BLOCKS - active - cached, cached, 0, active),
            step=before.step + draw(60),
            prefill_tokens_per_s=float(draw(9000)),
            decode_step_s=draw(50) / 1000,
        )

    def _enter(self, names: list[tuple[str, Role]]) -> None:
        members = tuple(
            Member(WorkerId(name), f"10.0.0.1:{number}", Incarnation(number), role, "", WorkerState.READY)
            for number, (name, role) in enumerate(names, start=30000)
        )
        fleet = self.router.fleet
        fleet.set_members(Members(1, members))
        for view in fleet.workers.values():
            member = view.member
            hello = Hello(
                member.worker_id, member.incarnation, member.role, self._model, b"", DEFAULT_COST, 1.0
            )
            fleet.hello(view, hello)
            fleet.connected(view)
            self.report(member.worker_id, IDLE)


class ImaginedRequest:
    """One of the router's that nobody serves."""

    def __init__(self, fleet: ImaginedFleet, request_id: str) -> None:
        self.request_id = RequestId(request_id)
        self.num_tokens = 0
        """Of its output, so far."""
        self._router = fleet.router
        self._arrived_at = LoopClock().unix_time()
        self._router.metrics.running_requests.inc()
        self._router.reports.begin(self)

    def report(self) -> RequestReport:
        return self._report(outcome=None, ended_s=None)

    def end(self) -> None:
        self._router.metrics.running_requests.dec()
        self._router.reports.end(self._report(outcome="length", ended_s=2.0))

    def _report(self, outcome: str | None, ended_s: float | None) -> RequestReport:
        attempt = AttemptReport(
            number=1,
            decode_worker=WorkerId("decode-0"),
            prefill_worker=WorkerId("prefill-0"),
            placement="imagined",
            submitted_s=0.001,
            first_token_s=0.5,
            second_token_s=0.52,
            ended_s=ended_s,
            end=outcome,
            message=None,
            timings=None,
        )
        return RequestReport(
            request_id=self.request_id,
            origin=Origin(),
            arrived_at=self._arrived_at,
            num_prompt_tokens=1000,
            num_output_tokens=self.num_tokens,
            attempts=(attempt,),
            num_attempts=1,
            recoveries={},
            first_token_s=0.5,
            second_token_s=0.55,
            last_token_s=ended_s,
            ended_s=ended_s,
            outcome=outcome,
            message=None,
        )
