"""`pdserve bench` over real HTTP: against a server whose answers are known, and against a real system."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from controller.bench import BenchOptions, run_bench
from load_generator.arrivals import Lengths
from load_generator.prompts import PromptForm
from load_generator.summary import Slo
from router.http_server import serve_http
from tests.integration.conftest import RaySystem

TOKEN_S = 0.02


class KnownServer:
    """Answers every fifth request with 429, one with a broken stream, the others token by token."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, object]] = []
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "known"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        if len(self.bodies) % 5 == 0:
            return JSONResponse({"error": {"message": "too many"}}, 429)
        is_chat = "messages" in body
        breaks = len(self.bodies) == 3
        return StreamingResponse(self._stream(body, is_chat, breaks), media_type="text/event-stream")

    async def _stream(self, body: dict[str, object], is_chat: bool, breaks: bool) -> AsyncIterator[str]:
        count = body["max_tokens"]
        assert isinstance(count, int)
        if is_chat:
            yield _event({"choices": [{"delta": {"role": "assistant"}}]})
        for _ in range(count):
            await asyncio.sleep(TOKEN_S)
            yield _event({"choices": [{"delta": {"content": "x"}} if is_chat else {"text": "x"}]})
        if breaks:
            return
        details = {"cached_tokens": 3}
        usage = {"prompt_tokens": 12, "completion_tokens": count, "prompt_tokens_details": details}
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _event(content: dict[str, object]) -> str:
    return f"data: {json.dumps(content)}\n\n"


@pytest.mark.parametrize("form", [PromptForm.TOKENS, PromptForm.TEXT, PromptForm.CHAT])
async def test_what_a_known_server_does_is_what_is_reported(
    form: PromptForm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = KnownServer()
    server = await serve_http(known.app, "127.0.0.1", 0)
    try:
        options = BenchOptions(
            url=f"http://127.0.0.1:{server.port}",
            rate=100.0,
            count=20,
            lengths=Lengths(12, 4),
            form=form,
            slo=Slo(ttft_ms=60_000),
            json_file=tmp_path / "result.json",
            page_file=tmp_path / "result.html",
        )
        assert await run_bench(options) == 1  # some failed
    finally:
        await server.stop(0)
    content = json.loads((tmp_path / "result.json").read_text())
    (run,) = content["runs"]
    summary = run["summary"]
    assert run["settings"]["model"] == "known"
    assert (summary["num_requests"], summary["num_succeeded"]) == (20, 15)
    assert summary["errors"] == {"HTTP 429": 4, "stream": 1}
    assert summary["good_share"] == 15 / 20
    assert summary["cached_share"] == 3 / 12
    assert summary["inter_token"]["count"] == 15 * 3
    for request in run["requests"]:
        if request["error"] is None:
            assert request["out"] == len(request["tokens"]) == 4
            assert request["tokens"][0] - request["due"] >= 1000 * TOKEN_S * 0.99
            assert request["tokens"][-1] - request["due"] >= 1000 * 4 * TOKEN_S * 0.99
    body = known.bodies[0]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("known", 4, True)
    assert ("messages" in body) is (form is PromptForm.CHAT)
    printed = capsys.readouterr().out
    assert "15 of 20 requests succeeded" in printed
    assert "4 x HTTP 429" in printed
    page = (tmp_path / "result.html").read_text()
    assert page.count("<svg") == 4
    assert not re.findall(r'(?:src|href)="https?:', page), "the page needs nothing from outside"


def test_bench_of_a_running_system(ray_system: RaySystem, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    rows = [{"t": 100 * i, "in": 40, "out": 4, "hash": [0, 1 + i], "block": 32} for i in range(12)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = tmp_path / "result.json"
    done = ray_system.pdserve.run("bench", "--trace", str(trace), "--json", str(result))
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = json.loads(result.read_text())["runs"]
    assert run["summary"]["num_succeeded"] == 12
    assert all(request["in"] == 40 and request["out"] == 4 for request in run["requests"])
    assert run["summary"]["cached_share"] > 0.5, "the first 32 tokens of all but the first"
    assert "time to first token" in done.stdout


@pytest.fixture
def environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "OPENAI_API_KEY"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "http://127.0.0.1:9 does not answer"),
        (["--url", "http://x", "--rate", "1", "--concurrency", "2"], "exclude each other"),
        (["--url", "http://x", "--sweep", "--concurrency", "2"], "leave one out"),
        (["--url", "http://x", "--count", "0"], "--count must be at least 1"),
        (["--url", "http://x", "--vocabulary", "9:3"], "is not A:B with A < B"),
        (["--url", "http://x", "--body", "[1]"], "must be a JSON object"),
        (["--url", "http://x", "--model", "m", "--trace", "/none"], "cannot read the trace /none"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], words: str, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "controller.cli", "bench", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
