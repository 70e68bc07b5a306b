"""KV bytes through a torch process group of the two workers: gloo between CPUs, NCCL between GPUs.

Each segment is copied out of the source's pool and digested before its Segment message leaves. The decode
worker then asks for it on the pair's link, and the group moves it, in `pieces`, into memory from which the
decode worker copies it into its own pool. Groups are built in the background; while there is none, and when
one fails, the same bytes come on the link itself, which is a gRPC stream. `pair_groups` tells the whole life.

No block is ever in the hands of torch: an operation that hangs, or ends late, touches staging memory only.
"""

import asyncio
import functools
import itertools
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.contract.ports import MessageStream
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import combine
from pdserve.handoff.transports.base import (
    SEGMENT_BYTES,
    Accepted,
    Declined,
    DeviceBlocks,
    LocalSide,
    SegmentReceiver,
    TransferStats,
)
from pdserve.handoff.transports.kv_streams import MEETING_TIMEOUT_S
from pdserve.handoff.transports.pair_groups.budget import MAX_GROUPS, GroupBudget
from pdserve.handoff.transports.pair_groups.live_group import GroupPlace
from pdserve.handoff.transports.pair_groups.messages import Hello, decode
from pdserve.handoff.transports.pair_groups.receiver_link import Arrival, ReceiverLink
from pdserve.handoff.transports.pair_groups.source_link import SourceLink
from pdserve.handoff.transports.pair_groups.staging import PoolStaging
from pdserve.handoff.transports.pair_groups.two_rank_group import Backend
from pdserve.handoff.transports.pieces import Piece, cut

STAGED_SEGMENTS = 2
"""Segments of one call that may be staged before the decode worker has asked for the first of them."""


class ProcessGroupTransport:
    """Implements `Transport`; `serve` is the handler of links."""

    name = "process_group"

    def __init__(self, side: LocalSide) -> None:
        self._side = side
        self._device = _device_of(side)
        self._staging = PoolStaging(side)
        backend = Backend.NCCL if self._device.type == "cuda" else Backend.GLOO
        self._place = GroupPlace(backend, self._device, side.clock, GroupBudget(MAX_GROUPS))
        self._id = f"{side.rng.random_bits(64):016x}"  # of this worker as a source
        self._senders: dict[str, _Sender] = {}  # transfer id -> sender of a call that has not ended
        self._served: set[SourceLink] = set()  # with decode workers
        self._links: dict[tuple[str, str], ReceiverLink] = {}  # with sources, by (address, id)

    def offer(self) -> TransportOffer | None:
        if not self._place.backend.available:
            return None
        endpoint = _Endpoint(self._place.backend.value, _gpu_name(self._device))
        return TransportOffer(self.name, endpoint=endpoint.encode())

    def accept(self, offer: TransportOffer) -> Accepted | Declined:
        backend = self._place.backend
        if not backend.available:
            return Declined(f"this build of torch has no {backend}")
        theirs = _Endpoint.decode(offer.endpoint)
        if theirs is None:
            return Declined("the decode worker's offer is not understood; do both run the same pdserve?")
        if theirs.backend != backend:
            return Declined("the KV of one worker lies in a GPU's memory, the other's does not")
        if backend is Backend.NCCL and theirs.gpu == _gpu_name(self._device):
            return Declined("both workers use one GPU, which NCCL refuses")
        transfer_id = f"{self._side.rng.random_bits(64):016x}"
        sender = _Sender(self._side, self._staging, lambda: self._senders.pop(transfer_id, None))
        self._senders[transfer_id] = sender
        reason = f"{backend} between the two; gRPC while their group is built"
        choice = TransportChoice(
            self.name, reason, transfer_id=transfer_id, endpoint=self._id.encode("ascii")
        )
        return Accepted(choice, sender)

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        if not choice.transfer_id or not choice.endpoint:
            raise ProtocolViolation(f"{source_address} chose {self.name} and names no transfer")
        link = self._link(source_address, choice.endpoint.decode("ascii", "replace"))
        link.begin(choice.transfer_id)
        return _Receiver(self._side, self._staging, link, choice.transfer_id)

    async def warm_up(self, source_address: str) -> None:
        """Wait until the group with a source that calls have been connected to is built, or cannot be: from
        then on segments go through it. Calls need not wait for that; benchmarks do."""
        for link in [link for link in self._links.values() if link.address == source_address]:
            await link.settled()

    @property
    def num_groups(self) -> int:
        """That are in use or being built, in both roles."""
        return len(self._place.budget)

    async def serve(self, stream: MessageStream, greeting: bytes) -> None:
        """Handler of the links that decode workers open here; `greeting` is Hello."""
        hello = decode(greeting)
        if not isinstance(hello, Hello):
            raise ProtocolViolation(f"{stream.peer} did not begin its link with Hello")
        most_bytes = self._side.blocks.num_blocks * self._side.blocks.block_bytes
        link = SourceLink(stream, hello, self._place, self._senders.get, self._side.executor, most_bytes)
        self._served.add(link)
        try:
            await link.run()
        finally:
            self._served.discard(link)

    async def close(self) -> None:
        for served in self._served:
            served.close()
        for link in list(self._links.values()):
            await link.close()
        if self._place.tasks:
            await asyncio.wait(self._place.tasks)
        for sender in list(self._senders.values()):
            await sender.close()

    def _link(self, address: str, source_id: str) -> ReceiverLink:
        key = (address, source_id)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = ReceiverLink(
                self.name, address, self._side.rpc, self._place, lambda: self._forget_link(key)
            )
        return link

    def _forget_link(self, key: tuple[str, str]) -> None:
        self._links.pop(key, None)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """What a receiver tells of itself."""

    backend: str
    gpu: str
    """Its UUID; empty on a CPU."""

    def encode(self) -> bytes:
        return json.dumps([self.backend, self.gpu]).encode()

    @classmethod
    def decode(cls, raw: bytes) -> "_Endpoint | None":
        try:
            backend, gpu = json.loads(raw)
        except (ValueError, TypeError, RecursionError):
            return None
        return cls(str(backend), str(gpu))


