"""KV bytes over a gRPC stream of its own. Works everywhere, so it is the fallback of all transports.

The decode worker opens a Kv stream to the source, greets it with the transfer's id and says End. The source
answers with the segments' bytes in the order in which the segments are sent, one message for each of its
`pieces`, and with End. The messages carry nothing else: both ends cut a segment at the same places.

Each segment is read and digested on the transfer thread before its Segment message leaves, so its bytes
wait here in memory until the stream takes them. A segment is read only when no more than UNSENT_MESSAGES of
earlier ones wait. That cannot deadlock: the receiver has been told of those and reads on.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence

from pdserve.contract.errors import NotFound, ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import End, Segment, TransportChoice, TransportOffer
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import combine, digest
from pdserve.handoff.transports.base import (
    SEGMENT_BYTES,
    Accepted,
    Declined,
    LocalSide,
    SegmentReceiver,
    TransferStats,
)
from pdserve.handoff.transports.kv_streams import MEETING_TIMEOUT_S, greet
from pdserve.handoff.transports.pieces import Piece, cut
from pdserve.handoff.transports.pool_bytes import PoolBytes

UNSENT_MESSAGES = 4
"""Messages of earlier segments that may wait for the stream when the next segment is read."""

FAREWELL_TIMEOUT_S = 1.0
"""How long the source tries to say End to a receiver that takes nothing any more."""


class GrpcStreamTransport:
    """Implements `Transport`; `serve` is the handler of Kv streams."""

    name = "grpc"

    def __init__(self, side: LocalSide) -> None:
        self._side = side
        self._pool = PoolBytes(side)
        self._senders: dict[str, _Sender] = {}  # transfer id -> sender whose receiver has not come yet

    def offer(self) -> TransportOffer | None:
        return TransportOffer(self.name)

    def accept(self, offer: TransportOffer) -> Accepted | Declined:
        transfer_id = f"{self._side.rng.random_bits(64):016x}"
        sender = _Sender(self._side, self._pool, lambda: self._forget(transfer_id))
        self._senders[transfer_id] = sender
        choice = TransportChoice(self.name, "grpc works between all workers", transfer_id=transfer_id)
        return Accepted(choice, sender)

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        if not choice.transfer_id:
            raise ProtocolViolation(f"{source_address} chose {self.name} and names no transfer")
        stream = await self._side.rpc.open(source_address, Call.KV)
        try:
            await stream.send(greet(self.name, choice.transfer_id.encode()))
            await stream.send(End())
        except BaseException:
            stream.cancel()
            raise
        return _Receiver(self._side, self._pool, stream)

    async def serve(self, stream: MessageStream, greeting: bytes) -> None:
        """Handler of Kv streams; `greeting` is the transfer's id. Raises NotFound when no sender waits."""
        transfer_id = greeting.decode("ascii", "replace")
        sender = self._senders.pop(transfer_id, None)
        if sender is None:
            raise NotFound(f"no transfer {transfer_id!r} waits here: it has ended or is another worker's")
        await sender.run(stream)

    async def close(self) -> None:
        for sender in list(self._senders.values()):
            await sender.close()

    def _forget(self, transfer_id: str) -> None:
        self._senders.pop(transfer_id, None)


