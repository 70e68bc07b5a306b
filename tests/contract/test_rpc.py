"""What arrives and how streams end or break, for both implementations of Rpc."""

import asyncio

import pytest

from pdserve.contract.errors import ErrorCode, ErrorInfo, InvalidRequest, StreamBroken
from pdserve.contract.ids import SubmitNumber
from pdserve.contract.messages import Cancel, End, Frame, Message
from pdserve.contract.ports import Call, MessageStream
from tests.contract.rpc_pair import (
    FAILURE,
    MIB,
    OPEN,
    READY,
    Pair,
    Recorder,
    echo,
    echo_bytes,
    numbered,
    own_address,
    receive_all,
    steps,
    wait_forever,
)

# Delivery


async def test_messages_arrive_in_order_and_end_is_the_last(pair: Pair) -> None:
    received: list[Message] = []

    async def serve(stream: MessageStream) -> None:
        received.extend(await receive_all(stream))
        await stream.send(End())

    stream = await pair.open(serve)
    messages: list[Message] = [OPEN, *numbered(300)]
    for message in messages:
        await stream.send(message)
    await stream.send(End())
    assert await stream.receive() == End()
    assert received == [OPEN, *numbered(300), End()]


async def test_both_directions_flow_at_once(pair: Pair) -> None:
    """Neither side reads before it has something to write; nobody waits for the other's turn."""

    async def serve(stream: MessageStream) -> None:
        async with asyncio.TaskGroup() as group:
            reading = group.create_task(receive_all(stream))
            for _ in range(500):
                await stream.send(READY)
            await stream.send(End())
        assert len(reading.result()) == 501

    stream = await pair.open(serve)
    async with asyncio.TaskGroup() as group:
        reading = group.create_task(receive_all(stream))
        for message in numbered(500):
            await stream.send(message)
        await stream.send(End())
    assert reading.result() == [READY] * 500 + [End()]


