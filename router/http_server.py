"""Uvicorn inside the running event loop: bound at once or not at all, silent, stopped when asked, and with
bounds on how long and how large a request may be before it has arrived."""

import asyncio
import contextlib
import json
import math
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.http_reply import ABORT
from router.listen import bind
from router.openai_errors import error_body

_BACKLOG = 2048

REQUEST_TIMEOUT_S = 60.0
"""How long a client may take by default to send a whole request, its body included."""

IDLE_TIMEOUT_S = 75.0
"""How long a connection is kept for a client's next request. Longer than clients and proxies keep theirs (the
official client 5 s, proxies up to 60 s): who closes first must be who sends, or a request meets the close."""

MAX_HEAD_BYTES = 64 << 10
"""Of a request's first line and headers."""


class HttpServer:
    """A server that runs until `stop`."""

    def __init__(self, server: "_EmbeddedServer", listener: socket.socket, task: "asyncio.Task[None]"):
        self._server = server
        self._listener = listener
        self._task = task

    @property
    def port(self) -> int:
        """The real port when 0 was asked for."""
        return int(self._listener.getsockname()[1])

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no new connections, give open answers `grace_s` seconds, then cancel them."""
        self._server.config.timeout_graceful_shutdown = math.ceil(grace_s)
        self._server.should_exit = True
        await self._task


async def serve_http(
    app: ASGIApp,
    host: str,
    port: int,
    request_timeout_s: float = REQUEST_TIMEOUT_S,
    setting: str = "HTTP port (--port)",
) -> HttpServer:
    """Serve `app` on host:port; returns when connections are taken. A client whose request has not arrived
    after `request_timeout_s` is cut. Raises ConfigError with `setting` when the port cannot be had."""
    listener = bind(host, port, setting)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    config = uvicorn.Config(
        app,
        http=partial(_Connection, request_timeout_s),  # type: ignore[arg-type]  # as good as a class here
        log_config=None,
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=math.ceil(IDLE_TIMEOUT_S),
    )
    server = _EmbeddedServer(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name=f"http-{port}")
    started = asyncio.create_task(server.up.wait())
    await asyncio.wait((task, started), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        started.cancel()
        task.result()
    return HttpServer(server, listener, task)


class _Connection(HttpToolsProtocol):
    """Bounds what a request may be before the application sees it, which uvicorn does not.

    It also lets an application abort the connection, which ASGI itself has no word for: `close` would wait
    for a client that does not read.
    """

    def __init__(self, request_timeout_s: float, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_timeout_s = request_timeout_s
        self._arriving: asyncio.TimerHandle | None = None  # until the request has arrived
        self._num_head_bytes: int | None = 0  # of the request that arrives; None when its head is complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._request_is_here()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._num_head_bytes is not None:
            self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes is not None and self._num_head_bytes > MAX_HEAD_BYTES:
            self._refuse("431 Request Header Fields Too Large", f"the head exceeds {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_request()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}

    def on_headers_complete(self) -> None:
        self._num_head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._request_is_here()
        self._num_head_bytes = 0
        super().on_message_complete()

    def _expect_request(self) -> None:
        if self._arriving is None:
            self._arriving = self.loop.call_later(self._request_timeout_s, self._give_up)

    def _request_is_here(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _give_up(self) -> None:
        self._refuse("408 Request Timeout", f"the request was not here after {self._request_timeout_s:g} s")

    def _refuse(self, status: str, message: str) -> None:
        """Answer, unless an answer has begun, and close."""
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(_refusal(status, message))
        self.transport.close()


def _refusal(status: str, message: str) -> bytes:
    body = json.dumps(error_body(message, "invalid_request_error", "invalid_request")).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"connection: close\r\n\r\n" + body


class _EmbeddedServer(uvicorn.Server):
    """Leaves signals to whoever owns the process, and says when it is up."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.up = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()
