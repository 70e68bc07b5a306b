"""A link's Kv stream as its ends use it: messages are posted without waiting and leave in that order."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.messages import End
from pdserve.contract.ports import MessageStream
from pdserve.handoff.transports.pair_groups.messages import LinkMessage, Pieces, decode, encode


class LinkStream:
    """`run` takes what is posted to the stream."""

    def __init__(self) -> None:
        self._outgoing: asyncio.Queue[_Outgoing] = asyncio.Queue()

    def post(self, message: LinkMessage) -> None:
        """Say it as soon as the stream takes it."""
        self._outgoing.put_nowait(_Outgoing([encode(message)]))

    async def deliver(self, header: Pieces, pieces: Sequence[bytes]) -> None:
        """Say `header` and right behind it the pieces. Waits until the stream has taken all."""
        taken = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(_Outgoing([encode(header), *pieces], taken))
        await taken

    def end(self) -> None:
        """Say End after everything else."""
        self._outgoing.put_nowait(_Outgoing([End()]))

    async def run(self, stream: MessageStream) -> None:
        """Until End has been said. Raises StreamBroken."""
        while True:
            outgoing = await self._outgoing.get()
            for message in outgoing.messages:
                await stream.send(message)
                if isinstance(message, End):
                    return
            if outgoing.taken is not None and not outgoing.taken.done():
                outgoing.taken.set_result(None)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    messages: Sequence[bytes | End]
    taken: "asyncio.Future[None] | None" = None
    """Resolved when the stream has taken them."""


async def receive_message(stream: MessageStream) -> LinkMessage | None:
    """The next message; None when the peer has closed the link. Raises StreamBroken, ProtocolViolation."""
    raw = await stream.receive()
    if isinstance(raw, End):
        if raw.error is not None:
            raise StreamBroken(f"{stream.peer} has ended the link: {raw.error.message}")
        return None
    return decode(raw)


async def receive_raw(stream: MessageStream, num_bytes: int | None) -> bytes:
    """The next message, which is `num_bytes` of bare bytes (None: any)."""
    raw = await stream.receive()
    if not isinstance(raw, bytes) or num_bytes not in (None, len(raw)):
        raise ProtocolViolation(f"{num_bytes} bytes of KV were to come from {stream.peer}")
    return raw
