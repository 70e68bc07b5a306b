"""Bad input at a worker's port: refused with a typed error, and afterwards the worker serves as before.

What is without the deployment's token is in test_rpc_credentials.py.
"""

import asyncio
import contextlib
import math
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from pdserve.contract.errors import ErrorCode, StreamBroken
from pdserve.contract.ids import Incarnation, RequestId, SubmitNumber, WorkerId
from pdserve.contract.messages import (
    Ack,
    Busy,
    Cancel,
    End,
    Failed,
    FirstToken,
    Frame,
    Holding,
    Message,
    PrefillSource,
    Refused,
    Reserved,
    Sealed,
    Segment,
    Starting,
    TransportChoice,
    TransportOffer,
    WatchOpen,
)
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import LayerRange, PoolExport
from pdserve.handoff.transports.kv_streams import greet
from pdserve.rpc.convert import SERVICE, codec_for
from pdserve.rpc.grpc_rpc import TOKEN_KEY, GrpcRpc
from pdserve.rpc.stream import Direction
from tests.contract.attacked_system import ROUTER, SAMPLING, AttackedSystem
from tests.credentials import OURS

METADATA = ((TOKEN_KEY, OURS.token.secret),)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes(3) + b"\x04" + bytes(5)
ENGINE_TOKENS = 64 * 4
VOCAB = 1000


@pytest.fixture
async def system() -> AsyncIterator[AttackedSystem]:
    async with AttackedSystem() as attacked:
        yield attacked


async def ended_with(stream: MessageStream) -> ErrorCode:
    """The error with which the server ends the stream, whatever it says before."""
    while not isinstance(message := await stream.receive(), End):
        pass
    assert message.error is not None
    return message.error.code


async def is_broken(stream: MessageStream) -> bool:
    """Wait until the server has given the stream up, or has ended it."""
    with contextlib.suppress(StreamBroken):
        while not isinstance(await stream.receive(), End):
            pass
    return True


# Bytes on the socket


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(random.Random(seed).randrange(1, 5000))


SOCKET_BYTES = {
    "a request of HTTP/1": b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
    "a TLS hello": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "half a preface": PREFACE[:10],
    "a frame that ends early": PREFACE + SETTINGS + b"\x00\x00\x64\x01\x04\x00\x00\x00\x01" + bytes(10),
    "data on stream 0": PREFACE + SETTINGS + b"\x00\x00\x04\x00\x00\x00\x00\x00\x00data",
    "a frame of 16 MiB": PREFACE + SETTINGS + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1000),
    "headers that are none": PREFACE + SETTINGS + b"\x00\x00\x05\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff\xff",
    **{f"noise {seed}": noise(seed) for seed in range(10)},
    **{f"noise {seed} after the preface": PREFACE + SETTINGS + noise(seed) for seed in range(10)},
}


@pytest.mark.parametrize("raw", SOCKET_BYTES.values(), ids=SOCKET_BYTES)
async def test_bytes_that_are_no_call(system: AttackedSystem, raw: bytes) -> None:
    for worker in system.workers:
        host, port = worker.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(raw)
        writer.write_eof()
        with contextlib.suppress(ConnectionResetError):
            await reader.read()  # until the server closes
        writer.close()


async def test_a_connection_that_says_nothing_is_closed(system: AttackedSystem) -> None:
    host, port = system.decode.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    while await reader.read(1000):  # the server's own settings, then its end
        pass
    writer.close()


# Bytes on a stream


