"""The public gRPC API: pdserve.api.v1.Generation, health checking and reflection.

It checks and runs requests with the same code as the HTTP API. A call's deadline is the request's; a call
that is cancelled, in whatever way, closes the request at once.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NoReturn

import grpc
import grpc.aio

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.api.v1 import generate_pb2_grpc as pb_grpc
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.errors import ConfigError, ErrorCode, ErrorInfo, PdserveError, Unavailable
from pdserve.contract.ids import RequestId
from pdserve.contract.ports import Clock, Rng
from pdserve.contract.tracing import NO_TRACER, Tracer
from pdserve.rpc.channel import SERVER_OPTIONS
from router.api_settings import FAREWELL_S, ApiSettings, NoObserver, RequestObserver
from router.choices import Running, running_job
from router.grpc_convert import (
    body_from,
    choice_from,
    joined_choice,
    prompt_ids_from,
    says_something,
    usage_from,
)
from router.grpc_health import add_health_and_reflection
from router.intake import Intake, Job
from router.listen import bind, why_not
from router.openai_answers import Usage
from router.openai_errors import CLIENT_GONE_STATUS, error_status
from router.openai_schema import ChatBody
from router.requests import Desk
from router.text import TextModel
from router.visits import REQUEST_ID, TRACEPARENT, TRACESTATE, Visit, Visits, trace_from

API = "grpc"
_SETTING = "gRPC port (--grpc-port)"

log = logging.getLogger(__name__)

_STATUSES = {
    ErrorCode.INVALID_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.REQUEST_TOO_LONG: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    ErrorCode.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorCode.CANCELLED: grpc.StatusCode.ABORTED,
    ErrorCode.CLIENT_TOO_SLOW: grpc.StatusCode.ABORTED,
    ErrorCode.PREEMPTED: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.DRAINING: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.WORKER_LOST: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.STALLED: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.POISONOUS: grpc.StatusCode.INTERNAL,
    ErrorCode.PREFILL_FAILED: grpc.StatusCode.UNAVAILABLE,
}

SERVICE = pb.DESCRIPTOR.services_by_name["Generation"].full_name

_Context = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse | pb.GenerateChunk]


class GrpcApi:
    """A gRPC server that runs until `stop`."""

    def __init__(self, server: grpc.aio.Server, port: int):
        self._server = server
        self.port = port
        """The real port when 0 was asked for."""

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new calls, give open ones `grace_s` seconds, then cancel them."""
        await self._server.stop(grace_s)


async def serve_grpc(
    desk: Desk,
    text_model: TextModel,
    host: str,
    port: int,
    settings: ApiSettings | None = None,
    *,
    observer: RequestObserver | None = None,
    rng: Rng | None = None,
    clock: Clock | None = None,
    tracer: Tracer = NO_TRACER,
) -> GrpcApi:
    """Serve the gRPC API in front of `desk`. Raises ConfigError when the port cannot be had."""
    settings = settings or ApiSettings()
    intake = Intake(text_model, settings, rng or SystemRng())
    server = grpc.aio.server(options=SERVER_OPTIONS)
    clock = clock or LoopClock()
    visits = Visits(desk, text_model, observer or NoObserver(), tracer, clock, settings.log_prompts)
    generation = _Generation(desk, text_model, intake, settings, visits, clock)
    pb_grpc.add_GenerationServicer_to_server(generation, server)  # type: ignore[no-untyped-call]  # generated
    add_health_and_reflection(server, desk, clock, SERVICE)
    real_port = _listen(server, host, port)
    await server.start()
    return GrpcApi(server, real_port)


def status_of(code: ErrorCode) -> grpc.StatusCode:
    """The status with which an error ends a call."""
    return _STATUSES.get(code, grpc.StatusCode.INTERNAL)


