"""What is told about single requests: a report of each that runs, and of the last ones that ended. Pure.

A report is an immutable snapshot. All its times are seconds from the request's admission, by the router's
clock. What workers have measured themselves (`RequestTimings`) is laid behind the time at which the attempt
was submitted; the ways of messages are not in it, so what is derived from it may have been that much later.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from heapq import merge
from itertools import islice
from typing import Protocol

from pdserve.contract.errors import ErrorInfo
from pdserve.contract.ids import RequestId, WorkerId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.tracing import TraceContext
from router.placement.policy import Option, Prediction

MAX_ENDED_REPORTS = 1024
"""How many ended requests are remembered: minutes of a busy router, in 1.3 MB (1.2 KB for a request that was
served at its first attempt). By `MAX_ATTEMPTS` and `MAX_TEXT` the worst is 26 MB."""

MAX_REFUSED_REPORTS = 256
"""How many refused requests are remembered: so many of them may come that nothing else would be left."""

MAX_ATTEMPTS = 16
"""How many attempts of one request are remembered, the last ones. All are counted."""

MAX_TEXT = 400
"""How many characters are kept of an error's message or of a placement's reason."""


class RequestState(StrEnum):
    WAITING = "waiting"
    """No worker has it."""
    PROMPT = "prompt"
    """Submitted; the attempt's first token has not come: queued, or its prompt is being computed."""
    DECODING = "decoding"
    ENDED = "ended"


class StageName(StrEnum):
    ROUTER_QUEUE = "router queue"
    """Until a worker was found and the attempt submitted."""
    PREFILL_QUEUE = "prefill queue"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    """What of the KV's way was not hidden by the prefill: from its end until everything was verified."""
    PROMPT = "prompt"
    """Queue and prefill, where nobody has told where one ended and the other began."""
    DECODE = "decode"
    """From the attempt's first token to its end."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A bar of a request's timeline. `end_s` None: it lasts."""

    name: StageName
    attempt: int
    start_s: float
    end_s: float | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a request came from."""

    api: str = ""
    """``completions``, ``chat`` or ``grpc``; empty within one process."""
    model: str = ""
    """What the client calls the model."""
    answer_id: str = ""
    """Of the answer that it is a choice of."""
    choice: int = 0
    """Its index in that answer. Every choice is a request of its own."""
    client_request_id: str = ""
    """The client's X-Request-Id."""
    trace: TraceContext | None = None
    """The span of the API's call; None where nothing is traced."""


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """One submission of a request to workers."""

    number: int
    """From 1."""
    decode_worker: WorkerId
    prefill_worker: WorkerId | None
    """None: the decode worker computes the prompt itself."""
    placement: str
    """Why these workers."""
    submitted_s: float
    first_token_s: float | None
    second_token_s: float | None
    """The first that waits for the KV."""
    ended_s: float | None
    end: str | None
    """A finish reason, an error code, or why it was cancelled; None while it runs."""
    message: str | None
    """Of the error that ended it."""
    timings: RequestTimings | None
    """What its workers have told so far."""
    predicted: Prediction | None = None
    """Of this placement, from the submission on."""
    runner_up: Option | None = None
    """The best of the placements not chosen."""

    @property
    def stages(self) -> Iterator[Stage]:
        """Where its time went, in the order of their beginnings."""
        if self.timings is None:
            yield Stage(StageName.PROMPT, self.number, self.submitted_s, self.ended_s)
            return
        began_s = self.submitted_s + self.timings.queue_s
        prefilled_s = began_s + self.timings.prefill_s
        yield Stage(StageName.PREFILL_QUEUE, self.number, self.submitted_s, began_s)
        yield Stage(StageName.PREFILL, self.number, began_s, prefilled_s)
        if self.timings.transfer_is_whole:
            verified_s = prefilled_s + self.timings.transfer_exposed_s
            yield Stage(StageName.TRANSFER, self.number, prefilled_s, verified_s)
        if self.first_token_s is not None:
            yield Stage(StageName.DECODE, self.number, self.first_token_s, self.ended_s)


