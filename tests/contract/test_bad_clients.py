"""Bad input at the ports of a router's APIs: bounded, answered or cut, and the next client is served."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from router.grpc_api import GrpcApi, serve_grpc
from router.http_api import create_app
from router.http_server import MAX_HEAD_BYTES, HttpServer, serve_http
from router.text import TextModel
from tests.contract.test_bad_input import SOCKET_BYTES
from tests.fake_desk import FakeDesk
from tests.small_tokenizers import save_chat_folder

PATIENCE_S = 0.3
"""How long the server of these tests waits for a request."""

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return TextModel.load(save_chat_folder(folder))


class Apis:
    def __init__(self, desk: FakeDesk, http: HttpServer, grpc_api: GrpcApi) -> None:
        self.desk = desk
        self.http = http
        self.grpc = grpc_api

    async def serve(self) -> None:
        """The next clients of both."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.http.port}", verify=False) as client:
            answer = await client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2})
        assert answer.status_code == 200, answer.text
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.grpc.port}") as channel:
            await channel.channel_ready()


@pytest.fixture
async def apis(text: TextModel) -> AsyncIterator[Apis]:
    desk = FakeDesk()
    http = await serve_http(create_app(desk, text), "127.0.0.1", 0, PATIENCE_S)
    grpc_api = await serve_grpc(desk, text, "127.0.0.1", 0)
    started = Apis(desk, http, grpc_api)
    yield started
    await started.serve()
    await http.stop(1)
    await grpc_api.stop(1)
    assert not desk.running


async def answer_to(port: int, *parts: bytes) -> bytes:
    """Write, close nothing, and read until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    with contextlib.suppress(ConnectionError):
        for part in parts:
            writer.write(part)
            await writer.drain()
        answer = await reader.read()
    writer.close()
    return answer


GARBAGE = {
    "no line": b"\x00" * 100,
    "a TLS hello": SOCKET_BYTES["a TLS hello"],
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
    "two lengths": HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a header without a name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "a URL that is none": b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE)
async def test_what_is_no_http(apis: Apis, raw: bytes) -> None:
    answer = await answer_to(apis.http.port, raw)
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 408", b"HTTP/1.1 404"))
    assert not apis.desk.requests


@pytest.mark.parametrize("seed", range(10))
async def test_noise(apis: Apis, seed: int) -> None:
    rng = random.Random(seed)
    await answer_to(apis.http.port, rng.randbytes(2000))
    await answer_to(
        apis.http.port, HEAD + b"Connection: close\r\nContent-Length: 2000\r\n\r\n" + rng.randbytes(2000)
    )
    assert not apis.desk.requests


@pytest.mark.parametrize(
    "parts",
    [
        [],
        [b"P"],
        [HEAD],
        [HEAD + b"X: " + b"a" * 100],
        [HEAD + b"Content-Length: 1000\r\n\r\n", b"{"],
        [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n"],
    ],
    ids=["nothing", "a letter", "half a head", "half a header", "half a body", "half of the chunks"],
)
async def test_half_a_request_is_answered_and_cut(apis: Apis, parts: list[bytes]) -> None:
    answer = await answer_to(apis.http.port, *parts)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
    assert "was not here after" in json.loads(body)["error"]["message"]
    assert not apis.desk.requests


async def test_many_half_requests_do_not_keep_others_out(apis: Apis) -> None:
    slow = [asyncio.ensure_future(answer_to(apis.http.port, HEAD)) for _ in range(200)]
    await apis.serve()
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in await asyncio.gather(*slow))


@pytest.mark.parametrize(
    "head",
    [b"GET /" + b"a" * MAX_HEAD_BYTES, HEAD + b"X: " + b"a" * MAX_HEAD_BYTES, HEAD + b"X: a\r\n" * 20_000],
    ids=["URL", "header", "headers"],
)
async def test_a_head_without_end_is_cut(apis: Apis, head: bytes) -> None:
    answer = await answer_to(apis.http.port, head)
    assert not answer or answer.startswith(b"HTTP/1.1 431")  # nothing: it was cut while we wrote
    assert not apis.desk.requests


async def test_a_request_in_time_may_wait_for_its_answer(apis: Apis) -> None:
    """The clock runs until the request has arrived, and again for the next one on the connection."""
    body = json.dumps({"prompt": "hello", "max_tokens": 2}).encode()
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = await answer_to(apis.http.port, request + request + HEAD)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.count(b"HTTP/1.1 408") == 1


@pytest.mark.parametrize("raw", [raw for name, raw in SOCKET_BYTES.items() if name != "half a preface"])
async def test_what_is_no_grpc(apis: Apis, raw: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", apis.grpc.port)
    writer.write(raw)
    writer.write_eof()
    with contextlib.suppress(ConnectionError):
        await reader.read()
    writer.close()


@pytest.mark.parametrize("raw", [b"", b"\xff\xff", b"\x0a\xff\xff\xff\xff\x0f", bytes(1000)])
@pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
async def test_messages_that_are_no_requests(apis: Apis, method: str, raw: bytes) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{apis.grpc.port}") as channel:
        call: Any = channel.unary_stream(f"/pdserve.api.v1.Generation/{method}")(raw)
        assert await call.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.INTERNAL,
            grpc.StatusCode.UNKNOWN,
        )
    assert not apis.desk.requests
