"""The source's end of a link."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ports import EngineExecutor, MessageStream
from pdserve.handoff.transports.pair_groups.link_stream import LinkStream, receive_message
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
)
from pdserve.handoff.transports.pair_groups.own_address import own_address_towards
from pdserve.handoff.transports.pair_groups.two_rank_group import SOURCE_RANK, GroupFailed
from pdserve.tasks import task_scope

logger = logging.getLogger(__name__)


class StagedTransfer(Protocol):
    """The source's end of one Prefill call, as the link sees it."""

    def meet(self) -> None:
        """Its decode worker is here."""
        ...

    def leave(self) -> None:
        """Its decode worker needs nothing more, or has gone."""
        ...

    def pieces(self, sequence: int) -> Sequence[torch.Tensor] | None:
        """The bytes of the `sequence`th segment, which is wanted now; None when they are not here."""
        ...


class SourceLink:
    """Serves one decode worker's stream: hands out what is staged, by group or by the stream."""

    def __init__(
        self,
        stream: MessageStream,
        hello: Hello,
        place: GroupPlace,
        find: Callable[[str], StagedTransfer | None],
        executor: EngineExecutor,
        most_bytes: int,
    ) -> None:
        """`find` knows the transfers of this source; nobody may want more than `most_bytes` at once."""
        self._stream = stream
        self._hello = hello
        self._place = place
        self._find = find
        self._executor = executor
        self._most_bytes = most_bytes
        self._outgoing = LinkStream()
        self._transfers: dict[str, StagedTransfer] = {}
        self._wants: asyncio.Queue[Want] = asyncio.Queue()
        self._live: LiveGroup | None = None

    async def run(self) -> None:
        """Until the decode worker closes the link. Raises StreamBroken, ProtocolViolation."""
        try:
            async with task_scope() as tasks:
                writer = tasks.create_task(self._outgoing.run(self._stream))
                server = tasks.create_task(self._serve_wants())
                await self._read()
                server.cancel()
                self._outgoing.end()
                await writer
        finally:
            for transfer in self._transfers.values():
                transfer.leave()
            self._transfers.clear()
            self._drop("the link has ended")

    def close(self) -> None:
        """Break the link; `run` ends."""
        self._stream.cancel()

    async def _read(self) -> None:
        while (message := await receive_message(self._stream)) is not None:
            match message:
                case Begin(transfer):
                    self._begin(transfer)
                case Want():
                    self._check(message)
                    self._wants.put_nowait(message)
                case Echo():
                    self._outgoing.post(message)
                case Leave(transfer):
                    if (left := self._transfers.pop(transfer, None)) is not None:
                        left.leave()
                case Build(generation):
                    self._build(generation)
                case Entry(generation):
                    if self._live is not None and self._live.generation == generation:
                        self._live.arrive(message)
                case Dropped(generation, reason):
                    if self._live is not None and self._live.generation == generation:
                        self._drop(reason, tell=False)
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} is not for a source")

    def _begin(self, name: str) -> None:
        """A transfer that has ended meanwhile answers when something of it is wanted."""
        if (transfer := self._find(name)) is not None:
            self._transfers[name] = transfer
            transfer.meet()

    def _check(self, want: Want) -> None:
        if any(size <= 0 for size in want.sizes) or sum(want.sizes) > self._most_bytes:
            raise ProtocolViolation(
                f"pieces of {want.sizes} bytes are wanted from a pool of {self._most_bytes}"
            )

    # The group

    def _build(self, generation: int) -> None:
        self._drop("another one is to be built", tell=False)
        live = LiveGroup(
            self._place,
            generation,
            SOURCE_RANK,
            post=self._outgoing.post,
            is_idle=lambda: not self._transfers,
            retire=self._retire,
        )
        if not self._place.budget.enter(live):
            self._outgoing.post(Dropped(generation, "the source has as many groups as it may have"))
            return
        self._live = live
        live.start(self._keep)

    async def _keep(self, live: LiveGroup) -> None:
        """Build it, and close it when it is dropped."""
        try:
            host = await asyncio.to_thread(own_address_towards, self._hello.host)
            await live.build(host)
            await asyncio.Future()  # until it is dropped
        except StreamBroken as error:
            self._lose(live, error)
        finally:
            await live.group.close()

    def _lose(self, live: LiveGroup, error: StreamBroken) -> None:
        if live is self._live:
            reason = str(error)  # not the error itself: whoever keeps a log record would keep the pool
            logger.warning("the process group with %s is dropped: %s", self._stream.peer, reason)
            self._drop(reason)

    def _retire(self, live: LiveGroup) -> None:
        if live is self._live:
            self._drop("its place is needed for another pair")

    def _drop(self, reason: str, tell: bool = True) -> None:
        live, self._live = self._live, None
        if live is None:
            return
        self._place.budget.leave(live)
        live.drop()
        if tell:
            self._outgoing.post(Dropped(live.generation, reason))

    # What is wanted

    async def _serve_wants(self) -> None:
        while True:
            want = await self._wants.get()
            pieces = self._pieces(want)
            if pieces is None:
                self._outgoing.post(Gone(want.transfer, want.sequence))
            if want.generation != NO_GROUP:
                # The decode worker has posted its operations: what is not here is filled up.
                await self._send_by_group(want, pieces or [_filler(size) for size in want.sizes])
            elif pieces is not None:
                await self._send_by_stream(want, pieces)

    def _pieces(self, want: Want) -> Sequence[torch.Tensor] | None:
        transfer = self._transfers.get(want.transfer)
        pieces = None if transfer is None else transfer.pieces(want.sequence)
        if pieces is None:
            return None
        left = pieces[want.first_piece :]
        return left if [piece.nbytes for piece in left] == want.sizes else None

    async def _send_by_group(self, want: Want, pieces: Sequence[torch.Tensor]) -> None:
        live = self._live
        if live is None or live.generation != want.generation:
            return  # dropped; the decode worker wants it again from the stream
        self._place.budget.touch(live)
        await live.settled.wait()
        try:
            for piece in pieces:
                if live.dropped:
                    return
                await live.group.send(piece)
        except GroupFailed as error:
            self._lose(live, error)

    async def _send_by_stream(self, want: Want, pieces: Sequence[torch.Tensor]) -> None:
        header = Pieces(want.transfer, want.sequence, len(pieces))
        await self._outgoing.deliver(
            header, [await self._executor.copy(piece.numpy().tobytes) for piece in pieces]
        )


def _filler(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)
