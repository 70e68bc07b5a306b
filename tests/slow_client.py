"""A client of the HTTP API that decides itself when it reads, with a small buffer."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

from router.http_server import HttpServer


@asynccontextmanager
async def slow_client(
    url: str, path: str, body: dict[str, Any], **headers: str
) -> AsyncIterator["SlowClient"]:
    """Post `body` and read nothing of the answer yet."""
    where = urlsplit(url)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(connection, (where.hostname, where.port))
        await loop.sock_sendall(connection, _post(path, json.dumps(body).encode(), headers))
        yield SlowClient(connection)


def narrow(server: HttpServer) -> None:
    """Give new connections a small buffer on the server's side too; by themselves they take megabytes."""
    server._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)


class SlowClient:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def read_some(self) -> bytes:
        """What is there next; b"" at the end."""
        return await asyncio.get_running_loop().sock_recv(self._connection, 1 << 16)

    async def read_to_the_end(self) -> bytes:
        """Whatever still comes until the server has closed the connection, in whatever way."""
        read = b""
        with contextlib.suppress(ConnectionResetError):
            while some := await self.read_some():
                read += some
        return read

    async def read_until(self, end: bytes) -> bytes:
        """Everything up to and including `end`."""
        read = b""
        while end not in read:
            some = await self.read_some()
            assert some, f"the answer ended without {end!r}"
            read += some
        return read


def _post(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body
