"""What only gRPC has: processes that die or freeze, connections, keepalive, further services."""

import asyncio
import logging
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from pdserve.contract.errors import StreamBroken
from pdserve.contract.ids import Incarnation, RouterId
from pdserve.contract.messages import End, SessionOpen, SessionReady
from pdserve.contract.ports import Call, MessageStream
from pdserve.rpc.channel import CHANNEL_OPTIONS
from pdserve.rpc.convert import SERVICE, codec_for
from pdserve.rpc.grpc_rpc import TOKEN_KEY, GrpcRpc
from pdserve.rpc.stream import Direction
from tests.contract.rpc_pair import MIB
from tests.credentials import OURS

OPEN = SessionOpen(RouterId("router-0"), Incarnation(1), Incarnation(2))
READY = SessionReady(Incarnation(2))
METADATA = ((TOKEN_KEY, OURS.token.secret),)
DEAD_WITHIN_S = 6.0
UP = codec_for(Call.SESSION, Direction.UP)
DOWN = codec_for(Call.SESSION, Direction.DOWN)
Peers = Callable[..., Awaitable[Process]]


@pytest.fixture
async def rpc(caplog: pytest.LogCaptureFixture) -> AsyncIterator[GrpcRpc]:
    """Whoever dies: no line is logged about it."""
    rpc = GrpcRpc(OURS)
    yield rpc
    await rpc.close()
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.WARNING]


@pytest.fixture
async def peers() -> AsyncIterator[Peers]:
    """Starts tests/contract/rpc_peer.py; what is left of it, frozen or not, is killed at the end."""
    started: list[Process] = []

    async def start(*arguments: str) -> Process:
        command = (sys.executable, "-m", "tests.contract.rpc_peer", *arguments)
        started.append(await asyncio.create_subprocess_exec(*command, stdout=PIPE))
        return started[-1]

    yield start
    for process in started:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        await process.wait()


class Listener:
    """A handler that says READY, then waits for the stream to break, by receiving or for something else."""

    def __init__(self, *, receiving: bool):
        self._receiving = receiving
        self.opened = asyncio.Event()
        self.outcome: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()

    async def __call__(self, stream: MessageStream) -> None:
        try:
            await stream.receive()
            await stream.send(READY)
            self.opened.set()
            while self._receiving:
                await stream.receive()
            await asyncio.Event().wait()
        except (StreamBroken, asyncio.CancelledError) as failure:
            self.outcome.set_result(failure)
            raise


async def open_at(rpc: GrpcRpc, server: Process) -> MessageStream:
    assert server.stdout is not None
    stream = await rpc.open((await server.stdout.readline()).decode().strip(), Call.SESSION)
    await stream.send(OPEN)
    assert await stream.receive() == READY
    return stream


def raw_session(channel: Any) -> Any:
    """A call of gRPC's own, without what a ClientStream adds."""
    return channel.stream_stream(f"/{SERVICE}/Session")(metadata=METADATA)


# Death


async def test_a_killed_client_breaks_the_handlers_receive(rpc: GrpcRpc, peers: Peers) -> None:
    listener = Listener(receiving=True)
    server = await rpc.serve("127.0.0.1:0", {Call.SESSION: listener})
    client = await peers("open", server.address)
    await listener.opened.wait()
    client.kill()
    assert isinstance(await listener.outcome, StreamBroken)
    await server.stop(0)


@pytest.mark.parametrize("role", ["open", "end"])
async def test_a_killed_client_cancels_a_handler_that_does_not_receive(
    rpc: GrpcRpc, peers: Peers, role: str
) -> None:
    """Also one that has said End before, from which nothing more was to come."""
    listener = Listener(receiving=False)
    server = await rpc.serve("127.0.0.1:0", {Call.SESSION: listener})
    client = await peers(role, server.address)
    await listener.opened.wait()
    client.kill()
    assert isinstance(await listener.outcome, asyncio.CancelledError)
    await server.stop(0)


async def test_a_killed_server_breaks_its_clients(rpc: GrpcRpc, peers: Peers) -> None:
    server = await peers("serve")
    stream = await open_at(rpc, server)
    server.kill()
    with pytest.raises(StreamBroken):
        await stream.receive()


