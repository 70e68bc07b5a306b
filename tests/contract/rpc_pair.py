"""A client and a server of either Rpc, and the handlers and messages that its tests use."""

import asyncio
import itertools
import os
from collections.abc import Awaitable, Callable

from pdserve.contract.errors import ErrorCode, ErrorInfo
from pdserve.contract.ids import Incarnation, RouterId, SubmitNumber
from pdserve.contract.messages import Cancel, End, Frame, Message, SessionOpen, SessionReady
from pdserve.contract.ports import Call, Handler, MessageStream, Rpc, RpcServer

MIB = 1024 * 1024
OPEN = SessionOpen(RouterId("router-0"), Incarnation(1), Incarnation(2))
READY = SessionReady(Incarnation(2))
FAILURE = ErrorInfo(ErrorCode.INVALID_REQUEST, "no such thing", None, "thing")
TASKS_END_WITHIN_S = 5.0

_own_ports = itertools.count(20_000)


class Pair:
    """A client and a server process of one implementation, and everything started on them."""

    def __init__(self, make_rpc: Callable[[str], Rpc]):
        self.client = make_rpc("client")
        self._worker = make_rpc("worker")
        self._servers: list[RpcServer] = []

    async def serve(self, handler: Handler, *calls: Call, address: str = "127.0.0.1:0") -> RpcServer:
        handlers = dict.fromkeys(calls or tuple(Call), handler)
        server = await self._worker.serve(address, handlers)
        self._servers.append(server)
        return server

    async def open(self, handler: Handler, call: Call = Call.SESSION) -> MessageStream:
        server = await self.serve(handler)
        return await self.client.open(server.address, call)

    async def close(self) -> None:
        await self.client.close()
        for server in self._servers:
            await server.stop(0)
        await self._worker.close()


class Recorder:
    """A handler that runs `serve` and lets the test wait for how it ended."""

    def __init__(self, serve: Callable[[MessageStream], Awaitable[None]]):
        self._serve = serve
        self.outcome: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()

    async def __call__(self, stream: MessageStream) -> None:
        try:
            await self._serve(stream)
        except BaseException as failure:
            self.outcome.set_result(failure)
            raise
        self.outcome.set_result(None)


def own_address() -> str:
    """An address that nobody else takes while nothing of ours listens there: each process has a loopback host
    of its own, and no port of the system's choice is that low."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 16)}.{pid >> 8 & 255}.{pid & 255}:{next(_own_ports)}"


async def no_new_tasks(before: "set[asyncio.Task[object]]") -> None:
    """Closing has ended every task; gRPC's own end when its threads have said so."""
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        await asyncio.wait(left, timeout=TASKS_END_WITHIN_S)
    assert not [task for task in left if not task.done()]


async def receive_all(stream: MessageStream) -> list[Message]:
    """Everything up to and including End."""
    messages = [await stream.receive()]
    while not isinstance(messages[-1], End):
        messages.append(await stream.receive())
    return messages


def numbered(count: int) -> list[Cancel]:
    return [Cancel(SubmitNumber(number)) for number in range(1, count + 1)]


def steps(count: int) -> list[Frame]:
    return [Frame(step, ()) for step in range(count)]


async def wait_forever(stream: MessageStream) -> None:
    await asyncio.Event().wait()


async def echo(stream: MessageStream) -> None:
    """Answer each message with READY, and End with End."""
    while not isinstance(await stream.receive(), End):
        await stream.send(READY)
    await stream.send(End())


async def echo_bytes(stream: MessageStream) -> None:
    message: Message = b""
    while not isinstance(message, End):
        message = await stream.receive()
        await stream.send(message)
