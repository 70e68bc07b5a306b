"""Sockets that the router listens at."""

import asyncio
import socket

import pytest

from router.listen import bind


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_what_is_written_leaves_at_once(host: str) -> None:
    """Without TCP_NODELAY a small write waits until the client has acknowledged the one before."""
    accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("socket")
        accepted.set_result(bool(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)))
        writer.close()

    listener = bind(host, 0, "a port")
    async with await asyncio.start_server(accept, sock=listener):
        _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
        assert await accepted
        writer.close()
        await writer.wait_closed()
