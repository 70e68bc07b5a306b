"""Incoming Kv streams, handed to the transport that their first message names.

The first message of every Kv stream is `name greeting`: the transport's name, a space, and what the transport
itself needs to know first.
"""

from collections.abc import Awaitable, Callable, Mapping

from pdserve.contract.errors import NotFound, ProtocolViolation, StreamBroken
from pdserve.contract.ports import Clock, MessageStream

MEETING_TIMEOUT_S = 10.0
"""How long the two ends of a transfer wait for each other. A lost peer is noticed sooner."""

GreetedHandler = Callable[[MessageStream, bytes], Awaitable[None]]
"""Serves a stream whose greeting has been read."""


def greet(transport: str, greeting: bytes) -> bytes:
    """The first message of a Kv stream."""
    return transport.encode() + b" " + greeting


class KvStreams:
    """A worker's handler of Kv streams; one handler of greeted ones for each transport that has any."""

    def __init__(self, clock: Clock, by_transport: Mapping[str, GreetedHandler]) -> None:
        self._clock = clock
        self._by_transport = by_transport

    async def serve(self, stream: MessageStream) -> None:
        """Handler of `Call.KV`. Raises NotFound for a transport that is not used here."""
        name, _, greeting = (await self._first_message(stream)).partition(b" ")
        handler = self._by_transport.get(name.decode("ascii", "replace"))
        if handler is None:
            raise NotFound(f"{stream.peer} opened a Kv stream for a transport that this worker does not use")
        await handler(stream, greeting)

    async def _first_message(self, stream: MessageStream) -> bytes:
        try:
            async with self._clock.timeout(MEETING_TIMEOUT_S):
                message = await stream.receive()
        except TimeoutError:
            raise StreamBroken(f"{stream.peer} opened a Kv stream and said nothing") from None
        if not isinstance(message, bytes):
            raise ProtocolViolation(f"a Kv stream starts with a greeting, not {type(message).__name__}")
        return message