async def raw_call(address: str, call: str, *parts: bytes) -> grpc.StatusCode:
    """Write gRPC messages as they are, then half-close; how the call ended."""
    options = (("grpc.max_send_message_length", -1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stream: Any = channel.stream_stream(f"/{SERVICE}/{call}")(metadata=METADATA)  # type: ignore[call-arg]
        try:
            for part in parts:
                await stream.write(part)
            await stream.done_writing()
            async for _ in stream:
                pass
        except (grpc.RpcError, asyncio.InvalidStateError):
            pass
        code: grpc.StatusCode = await stream.code()
    return code


@pytest.mark.parametrize("call", list(Call))
async def test_a_message_of_more_than_32_mib(system: AttackedSystem, call: Call) -> None:
    code = await raw_call(system.decode.address, call, bytes((32 << 20) + 1))
    assert code is grpc.StatusCode.ABORTED
    assert system.refused(system.decode, ErrorCode.PROTOCOL) == 1


@pytest.mark.parametrize("call", list(Call))
async def test_a_message_of_more_than_64_mib_is_not_even_read(system: AttackedSystem, call: Call) -> None:
    code = await raw_call(system.decode.address, call, bytes((64 << 20) + 1))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("call", ["Nothing", "../Session", "session", ""])
async def test_a_method_that_is_not_there(system: AttackedSystem, call: str) -> None:
    assert await raw_call(system.decode.address, call, b"hello") is grpc.StatusCode.UNIMPLEMENTED
    assert system.refused(system.decode, ErrorCode.NOT_FOUND) == 1


async def test_a_prefill_worker_has_no_sessions(system: AttackedSystem) -> None:
    assert await raw_call(system.prefill.address, Call.SESSION, b"") is grpc.StatusCode.UNIMPLEMENTED


def openers(system: AttackedSystem) -> dict[Call, Message]:
    return {
        Call.SESSION: system.session_open(),
        Call.WATCH: WatchOpen("router-7", ROUTER),
        Call.PREFILL: system.prefill_open(),
        Call.KV: b"0123456789abcdef",
    }


@pytest.mark.parametrize("call", [Call.SESSION, Call.WATCH, Call.PREFILL])
async def test_messages_cut_short_or_damaged(system: AttackedSystem, call: Call) -> None:
    """Every one of them either still means something, or ends its call and nothing else."""
    worker = system.prefill if call is Call.PREFILL else system.decode
    (whole,) = codec_for(call, Direction.UP).encode(openers(system)[call])
    rng = random.Random(call.value)
    damaged = [whole[:length] for length in sorted(rng.sample(range(len(whole)), min(25, len(whole))))]
    for _ in range(50):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    codes = [await raw_call(worker.address, call, raw) for raw in damaged]
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.ABORTED}


async def test_bytes_that_are_no_message_are_counted(system: AttackedSystem) -> None:
    assert await raw_call(system.decode.address, Call.SESSION, b"\xff\xff") is grpc.StatusCode.ABORTED
    assert system.refused(system.decode, ErrorCode.PROTOCOL) == 1


async def test_damaged_submits_reach_no_engine(system: AttackedSystem) -> None:
    """In the middle of a Session, where a message that can be decoded is believed to be the router's."""
    encode = codec_for(Call.SESSION, Direction.UP).encode
    (whole,) = encode(system.submit(prefill=None))
    rng = random.Random(5)
    for _ in range(100):
        flipped = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (opened,) = encode(system.session_open())
        code = await raw_call(system.decode.address, Call.SESSION, opened, bytes(flipped))
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.ABORTED)


# Messages at the wrong moment


NO_OPENERS: dict[Call, list[Callable[[AttackedSystem], Message]]] = {
    Call.SESSION: [
        lambda system: system.submit(),
        lambda system: Cancel(SubmitNumber(1)),
        lambda system: End(),
    ],
    Call.WATCH: [lambda system: End()],
    Call.PREFILL: [
        lambda system: Reserved(0),
        lambda system: Busy(1),
        lambda system: Ack(0),
        lambda system: Ack(0, ok=False),
        lambda system: End(),
    ],
    Call.KV: [lambda system: End()],
}


@pytest.mark.parametrize(
    ("call", "index"),
    [(call, index) for call, messages in NO_OPENERS.items() for index in range(len(messages))],
)
async def test_what_does_not_begin_a_stream(system: AttackedSystem, call: Call, index: int) -> None:
    message = NO_OPENERS[call][index](system)
    worker = system.prefill if call is Call.PREFILL else system.decode
    stream = await system.peer.open(worker.address, call)
    await stream.send(message)
    assert await ended_with(stream) is ErrorCode.PROTOCOL
    assert system.refused(worker, ErrorCode.PROTOCOL) == 1


async def test_a_session_is_opened_once(system: AttackedSystem) -> None:
    stream = await system.open_session()
    await stream.send(system.session_open())
    await stream.send(system.submit())
    await until(stream, Frame)
    assert system.num_stale(system.decode, "SessionOpen") == 1
    stream.cancel()


