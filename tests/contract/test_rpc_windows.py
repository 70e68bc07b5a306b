"""Back pressure, timeouts and servers, for both implementations of Rpc."""

import asyncio
from collections.abc import Callable

import pytest

from pdserve.contract.errors import ConfigError, StreamBroken
from pdserve.contract.messages import End, Message
from pdserve.contract.ports import Call, MessageStream
from tests.contract.rpc_pair import (
    MIB,
    OPEN,
    READY,
    Pair,
    Recorder,
    echo,
    own_address,
    receive_all,
)


async def test_a_reader_that_does_not_read_holds_up_the_sender(pair: Pair) -> None:
    may_read = asyncio.Event()
    received: list[Message] = []

    async def serve(stream: MessageStream) -> None:
        await may_read.wait()
        received.extend(await receive_all(stream))
        await stream.send(End())

    stream = await pair.open(serve, Call.KV)
    chunk = bytes(MIB)
    num_sent = 0

    async def send_all() -> None:
        nonlocal num_sent
        for _ in range(300):
            await stream.send(chunk)
            num_sent += 1
        await stream.send(End())

    sending = asyncio.ensure_future(send_all())
    await until_still(lambda: num_sent)
    assert num_sent <= 100  # gRPC and the kernel hold tens of MiB under way
    may_read.set()
    await sending
    assert await stream.receive() == End()
    assert len(received) == 301


async def until_still(value: Callable[[], int]) -> None:
    """Wait until `value` has not moved for a tenth of a second."""
    last = -1
    while last != value():
        last = value()
        await asyncio.sleep(0.1)


async def test_a_sender_in_a_full_window_learns_that_the_stream_broke(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await asyncio.Event().wait()

    handler = Recorder(serve)
    server = await pair.serve(handler)
    stream = await pair.client.open(server.address, Call.KV)

    num_sent = 0

    async def fill() -> None:
        nonlocal num_sent
        while True:
            await stream.send(bytes(MIB))
            num_sent += 1

    filling = asyncio.ensure_future(fill())
    await until_still(lambda: num_sent)
    await server.stop(0)
    with pytest.raises(StreamBroken):
        await filling


async def test_a_receive_that_times_out_loses_nothing(pair: Pair) -> None:
    stream = await pair.open(echo)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await stream.receive()
    await stream.send(OPEN)
    assert await stream.receive() == READY
    await stream.send(End())
    assert await stream.receive() == End()


async def test_a_send_that_times_out_sends_nothing_and_keeps_the_stream(pair: Pair) -> None:
    may_read = asyncio.Event()
    received: list[Message] = []

    async def serve(stream: MessageStream) -> None:
        await may_read.wait()
        received.extend(await receive_all(stream))
        await stream.send(End())

    stream = await pair.open(serve, Call.KV)
    num_sent = 0

    async def send_until_one_times_out() -> None:
        nonlocal num_sent
        while True:
            async with asyncio.timeout(0.1):
                await stream.send(num_sent.to_bytes(4, "little") + bytes(MIB))
            num_sent += 1

    with pytest.raises(TimeoutError):
        await send_until_one_times_out()
    may_read.set()
    await stream.send(End())
    assert await stream.receive() == End()
    numbers = [int.from_bytes(chunk[:4], "little") for chunk in received[:-1] if isinstance(chunk, bytes)]
    assert numbers == list(range(num_sent))


# Servers


async def test_the_address_has_the_real_port(pair: Pair) -> None:
    server = await pair.serve(echo)
    assert int(server.address.rpartition(":")[2]) > 0
    with pytest.raises(ConfigError, match=server.address):
        await pair.serve(echo, address=server.address)


async def test_an_address_can_be_used_again(pair: Pair) -> None:
    server = await pair.serve(echo, address=own_address())
    await server.stop(0)
    again = await pair.serve(echo, address=server.address)
    assert again.address == server.address


async def test_a_server_that_comes_back_at_its_address_is_found_again(pair: Pair) -> None:
    server = await pair.serve(echo, address=own_address())
    before = await pair.client.open(server.address, Call.SESSION)
    await before.send(OPEN)
    await before.receive()
    await server.stop(0)
    with pytest.raises(StreamBroken):
        await before.receive()
    again = await pair.serve(echo, address=server.address)
    async with asyncio.timeout(10):
        while not await answers(await pair.client.open(again.address, Call.SESSION)):
            pass


async def answers(stream: MessageStream) -> bool:
    try:
        await stream.send(OPEN)
        return await stream.receive() == READY
    except StreamBroken:
        return False


async def test_stopping_twice_is_harmless(pair: Pair) -> None:
    server = await pair.serve(echo)
    await server.stop(0)
    await server.stop(0)
