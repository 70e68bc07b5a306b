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

from pdserve.rpc.credentials import AdminToken
from router.admin.guard import BrowserGuard, TokenGuard
from router.admin.state import LiveState

PAGE_PATH = "/admin/"
_UNCACHED = {"cache-control": "no-store"}


def create_admin_app(live: LiveState, api: ASGIApp, token: AdminToken, names: Iterable[str] = ()) -> ASGIApp:
    """`api` is the router's own HTTP API; `names` are those of this server besides loopback's."""
    pages = _Pages(live)
    with_token = [Middleware(TokenGuard, token=token)]
    page = StaticFiles(directory=str(files("router.admin") / "page"), html=True)
    routes = [
        Route("/admin/state", pages.state, middleware=with_token),
        Route("/admin/events", pages.events, middleware=with_token),
        Mount("/admin/api", api, middleware=with_token),
        Mount("/admin", page),  # without the token: the page's files are the same everywhere
        Route("/", _to_page),
    ]
    return BrowserGuard(Starlette(routes=routes), names)


class _Pages:
    """What needs the token."""

    def __init__(self, live: LiveState) -> None:
        self._live = live

    async def state(self, _: Request) -> Response:
        return JSONResponse(self._live.snapshot().as_json(), headers=_UNCACHED)

    async def events(self, _: Request) -> Response:
        return StreamingResponse(self._live.events(), media_type="text/event-stream", headers=_UNCACHED)


async def _to_page(_: Request) -> Response:
    return RedirectResponse(PAGE_PATH)