async def test_a_cancel_of_what_was_never_submitted_changes_nothing(system: AttackedSystem) -> None:
    stream = await system.open_session()
    for number in (0, 1, 2**64 - 1):
        await stream.send(Cancel(SubmitNumber(number)))
    await stream.send(system.submit())
    await until(stream, Frame)
    stream.cancel()


async def test_a_watch_takes_nothing_after_its_opening(system: AttackedSystem) -> None:
    stream = await system.peer.open(system.decode.address, Call.WATCH)
    await stream.send(WatchOpen("router-7", ROUTER))
    await stream.send(WatchOpen("router-7", ROUTER))
    assert await is_broken(stream)


async def until(stream: MessageStream, kind: type) -> Message:
    while not isinstance(message := await stream.receive(), kind):
        assert not isinstance(message, End), message
    return message


async def answer_on(session: MessageStream) -> Message:
    """The worker's next answer; what it says every second of what it holds may come in between."""
    while isinstance(message := await session.receive(), Holding):
        pass
    return message


async def queued(system: AttackedSystem) -> MessageStream:
    """A Prefill call whose turn cannot come: the worker that asks is silent about another one."""
    silent = await system.open_prefill(request_id=RequestId("silent"))
    await until(silent, Starting)
    while not any(job.overdue for job in system.prefill.calls.jobs):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return await system.open_prefill()


async def starting(system: AttackedSystem) -> MessageStream:
    stream = await system.open_prefill()
    await until(stream, Starting)
    return stream


async def reserved(system: AttackedSystem) -> MessageStream:
    """Its KV stream is open, and nothing is acknowledged."""
    stream = await system.open_prefill()
    choice = await until(stream, Starting)
    assert isinstance(choice, Starting)
    kv = await system.peer.open(system.prefill.address, Call.KV)
    await kv.send(greet("grpc", choice.transport.transfer_id.encode()))
    await kv.send(End())
    await stream.send(Reserved(0))
    return stream


async def sealed(system: AttackedSystem) -> MessageStream:
    stream = await reserved(system)
    await until(stream, Sealed)
    return stream


WRONG_AT = {
    queued: [Ack(0), Ack(0, ok=False), End()],
    starting: [Reserved(9), Reserved(2**63), Ack(0), End()],
    reserved: [Ack(2**60), Ack(2**60, ok=False)],
    sealed: [Ack(2**60), Ack(2**60, ok=False)],
}


@pytest.mark.parametrize(
    ("state", "message"), [(state, message) for state, each in WRONG_AT.items() for message in each], ids=str
)
async def test_a_prefill_call_at_the_wrong_moment(
    system: AttackedSystem, state: Callable[[AttackedSystem], Awaitable[MessageStream]], message: Message
) -> None:
    stream = await state(system)
    await stream.send(message)
    assert await ended_with(stream) is ErrorCode.PROTOCOL
    await system.peer.close()


@pytest.mark.parametrize("message", [Reserved(0), Busy(1)], ids=str)
@pytest.mark.parametrize("state", [queued, reserved, sealed])
async def test_an_answer_that_nobody_waits_for_changes_nothing(
    system: AttackedSystem, state: Callable[[AttackedSystem], Awaitable[MessageStream]], message: Message
) -> None:
    """It may be one that came twice."""
    stream = await state(system)
    await stream.send(message)
    await stream.send(Ack(2**60))
    assert await ended_with(stream) is ErrorCode.PROTOCOL
    assert system.num_stale(system.prefill, type(message).__name__) == 1
    await system.peer.close()


@pytest.mark.parametrize("state", [queued, starting, reserved, sealed])
async def test_a_second_opening_of_a_prefill_call(
    system: AttackedSystem, state: Callable[[AttackedSystem], Awaitable[MessageStream]]
) -> None:
    stream = await state(system)
    await stream.send(system.prefill_open(attempt=9))
    assert await ended_with(stream) is ErrorCode.PROTOCOL
    await system.peer.close()


# Calls and messages that are sent again


