"""A generate request as the journey sees it: tokens in, tokens out, no text and no HTTP."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol

from pdserve.contract.errors import ErrorInfo
from pdserve.contract.ids import RequestId
from pdserve.contract.messages import CancelReason, RequestTimings
from pdserve.contract.sampling import FinishReason, SamplingParams
from pdserve.contract.tokens import TokenBytes
from pdserve.contract.work import ModelInfo, TokenLogprobs
from router.request_reports import Origin, RequestReport


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Validated: every bound of `sampling` and every token id has been checked against the model."""

    prompt_tokens: TokenBytes
    sampling: SamplingParams
    seed: int | None = None
    """None lets the router draw one."""
    deadline_s: float | None = None
    """Remaining time at arrival."""
    priority: int = 0
    cache_salt: str = ""
    origin: Origin = field(default_factory=Origin)
    """Told in its report."""


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """New output tokens of one request, in order, each exactly once."""

    tokens: TokenBytes
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    timings: RequestTimings | None = None
    """With the first delta of each attempt, as far as it is known then, whenever more is known, and with the
    last."""


@dataclass(slots=True)
class Closing:
    """Why a request's generator is closed before its end; whoever closes it says so, for the metrics."""

    reason: CancelReason = CancelReason.CLIENT_LEFT


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether requests can be served now, and if not, what is missing."""

    ready: bool
    reason: str
    workers: dict[str, int] = field(default_factory=dict)
    """Ready workers by role."""


class Desk(Protocol):
    """What the HTTP and gRPC edges need from the rest of the router."""

    def model_info(self) -> ModelInfo | None:
        """None until the first worker has said what it serves."""
        ...

    def readiness(self) -> Readiness: ...

    def new_request_id(self) -> RequestId: ...

    def generate(
        self, request_id: RequestId, request: GenerateRequest, closing: Closing | None = None
    ) -> AsyncGenerator[OutputDelta, None]:
        """Serve one request. Closing the generator cancels it everywhere. Raises PdserveError subclasses."""
        ...

    def refuse(self, request_id: RequestId, origin: Origin, error: ErrorInfo, waited_s: float) -> None:
        """Report and log a request that gets no further than the API, `waited_s` seconds after it came."""
        ...

    def report(self, request_id: RequestId) -> RequestReport | None:
        """How a request went, or how far it is; None when it has been forgotten."""
        ...
