"""A router put together with its HTTP and gRPC APIs, its admin server and metrics. Never imports torch."""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.types import ASGIApp

from controller.addresses import advertised_host, node_name, reachable
from controller.integrity import IntegrityReport, inspect
from controller.metrics_page import serve_metrics
from controller.model_files import fetch_text_files
from controller.plan import ProcessPlan
from controller.ports import ADMIN_SETTING
from controller.status import ProcessReport
from controller.tracing import tracer_of
from pdserve.clock import LoopClock, SystemRng
from pdserve.config import SloConfig
from pdserve.contract.errors import ConfigError, InvalidRequest
from pdserve.contract.ids import RouterId
from pdserve.contract.messages import Members
from pdserve.contract.ports import Rpc
from pdserve.engine_metrics import export_price
from pdserve.faults import Faults, FaultyRpc
from pdserve.rpc.grpc_rpc import GrpcRpc
from router.admin.api import create_admin_app
from router.admin.state import LiveState
from router.admission import AdmissionLimits
from router.api_settings import ApiLimits, ApiSettings
from router.grpc_api import GrpcApi, serve_grpc
from router.http_api import create_app
from router.http_server import HttpServer, serve_http
from router.journey import JourneySettings
from router.links import LinkSettings
from router.objectives import Objectives
from router.router import Router, RouterSettings
from router.text import TextModel

T = TypeVar("T")

STOP_GRACE_S = 1.0
"""How long open answers may take when the router stops."""


