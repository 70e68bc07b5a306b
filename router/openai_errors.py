"""Errors as OpenAI's APIs give them: a status, a JSON body and, where waiting helps, Retry-After."""

import math
from dataclasses import dataclass
from typing import Any

from pdserve.contract.errors import ErrorCode, ErrorInfo

CLIENT_GONE_STATUS = 499
"""Never sent: the client closed the connection. What proxies call it."""


@dataclass(frozen=True, slots=True)
class _Kind:
    status: int
    type: str


_INVALID = "invalid_request_error"
_SERVER = "server_error"

_KINDS = {
    ErrorCode.INVALID_REQUEST: _Kind(400, _INVALID),
    ErrorCode.REQUEST_TOO_LONG: _Kind(400, _INVALID),
    ErrorCode.NOT_FOUND: _Kind(404, _INVALID),
    ErrorCode.UNAUTHENTICATED: _Kind(401, "authentication_error"),
    ErrorCode.OVERLOADED: _Kind(429, "rate_limit_error"),
    ErrorCode.CANCELLED: _Kind(503, _SERVER),
    ErrorCode.DEADLINE_EXCEEDED: _Kind(504, "timeout_error"),
    ErrorCode.CLIENT_TOO_SLOW: _Kind(408, "timeout_error"),
    ErrorCode.UNAVAILABLE: _Kind(503, _SERVER),
    ErrorCode.PREEMPTED: _Kind(503, _SERVER),
    ErrorCode.DRAINING: _Kind(503, _SERVER),
    ErrorCode.WORKER_LOST: _Kind(503, _SERVER),
    ErrorCode.STALLED: _Kind(503, _SERVER),
    ErrorCode.POISONOUS: _Kind(500, _SERVER),
    ErrorCode.PREFILL_FAILED: _Kind(503, _SERVER),
}
_INTERNAL = _Kind(500, _SERVER)

_OPENAI_CODES = {ErrorCode.REQUEST_TOO_LONG: "context_length_exceeded"}


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def error_answer(info: ErrorInfo, default_retry_after_s: float) -> ErrorAnswer:
    """How an error is answered."""
    status = error_status(info.code)
    kind = _KINDS.get(info.code, _INTERNAL)
    code = "model_not_found" if (info.code, info.param) == (ErrorCode.NOT_FOUND, "model") else info.code
    body = error_body(info.message, kind.type, _OPENAI_CODES.get(info.code, str(code)), info.param)
    return ErrorAnswer(status, body, _retry_after(status, info, default_retry_after_s))


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_status(code: ErrorCode) -> int:
    """The HTTP status of an error."""
    return _KINDS.get(code, _INTERNAL).status


def _retry_after(status: int, info: ErrorInfo, default_s: float) -> dict[str, str]:
    if status not in (429, 503):
        return {}
    wait_s = default_s if info.retry_after_s is None else info.retry_after_s
    return {"Retry-After": str(max(1, math.ceil(wait_s)))}