async def test_a_session_that_is_replayed_does_not_touch_the_one_that_is_open(system: AttackedSystem) -> None:
    opened = system.session_open()
    stream = await system.peer.open(system.decode.address, Call.SESSION)
    await stream.send(opened)
    await stream.receive()
    again = await system.peer.open(system.decode.address, Call.SESSION)
    await again.send(opened)
    assert await ended_with(again) is ErrorCode.PROTOCOL
    await stream.send(system.submit())
    await until(stream, Frame)
    stream.cancel()


async def test_a_newer_session_of_a_router_ends_the_older_one(system: AttackedSystem) -> None:
    older = await system.open_session()
    await older.send(system.submit())
    newer = await system.open_session()
    assert await is_broken(older)
    await newer.send(system.submit())
    await until(newer, Frame)
    newer.cancel()


async def test_a_submit_number_is_taken_once(system: AttackedSystem) -> None:
    stream = await system.open_session()
    await stream.send(system.submit(5))
    await until(stream, Frame)
    for number in (5, 4, 0):
        await stream.send(system.submit(number, request_id=RequestId("another")))
    await stream.send(system.submit(6))
    await until(stream, Frame)
    assert system.num_stale(system.decode, "Submit") == 3
    stream.cancel()


async def test_an_attempt_is_served_once_at_a_time(system: AttackedSystem) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and says nothing
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        held = PrefillSource(WorkerId("nobody"), address, Incarnation(1))
        stream = await system.open_session()
        await stream.send(system.submit(1, prefill=held))
        await stream.send(system.submit(2, request_id=RequestId("attack-1"), prefill=None))
        answer = await answer_on(stream)
        assert isinstance(answer, Refused)
        assert (answer.number, answer.error.code) == (2, ErrorCode.PROTOCOL)
        stream.cancel()


async def test_a_prefill_call_is_taken_once_at_a_time(system: AttackedSystem) -> None:
    first = await starting(system)
    again = await system.open_prefill()
    assert await ended_with(again) is ErrorCode.PROTOCOL
    first.cancel()


async def test_a_transfer_is_fetched_once(system: AttackedSystem) -> None:
    stream = await starting(system)
    transfer = next(iter(system.prefill._transports._by_name["grpc"]._senders))  # type: ignore[attr-defined]
    first = await system.peer.open(system.prefill.address, Call.KV)
    await first.send(greet("grpc", transfer.encode()))
    await first.send(End())
    await stream.send(Reserved(0))
    await first.receive()
    again = await system.peer.open(system.prefill.address, Call.KV)
    await again.send(greet("grpc", transfer.encode()))
    assert await ended_with(again) is ErrorCode.NOT_FOUND
    stream.cancel()


@pytest.mark.parametrize(
    "greeting",
    [
        *(greet("grpc", lie) for lie in (b"0123456789abcdef", b"\xff\xfe", b"x" * 100_000)),
        b"no transport",
        b"\xff",
    ],
)
async def test_a_transfer_that_nobody_offered(system: AttackedSystem, greeting: bytes) -> None:
    stream = await system.peer.open(system.prefill.address, Call.KV)
    await stream.send(greeting)
    assert await ended_with(stream) is ErrorCode.NOT_FOUND
    assert system.refused(system.prefill, ErrorCode.NOT_FOUND) == 1


# Another incarnation, another model


async def test_another_incarnation(system: AttackedSystem) -> None:
    session = await system.peer.open(system.decode.address, Call.SESSION)
    await session.send(system.session_open(worker_incarnation=Incarnation(1)))
    assert await ended_with(session) is ErrorCode.STALE_INCARNATION
    prefill = await system.open_prefill(source_incarnation=Incarnation(1))
    assert await ended_with(prefill) is ErrorCode.STALE_INCARNATION
    for worker in system.workers:
        assert system.refused(worker, ErrorCode.STALE_INCARNATION) == 1


async def test_another_model(system: AttackedSystem) -> None:
    stream = await system.open_prefill(fingerprint="of another model")
    assert await ended_with(stream) is ErrorCode.FINGERPRINT_MISMATCH
    assert system.refused(system.prefill, ErrorCode.FINGERPRINT_MISMATCH) == 1


# Values that no engine could compute with


