"""The decode worker's end of a link."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence

from pdserve.contract.errors import PdserveError, ProtocolViolation, StreamBroken
from pdserve.contract.ports import Call, MessageStream, Rpc
from pdserve.handoff.transports.kv_streams import greet
from pdserve.handoff.transports.pair_groups.link_stream import LinkStream, receive_message, receive_raw
from pdserve.handoff.transports.pair_groups.live_group import GroupPlace, LiveGroup
from pdserve.handoff.transports.pair_groups.messages import (
    NO_GROUP,
    Begin,
    Build,
    Dropped,
    Echo,
    Entry,
    Gone,
    Hello,
    Leave,
    Pieces,
    Want,
    encode,
)
from pdserve.handoff.transports.pair_groups.own_address import own_address_towards
from pdserve.handoff.transports.pair_groups.staging import Payload
from pdserve.handoff.transports.pair_groups.two_rank_group import RECEIVER_RANK
from pdserve.tasks import task_scope

logger = logging.getLogger(__name__)

READ_AHEAD_PIECES = 2
"""Pieces of a segment that may lie here before they are copied into the pool."""

REBUILD_PAUSE_S = 5.0
"""How long a pair does without a group after one could not be built or its place was needed."""


class Arrival:
    """A segment that is wanted: its pieces, as they come in."""

    def __init__(self, transfer: str, sequence: int, sizes: Sequence[int]) -> None:
        self.key = (transfer, sequence)
        self.sizes = list(sizes)
        self.generation = NO_GROUP
        """Of the group through which it comes now."""
        self.num_arrived = 0
        self.num_by_stream = 0
        self._waiting: deque[Payload] = deque()
        self._changed = asyncio.Event()
        self._failure: PdserveError | None = None
        self._abandoned = False

    @property
    def over(self) -> bool:
        """Nothing more is needed."""
        return self._abandoned or self._failure is not None or self.num_arrived == len(self.sizes)

    def want(self) -> Want:
        """For what has not arrived."""
        transfer, sequence = self.key
        return Want(transfer, sequence, self.num_arrived, self.sizes[self.num_arrived :], self.generation)

    async def next_piece(self) -> Payload:
        """Raises what `fail` was told."""
        while not self._waiting:
            self.raise_failure()
            await self._change()
        self._changed.set()
        return self._waiting.popleft()

    async def put(self, piece: Payload, by_stream: bool) -> None:
        """The next piece is here. Waits while the pool's copies are behind; what nobody needs any more is let
        go."""
        while len(self._waiting) >= READ_AHEAD_PIECES and not self.over:
            await self._change()
        if not self.over:
            self._waiting.append(piece)
            self.num_arrived += 1
            self.num_by_stream += by_stream
            self._changed.set()

    def fail(self, error: PdserveError) -> None:
        self._failure = self._failure or error
        self._changed.set()

    def raise_failure(self) -> None:
        """Raises what `fail` was told, if it was."""
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Nobody will ask for the next piece."""
        self._abandoned = True
        self._waiting.clear()
        self._changed.set()

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class ReceiverLink:
    """Asks one source for segments, and keeps a group with it while that is possible."""

    def __init__(
        self, name: str, address: str, rpc: Rpc, place: GroupPlace, on_end: Callable[[], None]
    ) -> None:
        """`name`: the transport's, which the source's handler of Kv streams reads."""
        self._name = name
        self._address = address
        self._rpc = rpc
        self._place = place
        self._on_end = on_end
        self._outgoing = LinkStream()
        self._transfers: set[str] = set()
        self._arrivals: dict[tuple[str, int], Arrival] = {}  # (transfer, sequence) -> what is still wanted
        self._echoes: dict[int, asyncio.Event] = {}  # number -> it has come back, or never will
        self._next_echo = 0
        self._broken: StreamBroken | None = None
        self._live: LiveGroup | None = None
        self._by_group: asyncio.Queue[Arrival] = asyncio.Queue()  # of the group that is live, in order
        self._generation = NO_GROUP
        self._rebuild_at = 0.0
        self._running = asyncio.create_task(self._run())

    @property
    def address(self) -> str:
        return self._address

    def begin(self, transfer: str) -> None:
        """A transfer of this source's starts. Raises StreamBroken when the link has broken."""
        self._check_whole()
        self._transfers.add(transfer)
        self._outgoing.post(Begin(transfer))
        self._want_group()

    def leave(self, transfer: str) -> None:
        """It has ended."""
        self._transfers.discard(transfer)
        self._outgoing.post(Leave(transfer))

    def want(self, transfer: str, sequence: int, sizes: Sequence[int]) -> Arrival:
        """Ask for the `sequence`th segment of a transfer, pieces of `sizes` bytes; `forget` it in the end."""
        self._check_whole()
        self._want_group()
        arrival = Arrival(transfer, sequence, sizes)
        self._arrivals[arrival.key] = arrival
        live = self._live
        if live is not None and live.usable:
            arrival.generation = live.generation
            self._by_group.put_nowait(arrival)
            self._place.budget.touch(live)
        self._outgoing.post(arrival.want())
        return arrival

    async def verify(self, arrival: Arrival) -> None:
        """What has arrived is not what it should be. Raises StreamBroken when it was filler, because the
        source has closed the transfer."""
        if arrival.num_by_stream == len(arrival.sizes):
            return
        number = self._next_echo = self._next_echo + 1
        self._echoes[number] = echo = asyncio.Event()
        self._outgoing.post(Echo(number))
        await echo.wait()
        arrival.raise_failure()

    def forget(self, arrival: Arrival) -> None:
        """Nothing of it is needed any more."""
        arrival.abandon()
        self._arrivals.pop(arrival.key, None)

    async def settled(self) -> None:
        """Wait until the group that is being built is built, or cannot be."""
        if self._live is not None:
            await self._live.settled.wait()

    async def close(self) -> None:
        """End the link and all its transfers."""
        self._running.cancel()
        await asyncio.wait([self._running])

    def _check_whole(self) -> None:
        if self._broken is not None:
            raise StreamBroken(self._broken.info.message)

    # The stream

    async def _run(self) -> None:
        reason = StreamBroken(f"the link with {self._address} has ended")
        try:
            await self._exchange_messages()
        except PdserveError as error:
            reason = StreamBroken(f"the link with {self._address} is broken: {error}")
        finally:
            self._broken = reason
            for arrival in self._arrivals.values():
                arrival.fail(reason)
            for echo in self._echoes.values():
                echo.set()
            self._on_end()
            self._drop(str(reason), tell=False)

    async def _exchange_messages(self) -> None:
        stream = await self._rpc.open(self._address, Call.KV)
        try:
            host = await self._own_host()
            await stream.send(greet(self._name, encode(Hello(host))))
            async with task_scope() as tasks:
                writer = tasks.create_task(self._outgoing.run(stream))
                await self._read(stream)
                writer.cancel()
        finally:
            stream.cancel()

    async def _own_host(self) -> str:
        """The own address towards the source."""
        return await asyncio.to_thread(own_address_towards, _host_of(self._address))

    async def _read(self, stream: MessageStream) -> None:
        """Until the source closes the link."""
        while (message := await receive_message(stream)) is not None:
            match message:
                case Pieces(transfer, sequence, count):
                    await self._read_pieces(stream, self._arrivals.get((transfer, sequence)), count)
                case Gone(transfer, sequence):
                    self._lose_segment(transfer, sequence)
                case Echo(number):
                    if (echo := self._echoes.pop(number, None)) is not None:
                        echo.set()
                case Entry(generation):
                    if self._live is not None and self._live.generation == generation:
                        self._live.arrive(message)
                case Dropped(generation, reason):
                    if self._live is not None and self._live.generation == generation:
                        self._lose_group(self._live, f"at the source: {reason}", tell=False)
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} is not for a decode worker")

    async def _read_pieces(self, stream: MessageStream, arrival: Arrival | None, count: int) -> None:
        if arrival is None:
            for _ in range(count):
                await receive_raw(stream, None)
            return
        sizes = arrival.want().sizes
        if count != len(sizes) or arrival.generation != NO_GROUP:
            raise ProtocolViolation(f"{len(sizes)} pieces were wanted from {stream.peer}, it sends {count}")
        for size in sizes:
            await arrival.put(await receive_raw(stream, size), by_stream=True)

    def _lose_segment(self, transfer: str, sequence: int) -> None:
        arrival = self._arrivals.get((transfer, sequence))
        if arrival is not None:
            arrival.fail(
                StreamBroken(f"the source at {self._address} sends no more KV: it closed the transfer")
            )

    # The group

    def _want_group(self) -> None:
        """Begin to build one, when there is none and it is time."""
        now = self._place.clock.now()
        if self._live is not None or now < self._rebuild_at:
            return
        self._generation += 1
        live = LiveGroup(
            self._place,
            self._generation,
            RECEIVER_RANK,
            post=self._outgoing.post,
            is_idle=lambda: not self._transfers,
            retire=self._retire,
        )
        if not self._place.budget.enter(live):
            self._rebuild_at = now + REBUILD_PAUSE_S
            logger.info("no process group with %s: this worker has as many as it may have", self._address)
            return
        self._live, self._by_group = live, asyncio.Queue()
        self._outgoing.post(Build(live.generation))
        live.start(self._keep)

    async def _keep(self, live: LiveGroup) -> None:
        """Build it, receive what comes by it, and close it when it is dropped."""
        try:
            await live.build(await self._own_host())
            await self._receive_by_group(live, self._by_group)
        except StreamBroken as error:
            self._lose_group(live, str(error))
        finally:
            await live.group.close()

    async def _receive_by_group(self, live: LiveGroup, arrivals: "asyncio.Queue[Arrival]") -> None:
        """In the order of the Wants. What has been abandoned meanwhile comes all the same."""
        while True:
            arrival = await arrivals.get()
            for size in arrival.sizes:
                await arrival.put(await live.group.receive(size), by_stream=False)

    def _lose_group(self, live: LiveGroup, reason: str, tell: bool = True) -> None:
        if live is not self._live:
            return
        logger.warning("the process group with %s is dropped: %s", self._address, reason)
        if not live.usable:
            self._rebuild_at = self._place.clock.now() + REBUILD_PAUSE_S
        self._drop(reason, tell)

    def _retire(self, live: LiveGroup) -> None:
        if live is self._live:
            self._rebuild_at = self._place.clock.now() + REBUILD_PAUSE_S
            self._drop("its place is needed for another pair")

    def _drop(self, reason: str, tell: bool = True) -> None:
        """What has not come by the group is wanted by the stream."""
        live, self._live = self._live, None
        if live is None:
            return
        self._place.budget.leave(live)
        live.drop()
        if tell:
            self._outgoing.post(Dropped(live.generation, reason))
        for arrival in self._arrivals.values():
            if arrival.generation == live.generation and not arrival.over:
                arrival.generation = NO_GROUP
                self._outgoing.post(arrival.want())


def _host_of(address: str) -> str:
    """Of `host:port`; an IPv6 host stands in brackets."""
    return address.rpartition(":")[0].strip("[]")