async def test_a_frozen_peer_is_dead(rpc: GrpcRpc, peers: Peers) -> None:
    """On both sides, for streams that are idle, one full of bytes and one that is opened later; all at the
    same time."""
    receiving, waiting = Listener(receiving=True), Listener(receiving=False)
    for_receiving = await rpc.serve("127.0.0.1:0", {Call.SESSION: receiving})
    for_waiting = await rpc.serve("127.0.0.1:0", {Call.SESSION: waiting})
    clients = [await peers("open", for_receiving.address), await peers("end", for_waiting.address)]
    server = await peers("serve")
    stream = await open_at(rpc, server)
    full = await rpc.open(stream.peer, Call.KV)
    await full.send(bytes(MIB))
    filling = asyncio.ensure_future(send_without_end(full))
    await receiving.opened.wait()
    await waiting.opened.wait()

    for process in (*clients, server):
        process.send_signal(signal.SIGSTOP)
    late = GrpcRpc(OURS)
    later = await late.open(stream.peer, Call.SESSION)
    async with asyncio.timeout(DEAD_WITHIN_S):
        assert isinstance(await receiving.outcome, StreamBroken)
        assert isinstance(await waiting.outcome, asyncio.CancelledError)
        for broken in (stream.receive(), filling, later.receive()):
            with pytest.raises(StreamBroken):
                await broken
    await late.close()
    await for_receiving.stop(0)
    await for_waiting.stop(0)


async def send_without_end(stream: MessageStream) -> None:
    while True:
        await stream.send(bytes(MIB))


async def test_an_idle_stream_and_a_client_that_pings_each_second_stay(rpc: GrpcRpc) -> None:
    async def answer(stream: MessageStream) -> None:
        while not isinstance(await stream.receive(), End):
            await stream.send(READY)
        await stream.send(End())

    server = await rpc.serve("127.0.0.1:0", {Call.SESSION: answer})
    idle = await rpc.open(server.address, Call.SESSION)
    eager_options = [*CHANNEL_OPTIONS, ("grpc.keepalive_time_ms", 1000)]
    async with grpc.aio.insecure_channel(server.address, options=eager_options) as channel:
        eager = raw_session(channel)
        await eager.write(UP.encode(OPEN)[0])
        await eager.read()
        await asyncio.sleep(DEAD_WITHIN_S)  # whatever keepalive ends would have ended by now
        await idle.send(OPEN)
        assert await idle.receive() == READY
        await eager.write(UP.encode(End())[0])
        assert DOWN.decode(await eager.read()) == End()
    await idle.send(End())
    assert await idle.receive() == End()
    await server.stop(0)


# Connections and servers


async def test_each_kind_of_stream_has_its_own_connection(rpc: GrpcRpc) -> None:
    async def answer(stream: MessageStream) -> None:
        message = await stream.receive()
        await stream.send(message if isinstance(message, bytes) else READY)
        await stream.receive()

    server = await rpc.serve("127.0.0.1:0", {Call.SESSION: answer, Call.KV: answer})
    for call, message in ((Call.SESSION, OPEN), (Call.SESSION, OPEN), (Call.KV, b"kv")):
        stream = await rpc.open(server.address, call)
        await stream.send(message)
        await stream.receive()
    port = int(server.address.rpartition(":")[2])
    connections = psutil.Process().net_connections("tcp")
    assert len([at for at in connections if at.raddr and at.raddr.port == port]) == 2
    await rpc.close()
    await server.stop(0)


async def test_further_services_can_be_registered(rpc: GrpcRpc) -> None:
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in its stubs

    def register(server: grpc.aio.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)

    server = await rpc.serve("127.0.0.1:0", {}, register=register)
    async with grpc.aio.insecure_channel(server.address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), metadata=METADATA
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    await server.stop(0)


async def test_a_message_above_the_limit_is_refused_at_the_sender(rpc: GrpcRpc) -> None:
    stream = await rpc.open("127.0.0.1:1", Call.KV)
    with pytest.raises(ValueError, match="exceeds"):
        await stream.send(bytes(33 * 1024 * 1024))


async def test_bytes_that_are_no_message_break_the_stream(rpc: GrpcRpc) -> None:
    listener = Listener(receiving=True)
    server = await rpc.serve("127.0.0.1:0", {Call.SESSION: listener})
    async with grpc.aio.insecure_channel(server.address) as channel:
        call = raw_session(channel)
        await call.write(UP.encode(OPEN)[0])
        await call.read()
        await call.write(b"\xff\xff")
        broken = await listener.outcome
        assert isinstance(broken, StreamBroken)
        assert "cannot be decoded" in str(broken)
        with pytest.raises(grpc.aio.AioRpcError, match="ABORTED"):
            await call.read()
    await server.stop(0)
