"""KV bytes by NIXL: RDMA, NVLink, shared memory or TCP, whatever UCX finds between the two workers.

The source registers its pool once and tells where it lies. The decode worker READs pieces of it into
staging memory of its own, on the host, and copies and digests from there into its own blocks; nobody ever
WRITEs. What could go wrong with reads that the network carries out by itself:

- A call ends while a read is under way: the call does not wait, since the read can only touch its staging
  slot, and the slot is used again when the read has ended.
- A read fails: parts of it may still be written, so its slot is lost. When all are, this worker receives
  by other transports.
- A read does not end, because the source is frozen or cut off: it is given up after PEER_LOST_S. Until it
  has ended, that source is asked to choose another transport.
- The source writes while it is read: the digest of the own copy tells.
"""

import asyncio
import functools
import logging
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.handoff.digest import combine
from pdserve.handoff.transports.announcing import AnnouncingSender, check_source_blocks
from pdserve.handoff.transports.base import (
    Accepted,
    Declined,
    DeviceBlocks,
    LocalSide,
    MappedBlocks,
    SegmentReceiver,
    TransferStats,
)
from pdserve.handoff.transports.endpoints import Endpoint
from pdserve.handoff.transports.nixl_agent import (
    BACKEND,
    Descriptors,
    Memory,
    NixlAgent,
    NixlUnusable,
    ReadFailed,
)
from pdserve.handoff.transports.nixl_remotes import Remote, Remotes, Source
from pdserve.handoff.transports.pieces import PIECE_BYTES, Piece, cut
from pdserve.handoff.transports.pool_bytes import PoolBytes
from pdserve.handoff.transports.staging import Slot, Staging
from pdserve.rpc.channel import PEER_LOST_S

NUM_SLOTS = 32
"""How many pieces all calls of a worker together may have in staging memory, of 2 MiB each."""

READS_AHEAD = 2
"""How many pieces of a segment are in staging memory or on their way there."""


class _Layout(Endpoint):
    """What has to be equal on both sides."""

    backend: str
    num_layers: int
    block_bytes: int


class _ReceiverEndpoint(Endpoint):
    """What a receiver tells in its offer."""

    layout: _Layout
    broken: tuple[str, ...]
    """Agents that it can read nothing from at present."""


class _SourceEndpoint(Endpoint):
    """What a source tells in its choice."""

    agent: str
    metadata: bytes
    kind: str
    address: int
    num_bytes: int
    device: int


class NixlTransport:
    """Implements `Transport`. Where NIXL cannot be used it offers and accepts nothing."""

    name = "nixl"

    def __init__(self, side: LocalSide) -> None:
        self._side = side
        self._pool = PoolBytes(side)
        self._exported = _pool_memory(side)
        self._layout = _Layout(
            backend=BACKEND, num_layers=side.num_layers, block_bytes=side.blocks.block_bytes
        )
        self._staging = Staging(NUM_SLOTS, max(PIECE_BYTES, side.layer_bytes), side.clock)
        self._remotes: Remotes | None = None
        self._why_unusable = ""
        try:
            self._remotes = Remotes(self._make_agent())
        except NixlUnusable as error:
            self._why_unusable = str(error)
            _log.warning("this worker does not use the transport nixl: %s", self._why_unusable)

    def offer(self) -> TransportOffer | None:
        if self._remotes is None or self._staging.is_lost:
            return None
        endpoint = _ReceiverEndpoint(layout=self._layout, broken=self._remotes.broken)
        return TransportOffer(self.name, endpoint=endpoint.encode())

    def accept(self, offer: TransportOffer) -> Accepted | Declined:
        if self._remotes is None:
            return Declined(self._why_unusable)
        if self._exported is None:
            return Declined("the source's pool is not one stretch of memory in canonical order")
        receiver = _ReceiverEndpoint.decode(offer.endpoint)
        if receiver.layout != self._layout:
            return Declined(f"the receiver has {receiver.layout}, the source {self._layout}")
        if self._remotes.agent.name in receiver.broken:
            return Declined("an earlier read from here failed and has not ended")
        endpoint = self._describe(self._remotes.agent, self._exported).encode()
        choice = TransportChoice(self.name, f"both have NIXL with {BACKEND}", endpoint=endpoint)
        return Accepted(choice, AnnouncingSender(self._side, self._pool.digest))

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        if self._remotes is None:
            raise ProtocolViolation(f"{source_address} chose {self.name}, which was not offered")
        remote = await self._remotes.acquire(_source(_SourceEndpoint.decode(choice.endpoint)))
        return _Receiver(self._side, self._pool, self._staging, self._remotes, remote)

    async def close(self) -> None:
        if self._remotes is not None and not await self._remotes.agent.close():
            _ABANDONED.append(self._staging)

    def _make_agent(self) -> NixlAgent:
        name = f"pdserve-{self._side.rng.random_bits(64):016x}"
        staging = Memory("DRAM", self._staging.address, self._staging.num_bytes)
        return NixlAgent(name, self._exported, staging, self._side.clock)

    @staticmethod
    def _describe(agent: NixlAgent, pool: Memory) -> _SourceEndpoint:
        return _SourceEndpoint(agent=agent.name, metadata=agent.metadata, **pool._asdict())


class _StagedRead(NamedTuple):
    """A piece on its way into a slot."""

    piece: Piece
    slot: Slot
    ended: "asyncio.Future[None]"


