"""KV bytes from GPU to GPU on one host: the decode worker opens the source's pool and copies out of it.

The source exports the allocation of its pool as a CUDA IPC handle. The decode worker opens it, copies parts
of rows into its own blocks on a stream beside the engine's, and digests what lies there, all on the GPU.
What could go wrong with memory of another process:

- The receiver does not see the source's GPU, as where Ray hides the GPUs that are another actor's: the
  offer lists what it sees, and the source declines.
- The pool lies in memory that cannot be exported: the source declines.
- The source dies: what it exported is closed as soon as its process is seen to have ended (a pidfd) and no
  call uses it. CUDA does not say what a copy gets that is under way just then, so this transport is only
  used where `network.transports` names it.
- A handle cannot be opened: the call fails and is placed again, and that GPU is offered no more.
- The source writes while it is read: the digest of the own copy tells.
"""

import asyncio
import functools
import logging
import os
from collections.abc import Callable, Sequence

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.contract.work import DeviceMemory, LayerRange
from pdserve.handoff.transports.announcing import AnnouncingSender, check_source_blocks
from pdserve.handoff.transports.base import (
    Accepted,
    Declined,
    DeviceBlocks,
    LocalSide,
    SegmentReceiver,
    TransferStats,
)
from pdserve.handoff.transports.endpoints import Endpoint
from pdserve.handoff.transports.ipc_driver import Columns, ExportedPool, IpcDriver, IpcError, OpenPool
from pdserve.handoff.transports.open_peers import OpenPeers, Peer

MakeDriver = Callable[[DeviceMemory, int], IpcDriver]


class _ReceiverEndpoint(Endpoint):
    """What a receiver tells in its offer."""

    devices: tuple[str, ...]
    """UUIDs of the GPUs whose memory it can open."""
    num_layers: int
    block_bytes: int


class _SourceEndpoint(Endpoint):
    """What a source tells in its choice."""

    pid: int
    device: str
    handle: bytes
    offset: int
    num_bytes: int


class CudaIpcTransport:
    """Implements `Transport`. Where the pool is not in a GPU's memory it offers and accepts nothing."""

    name = "cuda_ipc"

    def __init__(self, side: LocalSide, make_driver: MakeDriver | None = None) -> None:
        """`make_driver` is given where the own pool lies and the bytes of a block; CUDA's by default."""
        self._side = side
        self._make_driver = make_driver or _cuda_driver
        self._host_id = ""
        self._driver: IpcDriver | None = None
        self._devices: tuple[str, ...] = ()
        self._exported: ExportedPool | None = None
        self._why_not_source = "the source's pool is not in a GPU's memory"
        self._peers: OpenPeers[OpenPool] = OpenPeers(self._close_pool)
        memory = side.blocks.device_memory() if isinstance(side.blocks, DeviceBlocks) else None
        if memory is not None:
            self._start(memory)

    def offer(self) -> TransportOffer | None:
        if not self._devices or not self._host_id:
            return None
        endpoint = _ReceiverEndpoint(
            devices=self._devices,
            num_layers=self._side.num_layers,
            block_bytes=self._side.blocks.block_bytes,
        )
        return TransportOffer(self.name, self._host_id, endpoint.encode())

    def accept(self, offer: TransportOffer) -> Accepted | Declined:
        if self._exported is None or self._driver is None:
            return Declined(self._why_not_source)
        if not self._host_id or offer.host_id != self._host_id:
            return Declined("different host or container")
        receiver = _ReceiverEndpoint.decode(offer.endpoint)
        own = (self._side.num_layers, self._side.blocks.block_bytes)
        if (receiver.num_layers, receiver.block_bytes) != own:
            return Declined("the receiver's blocks have other layers or sizes")
        if self._exported.device not in receiver.devices:
            return Declined(
                f"the receiver cannot open memory of GPU {self._exported.device}, but of "
                f"{', '.join(receiver.devices)} (Ray hides the GPUs of other workers unless "
                "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES=1)"
            )
        endpoint = _describe(self._exported).encode()
        choice = TransportChoice(self.name, "GPUs of one host", endpoint=endpoint)
        digest = functools.partial(_digest, self._side, self._driver)
        return Accepted(choice, AnnouncingSender(self._side, digest))

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        if self._driver is None:
            raise ProtocolViolation(f"{source_address} chose {self.name}, which was not offered")
        source = _SourceEndpoint.decode(choice.endpoint)
        exported = ExportedPool(source.device, source.handle, source.offset, source.num_bytes)
        open_one = functools.partial(self._open_pool, self._driver, exported)
        peer = await self._peers.acquire(source.pid, exported.handle, open_one)
        if peer.opened.exported != exported:
            self._peers.release(peer)
            raise ProtocolViolation(f"{source_address} describes one allocation in two ways")
        return _Receiver(self._side, self._driver, self._peers, peer)

    async def close(self) -> None:
        await self._peers.close()

    def _start(self, memory: DeviceMemory) -> None:
        self._host_id = memory.host_id
        try:
            self._driver = self._make_driver(memory, self._side.blocks.block_bytes)
            self._devices = self._driver.devices()
            self._exported = self._driver.export()
        except IpcError as error:
            self._why_not_source = str(error)
            _log.warning("this worker's pool is not read by %s: %s", self.name, self._why_not_source)

    async def _open_pool(self, driver: IpcDriver, exported: ExportedPool) -> OpenPool:
        try:
            return await self._side.executor.copy(functools.partial(driver.open, exported))
        except IpcError as error:
            self._devices = tuple(device for device in self._devices if device != exported.device)
            raise StreamBroken(f"memory of GPU {exported.device} cannot be opened: {error}") from error

    async def _close_pool(self, pool: OpenPool) -> None:
        assert self._driver is not None, "only what it has opened is closed"
        try:
            await self._side.executor.copy(functools.partial(self._driver.close, pool))
        except IpcError as error:
            _log.warning("memory of GPU %s could not be closed: %s", pool.exported.device, error)