class _Sender:
    """The source's end. `send` fills a queue that `run`, in the stream's handler, empties."""

    def __init__(self, side: LocalSide, pool: PoolBytes, forget: Callable[[], None]) -> None:
        self.stats = TransferStats()
        self.max_segment_bytes = SEGMENT_BYTES
        self._side = side
        self._pool = pool
        self._forget = forget
        self._stream: MessageStream | None = None
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()  # None: say End
        self._num_unsent = 0  # messages that the stream has not taken
        self._moved = asyncio.Event()  # one was taken, or none will be any more
        self._met = asyncio.Event()  # the receiver has come, or will not be needed
        self._over = asyncio.Event()  # nothing will be sent any more
        self._sending = asyncio.Lock()
        self._closed = False

    async def send(
        self, index: int, first_block: int, block_ids: Sequence[BlockId], layers: LayerRange
    ) -> Segment:
        started_at = self._side.clock.now()
        async with self._sending:
            await self._meet()
            await self._wait_for_room()
            shares = [
                await self._send_piece(block_ids, piece)
                for piece in cut(len(block_ids), layers, self._side.layer_bytes)
            ]
        num_bytes = len(block_ids) * self._side.part_bytes(layers)
        self.stats.add(num_bytes, self._side.clock.now() - started_at)
        return Segment(index, first_block, len(block_ids), layers, combine(shares), num_bytes)

    async def run(self, stream: MessageStream) -> None:
        """Serve the receiver's stream until `close` or until it breaks."""
        self._stream = stream
        self._met.set()
        try:
            while (message := await self._messages.get()) is not None:
                await stream.send(message)
                self._num_unsent -= 1
                self._moved.set()
            await stream.send(End())
        finally:
            self._over.set()
            self._moved.set()

    async def close(self) -> None:
        self._closed = True
        self._forget()
        self._met.set()
        self._moved.set()
        async with self._sending:
            if self._stream is not None:
                await self._end(self._stream)

    async def _meet(self) -> None:
        try:
            async with self._side.clock.timeout(MEETING_TIMEOUT_S):
                await self._met.wait()
        except TimeoutError:
            raise StreamBroken(
                f"the decode worker did not open its Kv stream within {MEETING_TIMEOUT_S} s"
            ) from None

    async def _wait_for_room(self) -> None:
        while self._num_unsent > UNSENT_MESSAGES and not self._has_ended():
            self._moved.clear()
            await self._moved.wait()

    def _has_ended(self) -> bool:
        return self._closed or self._over.is_set()

    async def _send_piece(self, block_ids: Sequence[BlockId], piece: Piece) -> int:
        """Returns the piece's share of the segment's digest."""
        if self._has_ended():
            raise StreamBroken("the decode worker's Kv stream has ended")
        job = functools.partial(self._read, block_ids[piece.start : piece.stop], piece)
        message, share = await self._side.executor.copy(job)
        self._num_unsent += 1
        self._messages.put_nowait(message)
        return share

    def _read(self, block_ids: Sequence[BlockId], piece: Piece) -> tuple[bytes, int]:
        message = self._pool.read(block_ids, piece.layers)
        return message, digest(message, piece.first_lane)

    async def _end(self, stream: MessageStream) -> None:
        if self._num_unsent or not await self._said_farewell():
            stream.cancel()
            await self._over.wait()

    async def _said_farewell(self) -> bool:
        self._messages.put_nowait(None)
        try:
            async with self._side.clock.timeout(FAREWELL_TIMEOUT_S):
                await self._over.wait()
        except TimeoutError:
            return False
        return True


class _Receiver:
    """The decode worker's end."""

    def __init__(self, side: LocalSide, pool: PoolBytes, stream: MessageStream) -> None:
        self.stats = TransferStats()
        self._side = side
        self._pool = pool
        self._stream = stream
        self._receiving = asyncio.Lock()
        self._in_step = True  # the next message begins the next segment

    async def receive(self, segment: Segment, block_ids: Sequence[BlockId]) -> bool:
        self._side.check_segment(segment, block_ids)
        started_at = self._side.clock.now()
        async with self._receiving:
            matched = await self._copy(segment, block_ids) == segment.digest
        self.stats.add(segment.num_bytes, self._side.clock.now() - started_at, matched)
        return matched

    async def close(self) -> None:
        self._stream.cancel()
        async with self._receiving:
            self._in_step = False

    async def _copy(self, segment: Segment, block_ids: Sequence[BlockId]) -> int:
        """The digest of what lies in the own pool afterwards."""
        if not self._in_step:
            raise StreamBroken("this transfer has ended or was given up in the middle of a segment")
        self._in_step = False
        shares = []
        for piece in cut(len(block_ids), segment.layers, self._side.layer_bytes):
            message = await self._next_message(piece.num_bytes)
            targets = block_ids[piece.start : piece.stop]
            job = functools.partial(
                self._pool.write, targets, piece.layers, memoryview(message), piece.first_lane
            )
            shares.append(await self._side.executor.copy(job))
        self._in_step = True
        return combine(shares)

    async def _next_message(self, num_bytes: int) -> bytes:
        message = await self._stream.receive()
        if isinstance(message, End):
            why = message.error.message if message.error else "it has closed the transfer"
            raise StreamBroken(f"the source at {self._stream.peer} sends no more KV: {why}")
        if not isinstance(message, bytes) or len(message) != num_bytes:
            raise ProtocolViolation(f"{num_bytes} bytes of KV were to come from {self._stream.peer}")
        return message
