"""`pdserve generate`: one prompt over HTTP, the answer as it comes."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx

from controller.terminal import say, say_piece
from pdserve.contract.errors import InvalidRequest, Unavailable

_CONNECT_TIMEOUT_S = 5.0
_DATA = "data: "
_LAST = "[DONE]"


@dataclass(frozen=True, slots=True)
class Question:
    prompt: str
    max_tokens: int
    temperature: float | None = None
    seed: int | None = None
    chat_only: bool = False
    raw: bool = False
    """Complete the prompt as it is. Otherwise it is a chat message where the model has a chat template."""


async def stream_answer(url: str, question: Question) -> None:
    """Write the answer to stdout. Raises InvalidRequest or Unavailable with the server's own words."""
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT_S)
    async with httpx.AsyncClient(base_url=url.rstrip("/"), timeout=timeout) as client:
        try:
            await _answer(client, question)
        except httpx.HTTPError as error:
            raise Unavailable(
                f"{url} does not answer ({error}): is the system up? see `pdserve status`"
            ) from error


async def _answer(client: httpx.AsyncClient, question: Question) -> None:
    if not question.raw:
        try:
            return await _stream(client, "/v1/chat/completions", _chat_body(question))
        except InvalidRequest as error:
            if question.chat_only or error.info.param != "messages":
                raise
    return await _stream(client, "/v1/completions", {"prompt": question.prompt, **_sampling(question)})


async def _stream(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    async with client.stream("POST", path, json=body) as response:
        if response.status_code != httpx.codes.OK:
            raise _refusal(response.status_code, await response.aread())
        async for event in _events(response):
            if "error" in event:
                raise Unavailable(str(event["error"].get("message", event["error"])))
            for choice in event.get("choices", []):
                say_piece(choice.get("text") or choice.get("delta", {}).get("content") or "")
    say()


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith(_DATA) and line != _DATA + _LAST:
            yield json.loads(line.removeprefix(_DATA))


def _refusal(status: int, body: bytes) -> InvalidRequest | Unavailable:
    try:
        error = json.loads(body)["error"]
        message, param = str(error["message"]), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, param = f"HTTP {status}", None
    if httpx.codes.is_client_error(status):
        return InvalidRequest(message, param=param)
    return Unavailable(message)


def _chat_body(question: Question) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question.prompt}], **_sampling(question)}


def _sampling(question: Question) -> dict[str, Any]:
    given = {"temperature": question.temperature, "seed": question.seed}
    chosen = {key: value for key, value in given.items() if value is not None}
    return {"max_tokens": question.max_tokens, "stream": True, **chosen}