class RouterFront:
    """From `start` to `stop`. Belongs to the event loop in which it is made."""

    def __init__(self, plan: ProcessPlan, faults: Faults | None) -> None:
        """`faults`: what the router may suffer on purpose, where that is allowed."""
        self._plan = plan
        self._config = plan.deployment.config.router
        self._clock = clock = LoopClock()
        rpc: Rpc = GrpcRpc(plan.deployment.credentials())
        if faults is not None:
            rpc = FaultyRpc(rpc, faults, clock)
        self._tracer = tracer_of(plan, clock)
        settings = self._router_settings()
        self._router = Router(RouterId(plan.spec.id), rpc, clock, SystemRng(), settings, self._tracer)
        export_price(plan.spec.pool, self._router.registry, self._config.price_per_hour)
        if faults is not None:
            faults.export(self._router.registry)
        self._http: HttpServer | None = None
        self._grpc: GrpcApi | None = None
        self._admin: HttpServer | None = None
        self._live: LiveState | None = None
        self._metrics_url = ""
        self._takes = ""

    async def start(self) -> None:
        """Load the tokeniser and listen. Raises NotFound or ConfigError."""
        folder = await asyncio.to_thread(fetch_text_files, self._plan.deployment.model)
        text_model = await asyncio.to_thread(TextModel.load, folder)
        self._takes = most_comfortable(text_model)
        await self._serve(text_model)
        self._metrics_url = serve_metrics(self._router.registry, self._plan.deployment)

    def report(self) -> ProcessReport:
        return ProcessReport(
            pid=os.getpid(),
            node=node_name(),
            address=self._reachable(self._config.host, self._http.port) if self._http else "",
            metrics_url=self._metrics_url,
            grpc_address=self._reachable(self._config.host, self._grpc.port) if self._grpc else "",
            admin_address=(self._reachable(self._config.admin.host, self._admin.port) if self._admin else ""),
            takes=self._takes,
            model=self._plan.deployment.model.served_name,
            epoch=self._router.fleet.epoch,
        )

    def inspect(self) -> IntegrityReport:
        """Check everything in the router that owns something."""
        return inspect(self._router.owners())

    async def set_members(self, members: Members) -> None:
        """Take over a membership; returns once every member that stays can be used, or a newer membership has
        come."""
        self._router.set_members(members)
        fleet = self._router.fleet
        while fleet.epoch == members.epoch and not all(
            view.usable or view.is_leaving for view in fleet.workers.values()
        ):
            fleet.changed.clear()
            await fleet.changed.wait()

    async def stop(self) -> None:
        """Take no new requests, give open ones a moment, and let go of the workers."""
        if self._live is not None:
            await self._live.close()
        servers = [server for server in (self._http, self._grpc, self._admin) if server is not None]
        await asyncio.gather(*[server.stop(STOP_GRACE_S) for server in servers])
        await self._router.close()
        await self._tracer.close()

    async def _serve(self, text_model: TextModel) -> None:
        settings = self._api_settings()
        observer, tracer = self._router.metrics, self._tracer
        app = create_app(self._router, text_model, settings, observer=observer, tracer=tracer)
        host, previous = self._config.host, self._plan.previous
        self._http = await self._at_port(
            self._config.http_port,
            previous.address if previous else "",
            lambda port: serve_http(app, host, port, self._config.request_timeout_s),
        )
        if self._config.grpc_port is not None:
            self._grpc = await self._at_port(
                self._config.grpc_port,
                previous.grpc_address if previous else "",
                lambda port: serve_grpc(
                    self._router, text_model, host, port, settings, observer=observer, tracer=tracer
                ),
            )
        await self._serve_admin(app)

    async def _serve_admin(self, api: ASGIApp) -> None:
        config, previous, deployment = self._config.admin, self._plan.previous, self._plan.deployment
        if config.port is None:
            return
        self._live = LiveState(self._router, self._clock, deployment.model.served_name, self._takes)
        names = (config.host, advertised_host(deployment), *config.allowed_hosts)
        app = create_admin_app(
            self._live, self._router.reports, api, deployment.admin_token, names, self._clock
        )
        self._admin = await self._at_port(
            config.port,
            previous.admin_address if previous else "",
            lambda port: serve_http(app, config.host, port, self._config.request_timeout_s, ADMIN_SETTING),
        )
        self._live.start()

    async def _at_port(
        self, configured: int, previous_address: str, serve: Callable[[int], Awaitable[T]]
    ) -> T:
        """Serve at this router's own port. Where any will do (the launcher of a local system has chosen one
        for a single router), take that of the router before, which clients know, if it can still be had."""
        if configured:
            return await serve(configured + self._plan.spec.index)
        if previous_address:
            with contextlib.suppress(ConfigError):
                return await serve(int(previous_address.rpartition(":")[2]))
        return await serve(0)

    def _reachable(self, host: str, port: int) -> str:
        return reachable(host, port, self._plan.deployment)

    def _router_settings(self) -> RouterSettings:
        admission = AdmissionLimits(**self._config.admission.model_dump())
        journey = JourneySettings(
            queue_timeout_s=self._config.queue_timeout_s,
            policy=self._config.policy,
            objectives=_objectives(self._plan.deployment.config.slo),
        )
        links = LinkSettings(self._config.first_token_timeout_s, self._config.stall_timeout_s)
        return RouterSettings(admission, journey, links)

    def _api_settings(self) -> ApiSettings:
        limits = ApiLimits(**self._config.limits.model_dump())
        config = self._plan.deployment
        return ApiSettings(config.model.served_name, limits, log_prompts=config.config.logs.prompts)


def _objectives(slo: SloConfig) -> Objectives:
    def seconds(limit_ms: float | None) -> float | None:
        return None if limit_ms is None else limit_ms / 1000

    return Objectives(
        seconds(slo.ttft_ms), seconds(slo.tpot_ms), seconds(slo.itl_ms), seconds(slo.e2e_ms), slo.target
    )


def most_comfortable(text_model: TextModel) -> str:
    """``chat``, ``text`` or ``tokens``: what a client had best send."""
    if not text_model.has_tokenizer:
        return "tokens"
    try:
        text_model.render_chat([{"role": "user", "content": "hello"}])
    except InvalidRequest:
        return "text"
    return "chat"
