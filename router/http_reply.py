"""The HTTP response to one request, written straight to ASGI: a token must cost little here."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from starlette.types import Scope, Send

from router.sse import DONE, error_event

_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must pass events on at once
]

ABORT = "pdserve.abort"
"""The ASGI extension of `router.http_server`: ``{"abort": function}``."""


class HttpReply:
    """Either one JSON body or a stream of events."""

    def __init__(
        self,
        scope: Scope,
        send: Send,
        headers: Sequence[tuple[str, str]],
        on_first_event: Callable[[], None],
    ):
        """`headers` are sent with whatever is answered. `on_first_event` is told when the first event of a
        stream has been written."""
        self._scope = scope
        self._send = send
        self._on_first_event = on_first_event
        self._headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        self._streaming = False
        self.late_headers: Callable[[], Sequence[tuple[str, str]]] = tuple
        """Further names and values, made when the answer starts."""
        self.complete = False
        """The last byte has been handed over to the server."""

    async def json(
        self, status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> None:
        """The whole answer."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        sent = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        sent += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        await self._start(status, sent)
        await self._write(content, more=False)

    async def write_event(self, text: str) -> None:
        """One or more whole events, ASCII. The first one starts the answer."""
        is_first, self._streaming = not self._streaming, True
        if is_first:
            await self._start(200, _EVENT_STREAM)
        await self._write(text.encode("ascii"), more=True)
        if is_first:
            self._on_first_event()

    async def end_events(self, text: str) -> None:
        """The last events, and the mark that the stream is whole."""
        await self.write_event(text + DONE)
        await self._write(b"", more=False)

    async def error(self, status: int, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        """An error: as the answer, or as the last event of one that has begun. A whole answer stays whole."""
        if self.complete:
            return
        if self._streaming:
            await self.end_events(error_event(body))
        else:
            await self.json(status, body, headers)

    def abort(self) -> None:
        """Break the connection at once, whatever was still to be written."""
        self._scope["extensions"][ABORT]["abort"]()

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        late = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self.late_headers()]
        sent = [*headers, *self._headers, *late]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def _write(self, content: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": content, "more_body": more})
        self.complete = not more
