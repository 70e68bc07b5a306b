"""How far one request is: what the journey goes by, and what its report is made of."""

from collections import Counter, deque
from dataclasses import dataclass, field

from pdserve.contract.errors import ErrorInfo
from pdserve.contract.ids import BlockHash, RequestId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.tokens import num_tokens
from pdserve.contract.tracing import NO_SPAN, Span
from router.fleet import Identity
from router.links import SubmissionTokens
from router.objectives import Pace
from router.placement.policy import Placement
from router.request_reports import MAX_ATTEMPTS, AttemptReport, RequestReport, shortened
from router.requests import Closing, GenerateRequest


@dataclass(slots=True, eq=False)
class Attempt:
    """One submission of a request to workers. Times are the router's clock."""

    number: int
    placement: Placement
    submitted_at: float
    num_known: int
    """Prompt and output tokens then."""
    first_token_at: float | None = None
    second_token_at: float | None = None
    num_tokens: int = 0
    """That it has brought and the client did not have."""
    ended_at: float | None = None
    end: str | None = None
    """A finish reason, an error code, or why it was cancelled."""
    message: str | None = None
    timings: RequestTimings | None = None
    span: Span = NO_SPAN

    def note(self, tokens: SubmissionTokens) -> None:
        """What has come that the client does not have yet."""
        self.num_tokens += num_tokens(tokens.event.tokens)
        if self.first_token_at is None:
            self.first_token_at = tokens.arrived_at
        if self.second_token_at is None and self.num_tokens >= 2:
            self.second_token_at = tokens.arrived_at
        if tokens.timings is not None:
            self.timings = tokens.timings
        if tokens.event.finish is not None:
            self.ended(tokens.event.finish.value, tokens.arrived_at)

    def ended(self, end: str, now: float, message: str | None = None) -> None:
        """The first end counts."""
        if self.end is None:
            self.end, self.ended_at, self.message = end, now, message
            self.span.end(end)

    def report(self, admitted_at: float) -> AttemptReport:
        return AttemptReport(
            number=self.number,
            decode_worker=self.placement.decode,
            prefill_worker=self.placement.prefill,
            placement=shortened(self.placement.reason),
            submitted_s=self.submitted_at - admitted_at,
            first_token_s=_since(admitted_at, self.first_token_at),
            second_token_s=_since(admitted_at, self.second_token_at),
            ended_s=_since(admitted_at, self.ended_at),
            end=self.end,
            message=None if self.message is None else shortened(self.message),
            timings=self.timings,
            predicted=self.placement.predicted,
            runner_up=self.placement.runner_up,
        )


@dataclass(slots=True, eq=False)
class Progress:
    """How far one request is."""

    request_id: RequestId
    request: GenerateRequest
    seed: int
    arrived_at: float  # unix time
    admitted_at: float
    deadline_at: float | None
    closing: Closing
    span: Span = NO_SPAN
    names: list[BlockHash] = field(default_factory=list)  # of the prompt's blocks that caches may have
    named_for: str | None = None
    """The fingerprint of the model whose names these are."""
    output: bytearray = field(default_factory=bytearray)  # tokens that the client has
    fingerprint: str | None = None
    """Of the worker that its output came from; the rest comes from such a one."""
    num_attempts: int = 0
    attempts: deque[Attempt] = field(default_factory=lambda: deque(maxlen=MAX_ATTEMPTS))
    fruitless_attempts: int = 0
    recoveries: Counter[str] = field(default_factory=Counter)  # error code -> attempts that followed it
    lost: set[Identity] = field(default_factory=set)
    """Workers that were lost while they had it."""
    lost_alone: Identity | None = None
    """One that was lost while it served nothing else."""
    is_suspect: bool = False
    first_token_at: float | None = None
    second_token_at: float | None = None
    last_token_at: float | None = None
    longest_gap_s: float = 0.0
    """Between two arrivals of tokens."""
    ended_at: float | None = None
    outcome: str | None = None
    """A finish reason or an error code."""
    error: ErrorInfo | None = None
    """What the client was told."""

    @property
    def num_prompt(self) -> int:
        return num_tokens(self.request.prompt_tokens)

    @property
    def num_output(self) -> int:
        """Output tokens that the client has."""
        return num_tokens(self.output)

    @property
    def num_known(self) -> int:
        """Prompt and output so far."""
        return self.num_prompt + self.num_output

    @property
    def most_tokens(self) -> int:
        """Prompt and output when the request runs to max_tokens."""
        return self.num_prompt + self.request.sampling.max_tokens

    @property
    def exemplar(self) -> dict[str, str]:
        """What a histogram keeps of it."""
        return {"request_id": self.request_id}

    @property
    def waiting_since(self) -> float | None:
        """Since when no worker has it; None while one does."""
        last = self.attempts[-1] if self.attempts else None
        return self.admitted_at if last is None else last.ended_at

    def next_attempt(self, placement: Placement, now: float, span: Span = NO_SPAN) -> Attempt:
        """It is submitted once more."""
        self.num_attempts += 1
        attempt = Attempt(self.num_attempts, placement, now, self.num_known, span=span)
        self.attempts.append(attempt)
        return attempt

    def note_gap(self, seconds: float) -> bool:
        """Tokens have come so long after those before them; whether no wait of the request was longer."""
        is_longest = seconds > self.longest_gap_s
        if is_longest:
            self.longest_gap_s = seconds
        return is_longest

    def pace(self, now: float) -> Pace:
        """How fast it has been served until `now`, its end."""
        return Pace(
            first_token_s=_since(self.admitted_at, self.first_token_at),
            last_token_s=_since(self.admitted_at, self.last_token_at),
            longest_gap_s=self.longest_gap_s,
            num_output_tokens=self.num_output,
            ended_s=now - self.admitted_at,
        )

    def report(self) -> RequestReport:
        return RequestReport(
            request_id=self.request_id,
            origin=self.request.origin,
            arrived_at=self.arrived_at,
            num_prompt_tokens=self.num_prompt,
            num_output_tokens=self.num_output,
            attempts=tuple(attempt.report(self.admitted_at) for attempt in self.attempts),
            num_attempts=self.num_attempts,
            recoveries=dict(self.recoveries),
            first_token_s=_since(self.admitted_at, self.first_token_at),
            second_token_s=_since(self.admitted_at, self.second_token_at),
            last_token_s=_since(self.admitted_at, self.last_token_at),
            ended_s=_since(self.admitted_at, self.ended_at),
            outcome=self.outcome,
            message=None if self.error is None else shortened(self.error.message),
        )


def _since(admitted_at: float, at: float | None) -> float | None:
    return None if at is None else at - admitted_at