class _Staged:
    """A segment that waits for the decode worker, or may be asked for once more."""

    def __init__(self, sequence: int, buffer: torch.Tensor, pieces: Sequence[Piece]) -> None:
        self.sequence = sequence
        self.was_wanted = False
        ends = itertools.accumulate(piece.num_bytes for piece in pieces)
        self.pieces = [buffer[end - piece.num_bytes : end] for piece, end in zip(pieces, ends, strict=True)]


class _Sender:
    """The source's end of one call. Implements `StagedTransfer` for the link."""

    def __init__(self, side: LocalSide, staging: PoolStaging, forget: Callable[[], object]) -> None:
        self.stats = TransferStats()
        self.max_segment_bytes = SEGMENT_BYTES
        self._side = side
        self._staging = staging
        self._forget = forget
        self._staged: deque[_Staged] = deque()
        self._num_segments = 0
        self._met = asyncio.Event()  # the decode worker has come, or will not be needed
        self._moved = asyncio.Event()  # it has asked for a segment, or will not any more
        self._sending = asyncio.Lock()
        self._ended = False

    async def send(
        self, index: int, first_block: int, block_ids: Sequence[BlockId], layers: LayerRange
    ) -> Segment:
        started_at = self._side.clock.now()
        async with self._sending:
            await self._meet()
            await self._wait_for_room()
            digest = await self._stage(block_ids, layers)
        num_bytes = len(block_ids) * self._side.part_bytes(layers)
        self.stats.add(num_bytes, self._side.clock.now() - started_at)
        return Segment(index, first_block, len(block_ids), layers, digest, num_bytes)

    async def close(self) -> None:
        self.leave()
        self._forget()
        async with self._sending:
            self._staged.clear()

    def meet(self) -> None:
        self._met.set()

    def leave(self) -> None:
        self._ended = True
        self._met.set()
        self._moved.set()

    def pieces(self, sequence: int) -> Sequence[torch.Tensor] | None:
        if self._ended:
            return None
        # One that is asked for proves that those before it have arrived.
        while self._staged and self._staged[0].sequence < sequence:
            self._staged.popleft()
        if not self._staged or self._staged[0].sequence != sequence:
            return None
        self._staged[0].was_wanted = True
        self._moved.set()
        return self._staged[0].pieces

    async def _meet(self) -> None:
        try:
            async with self._side.clock.timeout(MEETING_TIMEOUT_S):
                await self._met.wait()
        except TimeoutError:
            raise StreamBroken(
                f"the decode worker did not open its link within {MEETING_TIMEOUT_S} s"
            ) from None

    async def _wait_for_room(self) -> None:
        while not self._ended and sum(not staged.was_wanted for staged in self._staged) >= STAGED_SEGMENTS:
            self._moved.clear()
            await self._moved.wait()

    async def _stage(self, block_ids: Sequence[BlockId], layers: LayerRange) -> int:
        """Copy a segment out of the pool; its digest."""
        pieces = list(cut(len(block_ids), layers, self._side.layer_bytes))
        buffer = self._staging.allocate(len(block_ids) * self._side.part_bytes(layers))
        staged = _Staged(self._num_segments, buffer, pieces)
        shares = []
        for piece, target in zip(pieces, staged.pieces, strict=True):
            if self._ended:
                raise StreamBroken("the decode worker has left this transfer, or it has been closed")
            job = functools.partial(self._staging.stage, block_ids, piece, target)
            shares.append(await self._side.executor.copy(job))
        self._num_segments += 1
        self._staged.append(staged)
        return combine(shares)