class _Receiver:
    """The decode worker's end: copies rows of the source's pool into its own, on the GPU."""

    def __init__(
        self, side: LocalSide, driver: IpcDriver, peers: OpenPeers[OpenPool], peer: Peer[OpenPool]
    ) -> None:
        self.stats = TransferStats()
        self._side = side
        self._driver = driver
        self._peers = peers
        self._peer: Peer[OpenPool] | None = peer
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
            peer, self._peer = self._peer, None
        if peer is not None:
            self._peers.release(peer)

    async def _copy(self, segment: Segment, block_ids: Sequence[BlockId]) -> int:
        """The digest of what lies in the own pool afterwards."""
        pool = self._pool()
        check_source_blocks(segment, pool.exported.num_bytes // self._side.blocks.block_bytes)
        columns = _columns(self._side, segment.layers)
        job = functools.partial(self._driver.copy, pool, segment.source_blocks, block_ids, columns)
        try:
            return await self._side.executor.copy(job)
        except IpcError as error:
            raise StreamBroken(f"the source's GPU memory cannot be read: {error}") from error

    def _pool(self) -> OpenPool:
        if self._peer is None:
            raise StreamBroken("this transfer has ended")
        if self._peer.retired:
            raise StreamBroken(f"the pool of process {self._peer.key[0]} is gone")
        return self._peer.opened


_log = logging.getLogger(__name__)


def _columns(side: LocalSide, layers: LayerRange) -> Columns:
    return Columns(layers.start * side.layer_bytes, layers.stop * side.layer_bytes)


def _digest(side: LocalSide, driver: IpcDriver, block_ids: Sequence[BlockId], layers: LayerRange) -> int:
    try:
        return driver.digest(block_ids, _columns(side, layers))
    except IpcError as error:
        raise StreamBroken(f"the own GPU memory cannot be read: {error}") from error


def _cuda_driver(own: DeviceMemory, block_bytes: int) -> IpcDriver:
    from pdserve.handoff.transports.cuda_driver import CudaDriver  # torch takes a second to import

    return CudaDriver(own, block_bytes)


def _describe(exported: ExportedPool) -> _SourceEndpoint:
    return _SourceEndpoint(
        pid=os.getpid(),
        device=exported.device,
        handle=exported.handle,
        offset=exported.offset,
        num_bytes=exported.num_bytes,
    )
