"""Uvicorn inside the running event loop: bound at once or not at all, silent, stopped when asked."""

import asyncio
import contextlib
import math
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from router.http_reply import ABORT
from router.listen import bind

_BACKLOG = 2048


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


async def serve_http(app: ASGIApp, host: str, port: int) -> HttpServer:
    """Serve `app` on host:port; returns when connections are taken. Raises ConfigError when the port
    cannot be had."""
    listener = bind(host, port, "HTTP port (--port)")
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    config = uvicorn.Config(
        app,
        http=_Connection,
        log_config=None,
        log_level="critical",
        access_log=False,
        lifespan="off",
        server_header=False,
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
    """Lets an application abort the connection, which ASGI itself has no word for: `close` would wait for a
    client that does not read."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: {"abort": self.transport.abort}}


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