BAD_SAMPLING: list[dict[str, object]] = [
    {"max_tokens": 0},
    {"max_tokens": 2**63},
    {"temperature": math.nan},
    {"temperature": math.inf},
    {"temperature": -1.0},
    {"top_p": math.nan},
    {"top_p": -0.1},
    {"min_p": 1.5},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": 1e-46},
    {"repetition_penalty": math.nan},
    {"presence_penalty": math.inf},
    {"frequency_penalty": 1e300},
    {"logit_bias": ((VOCAB, 1.0),)},
    {"logit_bias": ((1, math.inf),)},
    {"logit_bias": ((1, math.nan),)},
    {"logit_bias": tuple((1, 1.0) for _ in range(VOCAB + 1))},
    {"logprobs": 2**31},
    {"stop_token_ids": (2**32 - 1,)},
    {"stop_token_ids": tuple(range(VOCAB)), "min_tokens": 1},
]
BAD_TOKENS = [b"", b"\x01\x02\x03", pack_tokens((1, VOCAB)), pack_tokens((2**32 - 1,))]
BAD_SUBMITS: list[dict[str, object]] = [
    *({"sampling": replace(SAMPLING, **fields)} for fields in BAD_SAMPLING),  # type: ignore[arg-type]
    *({"prompt_tokens": tokens} for tokens in BAD_TOKENS),
    *({"known_output_tokens": tokens} for tokens in BAD_TOKENS[1:]),
    {"known_output_tokens": pack_tokens(range(SAMPLING.max_tokens))},
    {"prompt_tokens": pack_tokens([1] * ENGINE_TOKENS)},
    {"prompt_tokens": pack_tokens([1] * 5000)},
    {"request_id": RequestId("x" * 100_000)},
    {"cache_salt": "x" * 100_000},
]
BAD_PREFILLS: list[dict[str, object]] = [
    *({"sampling": replace(SAMPLING, **fields)} for fields in BAD_SAMPLING if "max_tokens" not in fields),  # type: ignore[arg-type]
    *({"tokens": tokens} for tokens in BAD_TOKENS),
    {"num_prompt_tokens": 0},
    {"num_prompt_tokens": 31},
    {"num_prompt_tokens": 2**64 - 1},
    {"tokens": pack_tokens([1] * (ENGINE_TOKENS + 1))},
    {"tokens": pack_tokens([1] * 5000)},
    {"cache_salt": "x" * 100_000},
]


def shown(fields: dict[str, object]) -> str:
    return str(fields)[:60]


@pytest.mark.parametrize("where", ["local", "split"])
async def test_submits_with_absurd_values(system: AttackedSystem, where: str) -> None:
    stream = await system.open_session()
    for number, fields in enumerate(BAD_SUBMITS, start=1):
        submit = system.submit(number, **fields)
        await stream.send(replace(submit, prefill=None) if where == "local" else submit)
        answer = await answer_on(stream)
        assert isinstance(answer, Refused), shown(fields)
        assert answer.number == number
        assert answer.error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.REQUEST_TOO_LONG), shown(fields)
    await stream.send(system.submit(number + 1))
    await until(stream, Frame)
    stream.cancel()


@pytest.mark.parametrize("fields", BAD_PREFILLS, ids=shown)
async def test_prefill_calls_with_absurd_values(system: AttackedSystem, fields: dict[str, object]) -> None:
    stream = await system.open_prefill(**fields)
    assert await ended_with(stream) in (ErrorCode.INVALID_REQUEST, ErrorCode.REQUEST_TOO_LONG)


@pytest.mark.parametrize(
    "offers",
    [(), (TransportOffer("teleport"),), (TransportOffer("shared_memory", "another host", b"\xff" * 1000),)],
    ids=str,
)
async def test_a_prefill_call_with_no_transport_in_common(
    system: AttackedSystem, offers: tuple[TransportOffer, ...]
) -> None:
    stream = await system.open_prefill(transports=offers)
    assert await ended_with(stream) is ErrorCode.UNAVAILABLE


@pytest.mark.parametrize(
    "fields",
    [{"deadline_ms": -(2**62)}, {"deadline_ms": 2**62}, {"priority": -(2**63)}, {"seed": 2**64 - 1}],
    ids=str,
)
async def test_extreme_values_that_mean_something(system: AttackedSystem, fields: dict[str, object]) -> None:
    stream = await system.open_session()
    await stream.send(system.submit(**fields))
    assert isinstance(await answer_on(stream), Frame | Failed)
    stream.cancel()


