"""Who may talk to the admin server: browsers by its own name, from its own page, with the token.

The name (Host) is checked because a page of another site can let its own name point to 127.0.0.1 and then
read what it gets from there; the origin because such a page could otherwise send something on behalf of
whoever looks at it. The token is in a header that the page's own script sets, never in a cookie or a URL.
"""

import re
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdserve.rpc.credentials import AdminToken
from router.openai_errors import error_body

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[\w.-]+)(?::\d{1,5})?", re.ASCII | re.IGNORECASE)
_BEARER = "bearer "

_HEADERS = {
    # Only what the page brings itself: no foreign script or style runs, and nothing is sent elsewhere.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class BrowserGuard:
    """An ASGI application that refuses foreign names and origins, and tells browsers to be strict."""

    def __init__(self, app: ASGIApp, names: Iterable[str] = ()) -> None:
        """`names`: of this server, besides those of loopback."""
        self._app = app
        self._names = {*_LOOPBACK, *(_bracketed(name.lower()) for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope))
        if refusal:
            await _refuse(403, refusal, "forbidden")(scope, receive, _strictly(send))
        else:
            await self._app(scope, receive, _strictly(send))

    def _refusal(self, headers: Headers) -> str:
        """Why the request is refused; empty when it is not."""
        host = headers.get("host", "")
        named = _HOST.fullmatch(host)
        if named is None or named["name"].lower() not in self._names:
            return (
                "this server does not answer to that name: use 127.0.0.1, or add the name to "
                "router.admin.allowed_hosts"
            )
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            return "requests from other origins are refused"
        return ""


class TokenGuard:
    """An ASGI application for those who show the token."""

    def __init__(self, app: ASGIApp, token: AdminToken) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shown = Headers(scope=scope).get("authorization", "")
        is_bearer = shown[: len(_BEARER)].lower() == _BEARER
        if self._token.matches(shown[len(_BEARER) :].strip() if is_bearer else ""):
            await self._app(scope, receive, send)
        else:
            message = "the admin token is missing or wrong: `pdserve admin` shows it"
            await _refuse(401, message, "unauthenticated")(scope, receive, send)


def _refuse(status: int, message: str, code: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(error_body(message, "authentication_error", code), status, headers)


def _strictly(send: Send) -> Send:
    """With the headers that keep browsers strict."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers[name] = value
        await send(message)

    return send_with_headers


def _bracketed(name: str) -> str:
    """As a Host header has it."""
    return f"[{name}]" if ":" in name else name