class _Generation(pb_grpc.GenerationServicer):
    def __init__(
        self,
        desk: Desk,
        text_model: TextModel,
        intake: Intake,
        settings: ApiSettings,
        visits: Visits,
        clock: Clock,
    ):
        self._desk = desk
        self._text_model = text_model
        self._intake = intake
        self._settings = settings
        self._visits = visits
        self._clock = clock

    async def Generate(  # noqa: N802  # the service's name for it
        self, request: pb.GenerateRequest, context: _Context
    ) -> pb.GenerateResponse:
        async with self._answering(context) as visit:
            return await self._whole(self._job(request, context, visit), visit)

    async def GenerateStream(  # noqa: N802  # the service's name for it
        self, request: pb.GenerateRequest, context: _Context
    ) -> None:
        async with self._answering(context) as visit:
            await self._stream(self._job(request, context, visit), visit, context)

    @asynccontextmanager
    async def _answering(self, context: _Context) -> AsyncIterator[Visit]:
        """Turn errors into statuses, and tell how the call ended."""
        code = ErrorCode.CANCELLED.value
        status = CLIENT_GONE_STATUS  # unless something else is known to have happened
        visit = self._enter(context)
        try:
            # By itself, since it needs no reader: else it goes with the first message, and until a client has
            # read that no status can be sent.
            await context.send_initial_metadata(visit.answer_headers)
            yield visit
            code, status = "ok", 200
        except PdserveError as error:
            code, status = error.info.code, error_status(error.info.code)
            await self._abort(context, error.info)
        except Exception:
            log.exception("a gRPC request failed for a reason that nobody foresaw")
            code, status = ErrorCode.INTERNAL, error_status(ErrorCode.INTERNAL)
            await self._abort(context, ErrorInfo(ErrorCode.INTERNAL, "internal error, see the router's log"))
        finally:
            visit.end(code, status)

    async def _abort(self, context: _Context, info: ErrorInfo) -> NoReturn:
        """End the call with the error's status; `info.code` says more than the status can."""
        metadata = [("error-code", str(info.code))]
        if info.param is not None:
            metadata.append(("error-param", info.param))
        if info.retry_after_s is not None:
            metadata.append(("retry-after-s", f"{info.retry_after_s:g}"))
        try:
            async with self._clock.timeout(FAREWELL_S):
                await context.abort(status_of(info.code), info.message, tuple(metadata))
        except (TimeoutError, grpc.aio.InternalError):
            # What was written last is still under way to a client that does not read, and the status waits
            # behind it: the client gets it when it reads on, and nobody here waits for that.
            raise asyncio.CancelledError from None

    def _enter(self, context: _Context) -> Visit:
        sent = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        trace = trace_from(sent.get(TRACEPARENT), sent.get(TRACESTATE, ""))
        return self._visits.enter(API, sent.get(REQUEST_ID, ""), trace)

    def _job(self, request: pb.GenerateRequest, context: _Context, visit: Visit) -> Job:
        with visit.at_the_door(), visit.tokenising():
            return self._read_job(request, context)

    def _read_job(self, request: pb.GenerateRequest, context: _Context) -> Job:
        info = self._desk.model_info()
        if info is None:
            raise Unavailable(f"no model is served yet: {self._desk.readiness().reason}")
        body = body_from(request)
        deadline_s = context.time_remaining()
        if isinstance(body, ChatBody):
            return self._intake.chat(body, info, deadline_s)
        return self._intake.completion(body, info, deadline_s)

    async def _whole(self, job: Job, visit: Visit) -> pb.GenerateResponse:
        request_ids = visit.admit(job)
        usage = Usage(job)
        parts: list[list[pb.Choice]] = [[] for _ in job.choices]
        async with self._running(job, request_ids, visit) as pieces:
            async for piece in pieces:
                usage.add(piece)
                so_far = parts[piece.index]
                so_far.append(choice_from(piece, job, self._text_model, first=not so_far))
        return pb.GenerateResponse(
            id=request_ids[0],
            model=job.model,
            choices=map(joined_choice, parts),
            usage=usage_from(usage),
            prompt_token_ids=prompt_ids_from(job),
        )

    async def _stream(self, job: Job, visit: Visit, context: _Context) -> None:
        request_ids = visit.admit(job)
        usage = Usage(job)
        begun: set[int] = set()
        async with self._running(job, request_ids, visit) as pieces:
            async for piece in pieces:
                usage.add(piece)
                chunk = pb.GenerateChunk(id=request_ids[0], model=job.model)
                chunk.choice.CopyFrom(
                    choice_from(piece, job, self._text_model, first=piece.index not in begun)
                )
                if not begun:
                    chunk.prompt_token_ids.extend(prompt_ids_from(job))
                begun.add(piece.index)
                if says_something(chunk):
                    await context.write(chunk)
                    visit.tell_first_event()
            await context.write(pb.GenerateChunk(id=request_ids[0], model=job.model, usage=usage_from(usage)))

    def _running(self, job: Job, request_ids: list[RequestId], visit: Visit) -> Running:
        limits = self._settings.limits
        origin = visit.origin(request_ids[0])
        return running_job(
            self._desk, job, request_ids, origin, self._text_model, limits.max_unread_tokens, self._clock
        )


def _listen(server: grpc.aio.Server, host: str, port: int) -> int:
    """Let `server` listen, once it is clear that the port is free: gRPC itself does not say what is wrong."""
    bind(host, port, _SETTING).close()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise ConfigError(why_not(host, port, _SETTING, OSError(str(error)))) from error
