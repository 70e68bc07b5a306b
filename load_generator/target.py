"""One OpenAI-compatible server, as the generator sees it: streamed completions over HTTP."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from load_generator.prompts import PromptForm, Prompts
from load_generator.records import Record
from pdserve.contract.errors import InvalidRequest, Unavailable

CONNECT_TIMEOUT_S = 10.0
_DATA = b"data:"
_DONE = b"[DONE]"
_MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TargetSettings:
    url: str
    """Without /v1."""
    model: str
    api_key: str | None = None
    temperature: float = 0.0
    ignore_eos: bool = True
    """Ask for answers of exactly the planned length (an extension that pdserve, vLLM and SGLang take)."""
    timeout_s: float = 600.0
    """For one whole request; then it counts as an error."""
    extra_body: tuple[tuple[str, Any], ...] = ()
    """Further fields of every request's body."""


class Target:
    """Sends requests. Made by `open_target`."""

    def __init__(self, session: aiohttp.ClientSession, settings: TargetSettings, prompts: Prompts) -> None:
        self._session = session
        self._settings = settings
        self._prompts = prompts
        self._path = "/v1/chat/completions" if prompts.form is PromptForm.CHAT else "/v1/completions"

    def body(self, record: Record) -> bytes:
        """The request's JSON. Made before it is due, so that making it does not count."""
        prompt = self._prompts.make(record.index, record.planned)
        content: dict[str, Any] = {
            "model": self._settings.model,
            "max_tokens": record.planned.num_output_tokens,
            "temperature": self._settings.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._prompts.form is PromptForm.CHAT:
            content["messages"] = [{"role": "user", "content": prompt}]
        else:
            content["prompt"] = prompt
        if self._settings.ignore_eos:
            content["ignore_eos"] = True
        return json.dumps(content | dict(self._settings.extra_body), separators=(",", ":")).encode()

    async def send(self, record: Record, body: bytes, now: Callable[[], float]) -> None:
        """Send one request and follow its answer to the end; what happens goes into `record`. Raises nothing
        but CancelledError."""
        record.sent_at = now()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                await self._stream(record, body, now)
        except TimeoutError:
            record.error = f"timeout: no end after {self._settings.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            record.error = f"connection: {type(error).__name__}: {error}"
        record.ended_at = now()

    async def _stream(self, record: Record, body: bytes, now: Callable[[], float]) -> None:
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self._path, data=body, headers=headers) as response:
            if response.status != 200:
                record.error = f"HTTP {response.status}: {_message(await response.read())}"
                return
            is_done = False
            async for line in response.content:
                if not line.startswith(_DATA):
                    continue
                payload = line[len(_DATA) :].strip()
                is_done = is_done or payload == _DONE
                if payload != _DONE:
                    _note(record, json.loads(payload), now())
        if not is_done and record.error is None:
            record.error = "stream: it ended without [DONE]"


@asynccontextmanager
async def open_target(settings: TargetSettings, prompts: Prompts) -> AsyncIterator[Target]:
    """A session without a bound on connections: the generator must not queue what is due."""
    headers = {"Authorization": f"Bearer {settings.api_key}"} if settings.api_key else {}
    async with aiohttp.ClientSession(
        settings.url,
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        read_bufsize=_MAX_LINE_BYTES,
    ) as session:
        yield Target(session, settings, prompts)


@dataclass(frozen=True, slots=True)
class ListedModel:
    """What a server says of a model."""

    name: str
    vocab_size: int | None = None
    """An extension of pdserve; None where the server does not tell."""


async def list_models(url: str, api_key: str | None) -> list[ListedModel]:
    """At least one. Raises Unavailable or InvalidRequest."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=CONNECT_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session,
            session.get("/v1/models") as response,
        ):
            content = await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Unavailable(f"{url} does not answer ({error}): is the server up?") from error
    if response.status != 200:
        raise InvalidRequest(f"{url}/v1/models says HTTP {response.status}: {_message(content)}")
    try:
        models = [
            ListedModel(str(each["id"]), each.get("vocab_size")) for each in json.loads(content)["data"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{url}/v1/models is no list of models: is it an OpenAI-compatible server?"
        ) from error
    if not models:
        raise InvalidRequest(f"{url} lists no model: try again when it has loaded one")
    return models


def _note(record: Record, event: dict[str, Any], at: float) -> None:
    """Take over one event of the answer."""
    if "error" in event:
        record.error = f"stream: {event['error'].get('message', event['error'])}"
        return
    if any(_carries_tokens(choice) for choice in event.get("choices") or ()):
        record.token_times.append(at)
        record.num_output_tokens += 1  # until usage says better
    usage = event.get("usage")
    if usage:
        record.num_prompt_tokens = usage.get("prompt_tokens") or 0
        record.num_output_tokens = usage.get("completion_tokens") or record.num_output_tokens
        details = usage.get("prompt_tokens_details") or {}
        record.num_cached_tokens = details.get("cached_tokens") or 0


def _carries_tokens(choice: dict[str, Any]) -> bool:
    """A chat answer begins with an event that only names the role."""
    delta = choice.get("delta")
    if delta is None:
        return "text" in choice
    return any(delta.get(key) for key in ("content", "reasoning_content", "tool_calls"))


def _message(body: bytes) -> str:
    """The server's own words, on one line."""
    try:
        content = json.loads(body)
        text = str(content.get("error", {}).get("message") or content.get("message") or content)
    except (ValueError, AttributeError):
        text = body.decode("utf-8", "replace")
    return " ".join(text.split())[:300]