# A source that lies


Lie = Callable[[MessageStream, str], Awaitable[None]]
GRPC = TransportChoice("grpc", "", transfer_id="lie")


def segment(**fields: object) -> Segment:
    good = Segment(0, 0, 8, LayerRange(0, 2), 0, 8 * 128)
    return replace(good, **fields)  # type: ignore[arg-type]


LIES: dict[str, list[Message]] = {
    "a segment before Starting": [segment()],
    "a first token before Starting": [FirstToken(1)],
    "sealed before Starting": [Sealed(0, 0)],
    "an early end": [End()],
    "an unknown transport": [Starting(TransportChoice("teleport", ""), 0)],
    "no transfer": [Starting(TransportChoice("grpc", ""), 0)],
    "a transport that was not offered": [
        Starting(TransportChoice("shared_memory", "", PoolExport("", 1, 0, 1 << 40, "00" * 16)), 0)
    ],
    "started twice": [Starting(GRPC, 0), Starting(GRPC, 0)],
    "a token of no vocabulary": [Starting(GRPC, 0), FirstToken(VOCAB)],
    "blocks past the end": [Starting(GRPC, 0), segment(first_block=1)],
    "no blocks": [Starting(GRPC, 0), segment(num_blocks=0, num_bytes=0)],
    "2**60 blocks": [Starting(GRPC, 0), segment(num_blocks=2**60)],
    "layers that are not there": [Starting(GRPC, 0), segment(layers=LayerRange(0, 3))],
    "layers in reverse": [Starting(GRPC, 0), segment(layers=LayerRange(2, 0))],
    "no layers": [Starting(GRPC, 0), segment(layers=LayerRange(1, 1))],
    "too few bytes": [Starting(GRPC, 0), segment(num_bytes=1)],
    "segment 2**60": [Starting(GRPC, 0), segment(index=2**60)],
    "2**60 segments": [Starting(GRPC, 0), Sealed(2**60, 0)],
    "sealed with nothing": [Starting(GRPC, 0), FirstToken(1), Sealed(0, 0)],
    "an end instead of KV": [Starting(GRPC, 0), End()],
}


@pytest.mark.parametrize("messages", LIES.values(), ids=LIES)
async def test_a_source_that_lies_fails_its_request_only(
    system: AttackedSystem, messages: list[Message]
) -> None:
    async def serve_prefill(stream: MessageStream) -> None:
        await stream.receive()
        for message in messages:
            await stream.send(message)
            if isinstance(message, Starting) and message is messages[0] and len(messages) > 1:
                await stream.receive()
        while True:
            await stream.receive()

    async def serve_kv(stream: MessageStream) -> None:
        await stream.receive()
        await asyncio.Event().wait()

    liar = GrpcRpc(OURS)
    server = await liar.serve("127.0.0.1:0", {Call.PREFILL: serve_prefill, Call.KV: serve_kv})
    source = PrefillSource(WorkerId("liar"), server.address, Incarnation(1))
    stream = await system.open_session()
    await stream.send(system.submit(prefill=source))
    answer = await answer_on(stream)
    while isinstance(answer, Frame):  # a first token that was believable
        answer = await answer_on(stream)
    assert isinstance(answer, Failed)
    assert answer.lost_source
    assert answer.error.code is ErrorCode.PREFILL_FAILED
    stream.cancel()
    await server.stop(0)
    await liar.close()


@pytest.mark.parametrize("address", ["", "nobody", "unix:/etc/passwd", "8.8.8.8:80", "127.0.0.1:1", "[::1"])
async def test_a_source_that_cannot_be_called(system: AttackedSystem, address: str) -> None:
    source = PrefillSource(WorkerId("nobody"), address, Incarnation(1))
    stream = await system.open_session()
    await stream.send(system.submit(prefill=source))
    answer = await answer_on(stream)
    assert isinstance(answer, Failed)
    assert answer.error.code is ErrorCode.PREFILL_FAILED
    stream.cancel()


def test_no_field_of_the_sampling_parameters_is_forgotten() -> None:
    tested = {field for fields in BAD_SAMPLING for field in fields}
    assert set(SamplingParams.__dataclass_fields__) - tested <= {"top_k", "ignore_eos"}