@dataclass(frozen=True, slots=True)
class RequestReport:
    """All that the router knows about one request, but none of its tokens."""

    request_id: RequestId
    origin: Origin
    arrived_at: float
    """Unix time of the admission, or of the arrival of one that was refused, in seconds."""
    num_prompt_tokens: int | None
    """None when it was refused before they were counted."""
    num_output_tokens: int
    """That have come to the router."""
    attempts: tuple[AttemptReport, ...]
    """The last MAX_ATTEMPTS, oldest first."""
    num_attempts: int
    recoveries: Mapping[str, int]
    """How often it was placed again, by the error code of the attempt before."""
    first_token_s: float | None
    second_token_s: float | None
    """The first that waits for the KV."""
    last_token_s: float | None
    ended_s: float | None
    outcome: str | None
    """A finish reason or an error code, ``cancelled`` when the client left; None while it runs."""
    message: str | None
    """Of the error that the client was told."""

    @property
    def state(self) -> RequestState:
        if self.outcome is not None:
            return RequestState.ENDED
        if not self.attempts or self.attempts[-1].end is not None:
            return RequestState.WAITING
        started = self.attempts[-1].first_token_s is not None
        return RequestState.DECODING if started else RequestState.PROMPT

    @property
    def timings(self) -> RequestTimings | None:
        """Of the last attempt that has told any."""
        told = (attempt.timings for attempt in reversed(self.attempts) if attempt.timings is not None)
        return next(told, None)

    @property
    def stages(self) -> Iterator[Stage]:
        """Where its time went, attempt by attempt. Those of one attempt may overlap: the first token passes
        the KV, and decoding counts from it."""
        free_s: float | None = 0.0  # since when no worker has it
        if self.attempts and self.attempts[0].number > 1:
            free_s = None
        for attempt in self.attempts:
            if free_s is not None:
                yield Stage(StageName.ROUTER_QUEUE, attempt.number, free_s, attempt.submitted_s)
            yield from attempt.stages
            free_s = attempt.ended_s
        if self.state is RequestState.WAITING:
            yield Stage(StageName.ROUTER_QUEUE, self.num_attempts + 1, free_s or 0.0, None)


@dataclass(frozen=True, slots=True)
class Decision:
    """One placement and what came of it."""

    request_id: RequestId
    num_prompt_tokens: int | None
    decided_at: float
    """Unix time, in seconds."""
    attempt: AttemptReport


class Reported(Protocol):
    """A request that runs (`router.progress.Progress`)."""

    @property
    def request_id(self) -> RequestId: ...

    def report(self) -> RequestReport:
        """How far it is."""
        ...


class RequestReports:
    """The reports of one router: of every request that runs, and of the last ones that have ended."""

    def __init__(self, max_ended: int = MAX_ENDED_REPORTS) -> None:
        self._max_ended = max_ended
        self._running: dict[RequestId, Reported] = {}  # oldest first
        self._ended: dict[RequestId, RequestReport] = {}  # the one that ended first comes first
        self._refused: dict[RequestId, RequestReport] = {}  # likewise

    def begin(self, request: Reported) -> None:
        """From now on it is one of those that run."""
        self._running[request.request_id] = request

    def end(self, report: RequestReport) -> None:
        """It runs no more; `report` is its last."""
        del self._running[report.request_id]
        _remember(self._ended, report, self._max_ended)

    def refuse(self, report: RequestReport) -> None:
        """It was never one of those that run."""
        _remember(self._refused, report, MAX_REFUSED_REPORTS)

    def find(self, request_id: str) -> RequestReport | None:
        """The report of one request; None when it was never here or has been forgotten."""
        key = RequestId(request_id)
        running = self._running.get(key)
        return running.report() if running is not None else self._ended.get(key) or self._refused.get(key)

    def running(self) -> list[RequestReport]:
        """Of all requests that run, the newest first."""
        return _reports(reversed(self._running.values()))

    def decisions(self, limit: int) -> list[Decision]:
        """The last `limit` placements of the requests that are remembered, the last first."""
        reports = [*self.running(), *self.recent(limit)]
        decided = [
            Decision(
                report.request_id,
                report.num_prompt_tokens,
                report.arrived_at + attempt.submitted_s,
                attempt,
            )
            for report in reports
            for attempt in report.attempts
        ]
        return sorted(decided, key=lambda each: each.decided_at, reverse=True)[:limit]

    def recent(self, limit: int) -> list[RequestReport]:
        """Of the last `limit` requests that have ended or were refused, the last first."""
        both = (reversed(self._ended.values()), reversed(self._refused.values()))
        return list(islice(merge(*both, key=_ended_at, reverse=True), limit))


def refused_report(
    request_id: RequestId,
    origin: Origin,
    error: ErrorInfo,
    now: float,
    waited_s: float,
    num_prompt_tokens: int | None,
) -> RequestReport:
    """Of a request that was refused before it was admitted, `waited_s` seconds after it came; `now` is Unix
    time."""
    return RequestReport(
        request_id=request_id,
        origin=origin,
        arrived_at=now - waited_s,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=0,
        attempts=(),
        num_attempts=0,
        recoveries={},
        first_token_s=None,
        second_token_s=None,
        last_token_s=None,
        ended_s=waited_s,
        outcome=error.code.value,
        message=shortened(error.message),
    )


def shortened(text: str) -> str:
    """At most MAX_TEXT characters."""
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 3] + "..."


def _reports(requests: Iterable[Reported]) -> list[RequestReport]:
    return [request.report() for request in requests]


def _remember(reports: dict[RequestId, RequestReport], report: RequestReport, limit: int) -> None:
    reports[report.request_id] = report
    if len(reports) > limit:
        del reports[next(iter(reports))]


def _ended_at(report: RequestReport) -> float:
    """Unix time."""
    return report.arrived_at + (report.ended_s or 0.0)
