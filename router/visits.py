"""One call of an API from its arrival to its answer: its ids, its span, and what is told of it where it never
becomes a request of the journey's."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pdserve.contract.errors import ErrorCode, ErrorInfo, PdserveError
from pdserve.contract.ids import RequestId
from pdserve.contract.ports import Clock
from pdserve.contract.tracing import SpanKind, TraceContext, Tracer
from router.api_settings import RequestObserver
from router.intake import Job
from router.openai_schema import ChatBody, CompletionBody
from router.request_log import log_prompt
from router.request_reports import Origin
from router.requests import Desk
from router.text import TextModel

REQUEST_ID = "x-request-id"
TRACEPARENT = "traceparent"
TRACESTATE = "tracestate"
TIMEOUT = "X-Request-Timeout-Ms"

_MAX_CLIENT_ID = 256
_MAX_TRACEPARENT = 256
_MAX_TRACESTATE = 1024
_QUOTING = (ErrorCode.INVALID_REQUEST, ErrorCode.NOT_FOUND)
"""Errors whose messages quote what the client sent."""
_FIELDS = {*CompletionBody.model_fields, *ChatBody.model_fields, TIMEOUT}


class Visits:
    """Receives the calls of one API server."""

    def __init__(
        self,
        desk: Desk,
        text_model: TextModel,
        observer: RequestObserver,
        tracer: Tracer,
        clock: Clock,
        log_prompts: bool,
    ) -> None:
        self.desk = desk
        self.text_model = text_model
        self.observer = observer
        self.tracer = tracer
        self.clock = clock
        self.log_prompts = log_prompts

    def enter(self, api: str, request_id: str, trace: TraceContext | None) -> "Visit":
        """`request_id` and `trace` are what the client sent; "" and None where it sent none."""
        return Visit(self, api, request_id[:_MAX_CLIENT_ID], trace)


class Visit:
    """From `Visits.enter` to `end`."""

    def __init__(self, visits: Visits, api: str, client_request_id: str, trace: TraceContext | None) -> None:
        self._visits = visits
        self._api = api
        self._client_request_id = client_request_id
        self._arrived_at = visits.clock.now()
        self._model = ""
        self._has_begun = False
        self.request_id = visits.desk.new_request_id()
        """Of the first choice, or of the call when it is refused."""
        self._span = visits.tracer.begin(api, SpanKind.SERVER, trace, {"pdserve.request_id": self.request_id})
        visits.observer.on_request_start(api)

    @property
    def answer_headers(self) -> list[tuple[str, str]]:
        """By which the client finds its request in logs, reports and traces."""
        headers = [(REQUEST_ID, self._client_request_id or self.request_id)]
        if self._span.context is not None:
            headers.append((TRACEPARENT, self._span.context.traceparent))
        return headers

    @contextmanager
    def at_the_door(self) -> Iterator[None]:
        """Where the call is read. What fails here is reported and logged, since no journey will do it."""
        try:
            yield
        except PdserveError as error:
            info = error.info if self._visits.log_prompts else _without_quotes(error.info)
            waited_s = self._visits.clock.now() - self._arrived_at
            self._visits.desk.refuse(self.request_id, self.origin(), info, waited_s)
            raise

    @contextmanager
    def tokenising(self) -> Iterator[None]:
        """Where a body becomes checked tokens; it is told how long that takes."""
        began_at = self._visits.clock.now()
        yield
        self._visits.observer.on_tokenised(self._api, self._visits.clock.now() - began_at)

    def tell_first_event(self) -> None:
        """Tokens of a streamed answer have been written; the first ones are told of."""
        if not self._has_begun:
            self._has_begun = True
            self._visits.observer.on_first_event(self._api, self._visits.clock.now() - self._arrived_at)

    def admit(self, job: Job) -> list[RequestId]:
        """The ids of the job's choices."""
        self._model = job.model
        others = [self._visits.desk.new_request_id() for _ in job.choices[1:]]
        request_ids = [self.request_id, *others]
        if self._visits.log_prompts:
            for request_id, choice in zip(request_ids, job.choices, strict=True):
                log_prompt(request_id, choice, self._visits.text_model)
        return request_ids

    def origin(self, answer_id: str = "") -> Origin:
        """Of the first choice of the answer; without `answer_id` of a call that gets none."""
        return Origin(
            self._api,
            self._model,
            answer_id,
            client_request_id=self._client_request_id,
            trace=self._span.context,
        )

    def end(self, code: str, status: int) -> None:
        """`code` is ``ok`` or an error code; `status` the HTTP status that it maps to."""
        self._visits.observer.on_request_end(self._api, code, status)
        self._span.end(code, {"pdserve.model": self._model})


def trace_from(traceparent: str | None, tracestate: str) -> TraceContext | None:
    """What a client sent in its headers or metadata. What is too long is not taken."""
    if traceparent is None or len(traceparent) > _MAX_TRACEPARENT:
        return None
    return TraceContext(traceparent, tracestate if len(tracestate) <= _MAX_TRACESTATE else "")


def _without_quotes(info: ErrorInfo) -> ErrorInfo:
    """Names the field instead of what was in it, which may be a part of a prompt."""
    if info.code not in _QUOTING:
        return info
    field = (info.param or "").partition("[")[0].partition(".")[0]
    where = f" with '{field}'" if field in _FIELDS else ""
    return replace(info, message=f"the client was told what is wrong{where}", param=None)