async def test_many_streams_share_a_connection_without_mixing(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        for message in await receive_all(stream):
            await stream.send(Frame(message.number, ()) if isinstance(message, Cancel) else End())

    server = await pair.serve(serve, Call.SESSION)

    async def talk(index: int) -> None:
        stream = await pair.client.open(server.address, Call.SESSION)
        mine = range(index * 100, index * 100 + 5)
        for number in mine:
            await stream.send(Cancel(SubmitNumber(number)))
        await stream.send(End())
        assert await receive_all(stream) == [*(Frame(number, ()) for number in mine), End()]

    async with asyncio.TaskGroup() as group:
        for index in range(100):
            group.create_task(talk(index))


async def test_a_large_message_arrives_whole(pair: Pair) -> None:
    payload = bytes(range(256)) * (20 * MIB // 256)
    stream = await pair.open(echo_bytes, Call.KV)
    await stream.send(payload)
    assert await stream.receive() == payload
    await stream.send(End())
    assert await stream.receive() == End()


# End


async def test_an_error_in_end_arrives_with_all_its_parts(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        assert await stream.receive() == End(FAILURE)
        await stream.send(End(ErrorInfo(ErrorCode.OVERLOADED, "full", 1.5)))

    stream = await pair.open(serve)
    await stream.send(End(FAILURE))
    assert await stream.receive() == End(ErrorInfo(ErrorCode.OVERLOADED, "full", 1.5))


async def test_a_handler_that_raises_a_typed_error_ends_with_it(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        raise InvalidRequest("no such thing", param="thing")

    stream = await pair.open(serve)
    assert await stream.receive() == End(FAILURE)


async def test_a_typed_error_out_of_a_task_group_is_still_typed(pair: Pair) -> None:
    async def fail() -> None:
        raise InvalidRequest("no such thing", param="thing")

    async def serve(stream: MessageStream) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            group.create_task(wait_forever(stream))

    stream = await pair.open(serve)
    assert await stream.receive() == End(FAILURE)


async def test_a_handler_that_returns_silently_violates_the_protocol(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await stream.send(READY)

    stream = await pair.open(serve)
    assert await stream.receive() == READY
    end = await stream.receive()
    assert isinstance(end, End)
    assert end.error is not None
    assert end.error.code is ErrorCode.PROTOCOL


async def test_a_bug_in_a_handler_is_logged_and_told_as_internal(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    async def serve(stream: MessageStream) -> None:
        raise KeyError("secret")

    stream = await pair.open(serve)
    end = await stream.receive()
    assert isinstance(end, End)
    assert end.error is not None
    assert end.error.code is ErrorCode.INTERNAL
    assert "secret" not in end.error.message
    assert "KeyError: 'secret'" in caplog.text
    caplog.clear()


async def test_a_message_that_does_not_belong_on_a_stream_is_refused(pair: Pair) -> None:
    stream = await pair.open(echo)
    with pytest.raises(TypeError, match="SessionReady does not travel up a Session stream"):
        await stream.send(READY)
    with pytest.raises(TypeError, match="bytes"):
        await stream.send(b"kv")
    await stream.send(End())
    assert await stream.receive() == End()
    payloads = await pair.open(echo_bytes, Call.KV)
    with pytest.raises(ValueError, match="empty"):
        await payloads.send(b"")


async def test_nothing_may_follow_end(pair: Pair) -> None:
    stream = await pair.open(echo)
    await stream.send(End())
    with pytest.raises(RuntimeError, match="after End"):
        await stream.send(OPEN)
    await stream.receive()
    with pytest.raises(RuntimeError, match="after its End"):
        await stream.receive()


async def test_a_side_that_has_ended_still_receives(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        assert await stream.receive() == End()
        for message in steps(50):
            await stream.send(message)
        await stream.send(End())

    stream = await pair.open(serve)
    await stream.send(End())
    assert await receive_all(stream) == [*steps(50), End()]


async def test_sending_to_a_server_that_has_ended(pair: Pair) -> None:
    """What was under way is lost without noise, more breaks, and a last End is always welcome."""

    async def serve(stream: MessageStream) -> None:
        raise InvalidRequest("no such thing", param="thing")

    stream = await pair.open(serve)

    async def send_until_broken() -> None:
        while True:
            await stream.send(OPEN)
            await asyncio.sleep(0)

    with pytest.raises(StreamBroken):
        await send_until_broken()
    assert await stream.receive() == End(FAILURE)
    await stream.send(End())


@pytest.mark.parametrize("attempt", range(20))
async def test_a_server_s_last_words_arrive_at_a_client_that_goes_on_sending(
    pair: Pair, attempt: int
) -> None:
    """Also what it said shortly before, and when the client's own messages fail first."""

    async def serve(stream: MessageStream) -> None:
        for message in steps(40):
            await stream.send(message)
        raise InvalidRequest("no such thing", param="thing")

    stream = await pair.open(serve)

    async def send_until_broken() -> None:
        while True:
            await stream.send(OPEN)
            await asyncio.sleep(0)

    sending = asyncio.ensure_future(send_until_broken())
    await asyncio.sleep(0.001 * attempt)
    assert await receive_all(stream) == [*steps(40), End(FAILURE)]
    with pytest.raises(StreamBroken):
        await sending


async def test_nothing_is_logged_when_both_sides_end(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    stream = await pair.open(echo)
    await stream.send(End())
    await stream.receive()
    await pair.close()
    assert not caplog.records


# Broken streams


async def test_nobody_at_the_address(pair: Pair) -> None:
    server = await pair.serve(echo, address=own_address())
    await server.stop(0)
    stream = await pair.client.open(server.address, Call.SESSION)
    with pytest.raises(StreamBroken):
        await stream.receive()
    with pytest.raises(StreamBroken):
        await stream.send(OPEN)


async def test_a_call_that_is_not_served(pair: Pair) -> None:
    server = await pair.serve(echo, Call.SESSION)
    stream = await pair.client.open(server.address, Call.WATCH)
    with pytest.raises(StreamBroken, match="Watch"):
        await stream.receive()


async def test_a_client_that_cancels_breaks_the_receive_of_the_handler(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await stream.receive()
        await stream.send(READY)
        await stream.receive()

    handler = Recorder(serve)
    stream = await pair.open(handler)
    await stream.send(OPEN)
    await stream.receive()
    stream.cancel()
    assert isinstance(await handler.outcome, StreamBroken)
    for attempt in (stream.receive(), stream.send(OPEN), stream.send(End())):
        with pytest.raises(StreamBroken):
            await attempt


async def test_a_handler_that_waits_for_something_else_is_cancelled(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await stream.send(READY)
        await asyncio.Event().wait()

    handler = Recorder(serve)
    stream = await pair.open(handler)
    await stream.receive()
    stream.cancel()
    assert isinstance(await handler.outcome, asyncio.CancelledError)


async def test_a_client_that_goes_after_its_end_is_noticed(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await receive_all(stream)
        await stream.send(READY)
        await asyncio.Event().wait()

    handler = Recorder(serve)
    stream = await pair.open(handler)
    await stream.send(End())
    await stream.receive()
    stream.cancel()
    assert isinstance(await handler.outcome, asyncio.CancelledError)


async def test_the_clean_up_of_a_told_handler_is_not_disturbed(pair: Pair) -> None:
    cleaned = asyncio.Event()

    async def serve(stream: MessageStream) -> None:
        try:
            await stream.send(READY)
            await stream.receive()
        finally:
            for _ in range(20):
                await asyncio.sleep(0)
            cleaned.set()

    stream = await pair.open(serve)
    await stream.receive()
    stream.cancel()
    await cleaned.wait()


async def test_a_server_that_stops_breaks_its_streams(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await stream.send(READY)
        await stream.receive()

    handler = Recorder(serve)
    server = await pair.serve(handler)
    stream = await pair.client.open(server.address, Call.SESSION)
    await stream.receive()
    await server.stop(0)
    assert isinstance(handler.outcome.result(), StreamBroken)
    with pytest.raises(StreamBroken):
        await stream.receive()


async def test_what_was_said_before_a_server_stops_arrives(pair: Pair) -> None:
    """Also all that one turn of the event loop has said."""
    said = asyncio.Event()

    async def serve(stream: MessageStream) -> None:
        await stream.receive()
        for _ in range(10):
            await stream.send(READY)
        said.set()
        await stream.receive()

    server = await pair.serve(serve)
    stream = await pair.client.open(server.address, Call.SESSION)
    await stream.send(OPEN)
    await said.wait()
    await server.stop(0)
    assert [await stream.receive() for _ in range(10)] == [READY] * 10
    with pytest.raises(StreamBroken):
        await stream.receive()


async def test_a_stopping_server_lets_streams_end_within_its_grace(pair: Pair) -> None:
    server = await pair.serve(echo)
    stream = await pair.client.open(server.address, Call.SESSION)
    await stream.send(OPEN)
    await stream.receive()
    stopping = asyncio.ensure_future(server.stop(30))
    await stream.send(OPEN)
    assert await stream.receive() == READY
    await stream.send(End())
    assert await stream.receive() == End()
    await stopping


async def test_a_handler_that_cancels_breaks_the_client(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await stream.receive()
        stream.cancel()
        stream.cancel()

    stream = await pair.open(serve)
    await stream.send(OPEN)
    with pytest.raises(StreamBroken):
        await stream.receive()


@pytest.mark.parametrize("after_s", [0.0, 0.1])
async def test_a_handler_that_cancels_while_its_messages_are_under_way_breaks_the_client(
    pair: Pair, after_s: float
) -> None:
    """From the first message on, however large, to a client that reads only then."""
    cancelled = asyncio.Event()

    async def serve(stream: MessageStream) -> None:
        async def send_for_ever() -> None:
            while True:
                await stream.send(bytes(2 * MIB))

        sending = asyncio.ensure_future(send_for_ever())
        await asyncio.sleep(after_s)
        sending.cancel()
        stream.cancel()
        cancelled.set()

    stream = await pair.open(serve, Call.KV)
    await cancelled.wait()
    with pytest.raises(StreamBroken):
        await receive_all(stream)


async def test_closing_the_client_breaks_its_streams(pair: Pair) -> None:
    async def serve(stream: MessageStream) -> None:
        await stream.send(READY)
        await stream.receive()

    handler = Recorder(serve)
    stream = await pair.open(handler)
    await stream.receive()
    await pair.client.close()
    assert isinstance(await handler.outcome, StreamBroken)
    with pytest.raises(StreamBroken):
        await stream.receive()


async def test_cancel_is_idempotent_and_harmless_after_both_ends(pair: Pair) -> None:
    stream = await pair.open(echo)
    stream.cancel()
    stream.cancel()
    with pytest.raises(StreamBroken):
        await stream.receive()

    handler = Recorder(echo)
    stream = await pair.open(handler)
    await stream.send(End())
    assert await stream.receive() == End()
    stream.cancel()
    stream.cancel()
    assert await handler.outcome is None
