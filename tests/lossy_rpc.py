"""An Rpc that loses, doubles or swaps messages without breaking their streams, as no real network does."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from pdserve.contract.messages import Message
from pdserve.contract.ports import Call, Handler, MessageStream, Rpc, RpcServer
from pdserve.rpc.stream import Direction


class Mischief(StrEnum):
    LOSE = "lose"
    DOUBLE = "double"
    SWAP = "swap"
    """With the next message of the same stream and direction."""


@dataclass(slots=True)
class Target:
    """What happens to the `nth` message of `kind` that travels `direction`, counted over all streams."""

    mischief: Mischief
    kind: type
    direction: Direction
    call: Call
    nth: int = 1
    num_seen: int = field(default=0, init=False)

    @property
    def hit(self) -> bool:
        return self.num_seen >= self.nth

    def matches(self, call: Call, direction: Direction, message: Message) -> bool:
        if call is not self.call or direction is not self.direction or type(message) is not self.kind:
            return False
        self.num_seen += 1
        return self.num_seen == self.nth


class LossyRpc:
    """Wraps another Rpc; acts on the streams that are opened through it, in both directions."""

    def __init__(self, inner: Rpc, target: Target) -> None:
        self._inner = inner
        self._target = target

    async def open(self, address: str, call: Call) -> MessageStream:
        return _LossyStream(await self._inner.open(address, call), call, self._target)

    async def serve(self, address: str, handlers: Mapping[Call, Handler], *told: object) -> RpcServer:
        return await self._inner.serve(address, handlers, *told)  # type: ignore[arg-type]

    async def close(self) -> None:
        await self._inner.close()


class _LossyStream:
    def __init__(self, inner: MessageStream, call: Call, target: Target) -> None:
        self._inner = inner
        self._call = call
        self._target = target
        self._arrived: list[Message] = []
        self._held: dict[Direction, Message] = {}

    @property
    def peer(self) -> str:
        return self._inner.peer

    async def send(self, message: Message) -> None:
        for each in self._meddle(Direction.UP, message):
            await self._inner.send(each)

    async def receive(self) -> Message:
        while not self._arrived:
            self._arrived += self._meddle(Direction.DOWN, await self._inner.receive())
        return self._arrived.pop(0)

    def cancel(self) -> None:
        self._inner.cancel()

    def _meddle(self, direction: Direction, message: Message) -> list[Message]:
        held = self._held.pop(direction, None)
        if held is not None:
            return [message, held]
        if not self._target.matches(self._call, direction, message):
            return [message]
        if self._target.mischief is Mischief.SWAP:
            self._held[direction] = message
            return []
        return [] if self._target.mischief is Mischief.LOSE else [message, message]
