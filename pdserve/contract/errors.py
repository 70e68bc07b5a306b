"""Every way in which a request or a start-up can fail, as named types that carry a stable code.

The code is what metrics count, what travels on the wire and what the HTTP and gRPC edges map to a
status. `retryable` says whether placing the same request again can help.
"""

from dataclasses import dataclass
from enum import StrEnum


class ErrorCode(StrEnum):
    INVALID_REQUEST = "invalid_request"
    NOT_FOUND = "not_found"
    REQUEST_TOO_LONG = "request_too_long"
    UNAUTHENTICATED = "unauthenticated"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    CLIENT_TOO_SLOW = "client_too_slow"
    PREEMPTED = "preempted"
    DRAINING = "draining"
    WORKER_LOST = "worker_lost"
    STALLED = "stalled"
    POISONOUS = "poisonous"
    PREFILL_FAILED = "prefill_failed"
    TRANSFER_CORRUPT = "transfer_corrupt"
    FINGERPRINT_MISMATCH = "fingerprint_mismatch"
    STALE_INCARNATION = "stale_incarnation"
    PROTOCOL = "protocol"
    INTERNAL = "internal"


RETRYABLE = frozenset(
    {
        ErrorCode.OVERLOADED,
        ErrorCode.PREEMPTED,
        ErrorCode.DRAINING,
        ErrorCode.WORKER_LOST,
        ErrorCode.STALLED,
        ErrorCode.PREFILL_FAILED,
        ErrorCode.TRANSFER_CORRUPT,
        ErrorCode.FINGERPRINT_MISMATCH,
        ErrorCode.STALE_INCARNATION,
        ErrorCode.UNAVAILABLE,
    }
)


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """An error as it travels: `message` names the cause and, where there is one, the fix."""

    code: ErrorCode
    message: str
    retry_after_s: float | None = None
    param: str | None = None

    @property
    def retryable(self) -> bool:
        return self.code in RETRYABLE


class PdserveError(Exception):
    """Base of all errors of this project. Subclasses fix `code`; `info` is what travels."""

    code = ErrorCode.INTERNAL

    def __init__(self, message: str, *, retry_after_s: float | None = None, param: str | None = None):
        super().__init__(message)
        self.info = ErrorInfo(self.code, message, retry_after_s, param)


class InvalidRequest(PdserveError):
    """The request asks for something that cannot be; `param` names the field."""

    code = ErrorCode.INVALID_REQUEST


class NotFound(PdserveError):
    """The named model, request or worker is not known here."""

    code = ErrorCode.NOT_FOUND


class RequestTooLong(PdserveError):
    """Prompt and output together exceed what the model or the KV pool can ever hold."""

    code = ErrorCode.REQUEST_TOO_LONG


class Overloaded(PdserveError):
    """Too much work is waiting; try again after `retry_after_s`."""

    code = ErrorCode.OVERLOADED


class Unavailable(PdserveError):
    """No worker can serve the request now."""

    code = ErrorCode.UNAVAILABLE


class DeadlineExceeded(PdserveError):
    """The request's own deadline has passed."""

    code = ErrorCode.DEADLINE_EXCEEDED


class Cancelled(PdserveError):
    """The client or an operator ended the request."""

    code = ErrorCode.CANCELLED


class ClientTooSlow(PdserveError):
    """The client has not read its answer for too many tokens; its request is ended and the connection cut."""

    code = ErrorCode.CLIENT_TOO_SLOW


class Preempted(PdserveError):
    """The worker needed the blocks for older requests; the router places the request again."""

    code = ErrorCode.PREEMPTED


class Draining(PdserveError):
    """The worker is about to end and takes no work, or gives back what it has not finished; the router places
    the request elsewhere."""

    code = ErrorCode.DRAINING


class WorkerLost(PdserveError):
    """The worker that served the request died or cannot be reached."""

    code = ErrorCode.WORKER_LOST


class Stalled(PdserveError):
    """An attempt stopped making progress, or some of what was said about it never arrived."""

    code = ErrorCode.STALLED


class EngineBroken(PdserveError):
    """A worker's engine hangs, or its device has failed for good; its process has to end."""

    code = ErrorCode.WORKER_LOST


class Poisonous(PdserveError):
    """The request kills the worker that serves it, also when that serves nothing else."""

    code = ErrorCode.POISONOUS


class PrefillFailed(PdserveError):
    """The prefill call ended without a sealed KV cache."""

    code = ErrorCode.PREFILL_FAILED


class TransferCorrupt(PdserveError):
    """A segment's digest did not match, even after it was sent again."""

    code = ErrorCode.TRANSFER_CORRUPT


class FingerprintMismatch(PdserveError):
    """The two workers serve different models, dtypes, block sizes or protocol versions."""

    code = ErrorCode.FINGERPRINT_MISMATCH


class StaleIncarnation(PdserveError):
    """The message was meant for an earlier incarnation of the worker at this address."""

    code = ErrorCode.STALE_INCARNATION


class ProtocolViolation(PdserveError):
    """The peer sent a message that is not legal in the current state of the call."""

    code = ErrorCode.PROTOCOL


class Replayed(ProtocolViolation):
    """The peer repeats a call or a message that has been taken already."""


class StreamBroken(PdserveError):
    """A stream stopped without its End message: the peer is dead, frozen, cut off or gave up."""

    code = ErrorCode.WORKER_LOST


class Unauthenticated(StreamBroken):
    """The peer belongs to another deployment, or the call did not carry this deployment's token."""

    code = ErrorCode.UNAUTHENTICATED


class ConfigError(PdserveError):
    """A configuration value stops start-up; the message names the key and the fix."""

    code = ErrorCode.INVALID_REQUEST


class ModelUnsupported(PdserveError):
    """The model cannot be served exactly; the message says what it needs that is not there."""

    code = ErrorCode.INVALID_REQUEST


_BY_CODE: dict[ErrorCode, type[PdserveError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        NotFound,
        RequestTooLong,
        Overloaded,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
        ClientTooSlow,
        Preempted,
        Draining,
        WorkerLost,
        Stalled,
        Poisonous,
        PrefillFailed,
        TransferCorrupt,
        FingerprintMismatch,
        StaleIncarnation,
        ProtocolViolation,
    )
}


def error_from_info(info: ErrorInfo) -> PdserveError:
    """The exception for an error that arrived on the wire."""
    kind = _BY_CODE.get(info.code, PdserveError)
    return kind(info.message, retry_after_s=info.retry_after_s, param=info.param)
