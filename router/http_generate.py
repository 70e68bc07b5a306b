"""One generate request over HTTP, from its body to the last byte of the answer."""

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from pdserve.contract.errors import (
    Cancelled,
    ErrorCode,
    InvalidRequest,
    PdserveError,
    RequestTooLong,
    Unavailable,
)
from pdserve.contract.ids import RequestId
from pdserve.contract.ports import Clock
from pdserve.contract.work import ModelInfo
from router.api_settings import FAREWELL_S, ApiSettings
from router.choices import Running, running_job
from router.http_reply import HttpReply
from router.intake import Intake, Job
from router.openai_answers import AnswerHead, Usage, chat_answer, completion_answer
from router.openai_errors import CLIENT_GONE_STATUS, error_answer
from router.openai_schema import ChatBody, CompletionBody, parse_json
from router.report_json import placement_text
from router.request_reports import Origin
from router.requests import Desk
from router.sse import ChatEvents, CompletionEvents
from router.text import TextModel
from router.visits import REQUEST_ID, TIMEOUT, TRACEPARENT, TRACESTATE, Visit, Visits, trace_from

COMPLETIONS = "completions"
CHAT = "chat"
_ID_PREFIXES = {COMPLETIONS: "cmpl-", CHAT: "chatcmpl-"}

_MAX_DEADLINE_DIGITS = 12
PLACEMENT_HEADER = "x-pdserve-placement"
"""A request that has it, with any value, gets it back with the workers that serve its choices."""

log = logging.getLogger(__name__)


class BodyTooLarge(RequestTooLong):
    """The body has more bytes than `ApiLimits.max_body_bytes`."""


class ClientGone(Cancelled):
    """The client closed the connection; there is nobody to answer."""


