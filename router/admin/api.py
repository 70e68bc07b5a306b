"""The admin server's paths, and what keeps each of them."""

from collections.abc import Iterable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from pdserve.clock import LoopClock
from pdserve.contract.ports import Clock
from pdserve.rpc.credentials import AdminToken
from router.admin.guard import BrowserGuard, TokenGuard
from router.admin.state import LiveState
from router.openai_errors import error_body
from router.report_json import decision_json, report_json
from router.request_reports import MAX_ENDED_REPORTS, RequestReports

PAGE_PATH = "/admin/"
DEFAULT_LIMIT = 50
"""Of requests in a list."""
_UNCACHED = {"cache-control": "no-store"}


def create_admin_app(
    live: LiveState,
    reports: RequestReports,
    api: ASGIApp,
    token: AdminToken,
    names: Iterable[str] = (),
    clock: Clock | None = None,
) -> ASGIApp:
    """`api` is the router's own HTTP API; `names` are those of this server besides loopback's."""
    pages = _Pages(live, reports, clock or LoopClock())
    with_token = [Middleware(TokenGuard, token=token)]
    page = StaticFiles(directory=str(files("router.admin") / "page"), html=True)
    routes = [
        Route("/admin/state", pages.state, middleware=with_token),
        Route("/admin/events", pages.events, middleware=with_token),
        Route("/admin/requests", pages.requests, middleware=with_token),
        Route("/admin/requests/{request_id}", pages.request, middleware=with_token),
        Route("/admin/decisions", pages.decisions, middleware=with_token),
        Mount("/admin/api", api, middleware=with_token),
        Mount("/admin", page),  # without the token: the page's files are the same everywhere
        Route("/", _to_page),
    ]
    return BrowserGuard(Starlette(routes=routes), names)


class _Pages:
    """What needs the token."""

    def __init__(self, live: LiveState, reports: RequestReports, clock: Clock) -> None:
        self._live = live
        self._reports = reports
        self._clock = clock

    async def state(self, _: Request) -> Response:
        return JSONResponse(self._live.snapshot().as_json(), headers=_UNCACHED)

    async def events(self, _: Request) -> Response:
        return StreamingResponse(self._live.events(), media_type="text/event-stream", headers=_UNCACHED)

    async def requests(self, request: Request) -> Response:
        """The newest first, those that run before those that have ended."""
        limit = _read_limit(request.query_params.get("limit"))
        if limit is None:
            return _bad_limit()
        reports = [*self._reports.running(), *self._reports.recent(limit)][:limit]
        body = {"now": self._clock.unix_time(), "requests": [report_json(report) for report in reports]}
        return JSONResponse(body, headers=_UNCACHED)

    async def decisions(self, request: Request) -> Response:
        """Why requests were placed as they were, and what came of it, the newest first."""
        limit = _read_limit(request.query_params.get("limit"))
        if limit is None:
            return _bad_limit()
        decisions = [decision_json(decision) for decision in self._reports.decisions(limit)]
        return JSONResponse({"now": self._clock.unix_time(), "decisions": decisions}, headers=_UNCACHED)

    async def request(self, request: Request) -> Response:
        request_id = request.path_params["request_id"]
        report = self._reports.find(request_id)
        if report is None:
            return _error(404, f"no request {request_id!r} is known here (any more)", "not_found")
        return JSONResponse(report_json(report), headers=_UNCACHED)


def _read_limit(text: str | None) -> int | None:
    """None when it is not valid."""
    if text is None:
        return DEFAULT_LIMIT
    limit = int(text) if text.isascii() and text.isdigit() and len(text) <= 6 else 0
    return limit if 1 <= limit <= MAX_ENDED_REPORTS else None


def _bad_limit() -> Response:
    return _error(400, f"'limit' must be a number from 1 to {MAX_ENDED_REPORTS}", "invalid_request")


def _error(status: int, message: str, code: str) -> Response:
    return JSONResponse(error_body(message, "invalid_request_error", code), status, _UNCACHED)


async def _to_page(_: Request) -> Response:
    return RedirectResponse(PAGE_PATH)