class _Receiver:
    """The decode worker's end: reads pieces into staging memory and copies them from there."""

    def __init__(
        self, side: LocalSide, pool: PoolBytes, staging: Staging, remotes: Remotes, remote: Remote
    ) -> None:
        self.stats = TransferStats()
        self._side = side
        self._pool = pool
        self._staging = staging
        self._remotes = remotes
        self._remote: Remote | None = remote
        self._receiving = asyncio.Lock()

    async def receive(self, segment: Segment, block_ids: Sequence[BlockId]) -> bool:
        self._side.check_segment(segment, block_ids)
        started_at = self._side.clock.now()
        async with self._receiving:
            matched = await self._copy(segment, block_ids) == segment.digest
        self.stats.add(segment.num_bytes, self._side.clock.now() - started_at, matched)
        return matched

    async def close(self) -> None:
        async with self._receiving:
            remote, self._remote = self._remote, None
        if remote is not None:
            self._remotes.release(remote)

    async def _copy(self, segment: Segment, block_ids: Sequence[BlockId]) -> int:
        """The digest of what lies in the own pool afterwards."""
        remote = self._usable(segment)
        shares: list[int] = []
        reads: deque[_StagedRead] = deque()
        try:
            for piece in cut(len(block_ids), segment.layers, self._side.layer_bytes):
                # Waits for a slot only while it has none itself: otherwise calls could wait for each other.
                while len(reads) == READS_AHEAD or (reads and not self._staging.has_free):
                    shares.append(await self._finish(reads, block_ids))
                slot = await self._staging.acquire()
                sources = self._source_places(remote, segment.source_blocks, piece)
                ended = remote.read(sources, self._target_places(slot, piece))
                reads.append(_StagedRead(piece, slot, ended))
            while reads:
                shares.append(await self._finish(reads, block_ids))
        finally:
            for read in reads:
                self._abandon(read)
        return combine(shares)

    def _usable(self, segment: Segment) -> Remote:
        if self._remote is None:
            raise StreamBroken("this transfer has ended")
        if self._remote.broken:
            raise StreamBroken("an earlier read from this source has failed")
        check_source_blocks(segment, self._remote.source.pool.num_bytes // self._side.blocks.block_bytes)
        return self._remote

    async def _finish(self, reads: deque[_StagedRead], block_ids: Sequence[BlockId]) -> int:
        """Wait for the first of `reads`, and take it from there into the own blocks; its share of the
        digest."""
        piece, slot, ended = reads[0]
        await self._until(ended)
        reads.popleft()
        try:
            payload = slot.view[: piece.num_bytes]
            targets = block_ids[piece.start : piece.stop]
            job = functools.partial(self._pool.write, targets, piece.layers, payload, piece.first_lane)
            return await self._side.executor.copy(job)
        finally:
            self._staging.release(slot)

    async def _until(self, ended: "asyncio.Future[None]") -> None:
        """Wait at most PEER_LOST_S. A read goes on when its waiter gives up or is cancelled."""
        assert self._remote is not None, "close waits for receive"
        try:
            async with self._side.clock.timeout(PEER_LOST_S):
                await asyncio.shield(ended)
        except TimeoutError:
            self._remote.broken = True
            raise StreamBroken(f"the source's memory did not answer for {PEER_LOST_S} s") from None
        except ReadFailed as error:
            raise StreamBroken(f"the source's memory cannot be read: {error}") from error

    def _abandon(self, read: _StagedRead) -> None:
        """Nobody waits for `read` any more: its slot goes back when it has ended, or is lost."""
        settle = functools.partial(_settle, self._staging, read.slot)
        if read.ended.done():
            settle(read.ended)
        else:
            read.ended.add_done_callback(settle)

    def _source_places(self, remote: Remote, rows: Sequence[int], piece: Piece) -> Descriptors:
        pool, part_bytes = remote.source.pool, self._side.part_bytes(piece.layers)
        starts = np.array(rows[piece.start : piece.stop], np.uint64) * self._side.blocks.block_bytes
        starts += pool.address + piece.layers.start * self._side.layer_bytes
        return _descriptors(starts, part_bytes, pool.device)

    def _target_places(self, slot: Slot, piece: Piece) -> Descriptors:
        part_bytes = self._side.part_bytes(piece.layers)
        starts = np.arange(piece.stop - piece.start, dtype=np.uint64) * part_bytes + slot.address
        return _descriptors(starts, part_bytes, device=0)


_log = logging.getLogger(__name__)

_ABANDONED: list[Staging] = []
"""Of transports that were closed with a read under way: it may still be written to until the process ends."""


def _pool_memory(side: LocalSide) -> Memory | None:
    """Where the own pool lies; None when it is not one stretch of memory."""
    blocks = side.blocks
    rows = blocks.rows() if isinstance(blocks, MappedBlocks) else None
    if rows is not None:
        return Memory("DRAM", int(np.asarray(rows).ctypes.data), rows.nbytes)
    on_device = blocks.device_memory() if isinstance(blocks, DeviceBlocks) else None
    if on_device is not None:
        return Memory("VRAM", on_device.address, on_device.num_bytes, on_device.device)
    return None


def _source(endpoint: _SourceEndpoint) -> Source:
    pool = Memory(endpoint.kind, endpoint.address, endpoint.num_bytes, endpoint.device)
    return Source(endpoint.agent, endpoint.metadata, pool)


def _descriptors(starts: Descriptors, num_bytes: int, device: int) -> Descriptors:
    descriptors = np.empty((len(starts), 3), np.uint64)
    descriptors[:, 0], descriptors[:, 1], descriptors[:, 2] = starts, num_bytes, device
    return descriptors


def _settle(staging: Staging, slot: Slot, ended: "asyncio.Future[None]") -> None:
    """Of a read that nobody waits for."""
    error = ended.exception()
    if isinstance(error, ReadFailed) and not error.untouched:
        staging.lose(slot)
    else:
        staging.release(slot)
