"""The OpenAI-compatible HTTP API.

    POST /v1/completions, /v1/chat/completions      GET /v1/models, /v1/models/{id}
    GET  /health (the process lives), /ready (requests can be served), /version

Headers: `X-Request-Id` is echoed (our own id when the client sent none), `traceparent` is taken over, and
`X-Request-Timeout-Ms` is the request's deadline. When the client goes away, at any time, the request is
cancelled everywhere at once; one that stays and does not read is cut (`ApiLimits.max_unread_tokens`).
"""

import time

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import pdserve
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.errors import NotFound, PdserveError
from pdserve.contract.ports import Clock, Rng
from pdserve.contract.tracing import NO_TRACER, Tracer
from router.api_settings import ApiSettings, NoObserver, RequestObserver
from router.http_generate import CHAT, COMPLETIONS, GenerateEndpoint
from router.intake import Intake
from router.openai_errors import error_answer, error_body
from router.requests import Desk
from router.text import TextModel
from router.visits import Visits


def create_app(
    desk: Desk,
    text_model: TextModel,
    settings: ApiSettings | None = None,
    *,
    observer: RequestObserver | None = None,
    rng: Rng | None = None,
    clock: Clock | None = None,
    tracer: Tracer = NO_TRACER,
) -> Starlette:
    """The HTTP API in front of `desk`. `rng` draws the seeds of requests that bring none."""
    settings = settings or ApiSettings()
    clock = clock or LoopClock()
    intake = Intake(text_model, settings, rng or SystemRng())
    visits = Visits(desk, text_model, observer or NoObserver(), tracer, clock, settings.log_prompts)
    pages = _Pages(desk, intake, settings)

    def generate(api: str) -> GenerateEndpoint:
        return GenerateEndpoint(api, desk, text_model, intake, settings, visits, clock)

    routes = [
        Route("/v1/completions", generate(COMPLETIONS), methods=["POST"]),
        Route("/v1/chat/completions", generate(CHAT), methods=["POST"]),
        Route("/v1/models", pages.models),
        Route("/v1/models/{model_id:path}", pages.model),
        Route("/health", pages.health),
        Route("/ready", pages.ready),
        Route("/version", pages.version),
    ]
    handlers = {HTTPException: _plain_http_error, PdserveError: pages.error}
    return Starlette(routes=routes, exception_handlers=handlers)


class _Pages:
    """What can be asked with GET."""

    def __init__(self, desk: Desk, intake: Intake, settings: ApiSettings):
        self._desk = desk
        self._intake = intake
        self._settings = settings
        self._created = int(time.time())

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": self._cards()})

    async def model(self, request: Request) -> Response:
        model_id = request.path_params["model_id"]
        for card in self._cards():
            if card["id"] == model_id:
                return JSONResponse(card)
        raise NotFound(f"model '{model_id}' is not served here; see /v1/models", param="model")

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def ready(self, _: Request) -> Response:
        state = self._desk.readiness()
        body = {"ready": state.ready, "reason": state.reason, "workers": state.workers}
        return JSONResponse(body, 200 if state.ready else 503)

    async def version(self, _: Request) -> Response:
        return JSONResponse({"version": pdserve.__version__})

    async def error(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, PdserveError)
        answer = error_answer(error.info, self._settings.default_retry_after_s)
        return JSONResponse(answer.body, answer.status, answer.headers)

    def _cards(self) -> list[dict[str, object]]:
        """The one model, once a worker has said what it serves."""
        info = self._desk.model_info()
        if info is None:
            return []
        return [
            {
                "id": self._intake.model_name(info),
                "object": "model",
                "created": self._created,
                "owned_by": "pdserve",
                "max_model_len": info.max_model_len,
                "vocab_size": info.vocab_size,
            }
        ]


async def _plain_http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and methods, in the shape of OpenAI's errors."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = error_body(message, "invalid_request_error", None)
    return JSONResponse(body, error.status_code, error.headers)