class GenerateEndpoint:
    """An ASGI application that answers POSTs of one kind."""

    def __init__(
        self,
        api: str,
        desk: Desk,
        text_model: TextModel,
        intake: Intake,
        settings: ApiSettings,
        visits: Visits,
        clock: Clock,
    ):
        self._api = api
        self._desk = desk
        self._text_model = text_model
        self._intake = intake
        self._settings = settings
        self._visits = visits
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        visit = self._enter(request)
        reply = HttpReply(scope, send, visit.answer_headers, visit.tell_first_event)
        code, status = (
            ErrorCode.CANCELLED.value,
            CLIENT_GONE_STATUS,
        )  # stays so when the server is stopped meanwhile
        try:
            await self._answer(request, visit, reply)
            code, status = "ok", 200
        except PdserveError as error:
            code, status = await self._refuse(error, reply)
        except Exception:
            log.exception("a %s request failed for a reason that nobody foresaw", self._api)
            code, status = await self._refuse(PdserveError("internal error, see the router's log"), reply)
        finally:
            visit.end(code, status)

    def _enter(self, request: Request) -> Visit:
        headers = request.headers
        trace = trace_from(headers.get(TRACEPARENT), ",".join(headers.getlist(TRACESTATE)))
        return self._visits.enter(self._api, headers.get(REQUEST_ID, ""), trace)

    async def _answer(self, request: Request, visit: Visit, reply: HttpReply) -> None:
        with visit.at_the_door():
            raw = await _read_body(request, self._settings.limits.max_body_bytes)
            with visit.tokenising():
                job = await self._read_job(raw, _read_deadline_s(request))
        asks = bool(request.headers.get(PLACEMENT_HEADER))
        await _until_disconnected(request.receive, reply, self._run(job, visit, reply, asks))

    async def _refuse(self, error: PdserveError, reply: HttpReply) -> tuple[str, int]:
        if isinstance(error, ClientGone):
            return error.info.code, CLIENT_GONE_STATUS
        answer = error_answer(error.info, self._settings.default_retry_after_s)
        status = 413 if isinstance(error, BodyTooLarge) else answer.status
        try:
            async with self._clock.timeout(FAREWELL_S):
                await reply.error(status, answer.body, answer.headers)
        except TimeoutError:
            reply.abort()
        return error.info.code, status

    async def _read_job(self, raw: bytes, deadline_s: float | None) -> Job:
        info = self._desk.model_info()
        if info is None:
            raise Unavailable(f"no model is served yet: {self._desk.readiness().reason}")
        if len(raw) > self._settings.inline_body_bytes:
            return await asyncio.to_thread(self._parse, raw, info, deadline_s)
        return self._parse(raw, info, deadline_s)

    def _parse(self, raw: bytes, info: ModelInfo, deadline_s: float | None) -> Job:
        if self._api == CHAT:
            return self._intake.chat(parse_json(ChatBody, raw), info, deadline_s)
        return self._intake.completion(parse_json(CompletionBody, raw), info, deadline_s)

    async def _run(self, job: Job, visit: Visit, reply: HttpReply, tells_placement: bool) -> None:
        request_ids = visit.admit(job)
        head = AnswerHead(_ID_PREFIXES[self._api] + request_ids[0], int(time.time()), job.model)
        running = self._running(job, request_ids, visit.origin(head.answer_id))
        if tells_placement:
            reply.late_headers = lambda: [(PLACEMENT_HEADER, self._placements(request_ids))]
        if job.stream:
            await self._run_stream(job, head, running, reply)
        else:
            await self._run_whole(job, head, running, reply)

    async def _run_stream(self, job: Job, head: AnswerHead, running: Running, reply: HttpReply) -> None:
        """The answer starts with the first piece, so that an error before it still has its own status."""
        usage = Usage(job)
        events = (ChatEvents if self._api == CHAT else CompletionEvents)(job, head, self._text_model, usage)
        begun: set[int] = set()
        async with running as pieces:
            async for piece in pieces:
                usage.add(piece)
                text = events.piece(piece)
                if piece.index not in begun:
                    begun.add(piece.index)
                    text = events.first(job.choices[piece.index]) + text
                if text:
                    await reply.write_event(text)
            await reply.end_events(events.usage())

    async def _run_whole(self, job: Job, head: AnswerHead, running: Running, reply: HttpReply) -> None:
        answer = chat_answer if self._api == CHAT else completion_answer
        async with running as pieces:
            body = await answer(pieces, job, head, self._text_model)
            await reply.json(200, body)

    def _placements(self, request_ids: Sequence[RequestId]) -> str:
        """Who serves each choice, as far as that is decided."""
        reports = (self._desk.report(request_id) for request_id in request_ids)
        return ", ".join(placement_text(report) for report in reports if report is not None)

    def _running(self, job: Job, request_ids: list[RequestId], origin: Origin) -> Running:
        limits = self._settings.limits
        return running_job(
            self._desk, job, request_ids, origin, self._text_model, limits.max_unread_tokens, self._clock
        )


async def _until_disconnected(receive: Receive, reply: HttpReply, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, and cancel it when the client goes away. Raises ClientGone then."""
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if reply.complete:  # which a server reports like a disconnect
            await asyncio.wait([working])
    finally:
        gone = not working.done()
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
    if gone:
        raise ClientGone("the client closed the connection")
    working.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    try:
        async for part in request.stream():
            parts.append(part)
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise BodyTooLarge(f"the body may have at most {max_bytes} bytes")
    except ClientDisconnect:
        raise ClientGone("the client closed the connection while sending") from None
    return b"".join(parts)


def _read_deadline_s(request: Request) -> float | None:
    """Remaining seconds, from `X-Request-Timeout-Ms`."""
    value = request.headers.get(TIMEOUT)
    if value is None:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= _MAX_DEADLINE_DIGITS and int(value)):
        message = f"header {TIMEOUT} must be a number of milliseconds above 0, got '{value[:60]}'"
        raise InvalidRequest(message, param=TIMEOUT)
    return int(value) / 1000