class _Receiver:
    """The decode worker's end of one call."""

    def __init__(self, side: LocalSide, staging: PoolStaging, link: ReceiverLink, transfer_id: str) -> None:
        self.stats = TransferStats()
        self.num_pieces_by_stream = 0
        """How many pieces came on the link, because there was no group."""
        self._side = side
        self._staging = staging
        self._link = link
        self._transfer_id = transfer_id
        self._num_segments = 0
        self._arrival: Arrival | None = None
        self._receiving = asyncio.Lock()
        self._in_step = True  # no segment was given up in the middle
        self._closed = False

    async def receive(self, segment: Segment, block_ids: Sequence[BlockId]) -> bool:
        self._side.check_segment(segment, block_ids)
        started_at = self._side.clock.now()
        async with self._receiving:
            matched = await self._copy(segment, block_ids)
        self.stats.add(segment.num_bytes, self._side.clock.now() - started_at, matched)
        return matched

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._link.leave(self._transfer_id)
        if self._arrival is not None:
            self._arrival.fail(StreamBroken("this transfer has been closed"))
        async with self._receiving:
            self._in_step = False

    async def _copy(self, segment: Segment, block_ids: Sequence[BlockId]) -> bool:
        """Whether the digest of what lies in the own pool afterwards is right."""
        if not self._in_step or self._closed:
            raise StreamBroken("this transfer has ended or was given up in the middle of a segment")
        self._in_step = False
        pieces = list(cut(len(block_ids), segment.layers, self._side.layer_bytes))
        sizes = [piece.num_bytes for piece in pieces]
        arrival = self._arrival = self._link.want(self._transfer_id, self._num_segments, sizes)
        self._num_segments += 1
        try:
            digest = combine([await self._take(arrival, block_ids, piece) for piece in pieces])
            if digest != segment.digest:
                await self._link.verify(arrival)
        finally:
            self._arrival = None
            self.num_pieces_by_stream += arrival.num_by_stream
            self._link.forget(arrival)
        self._in_step = True
        return digest == segment.digest

    async def _take(self, arrival: Arrival, block_ids: Sequence[BlockId], piece: Piece) -> int:
        payload = await arrival.next_piece()
        job = functools.partial(self._staging.take, block_ids, piece, payload)
        return await self._side.executor.copy(job)


def _device_of(side: LocalSide) -> torch.device:
    """Where the pool lies."""
    memory = side.blocks.device_memory() if isinstance(side.blocks, DeviceBlocks) else None
    return torch.device("cpu") if memory is None else torch.device("cuda", memory.device)


def _gpu_name(device: torch.device) -> str:
    """Which GPU it is, the same in all processes of all hosts; empty on a CPU."""
    return "" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)
