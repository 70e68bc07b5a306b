"""Pairs of workers for the tests of transports, in every world in which a transport can run."""

import asyncio
import contextlib
import dataclasses
import fcntl
import gc
import mmap
import os
import random
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from pdserve.clock import LoopClock, SeededRng, VirtualClock, run_virtual
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import TransportChoice
from pdserve.contract.ports import Call, EngineExecutor, Rpc, RpcServer
from pdserve.contract.work import POOL_FILE_NAME, DeviceMemory, LayerRange, PoolExport
from pdserve.engine.executor import InlineExecutor, ThreadExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.handoff.transports.base import LocalSide, SegmentReceiver, SegmentSender
from pdserve.handoff.transports.negotiation import Transports
from pdserve.handoff.transports.process_group import ProcessGroupTransport
from pdserve.rpc.grpc_rpc import GrpcRpc
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from tests.contract.memfd_driver import MemfdDriver
from tests.contract.rpc_pair import no_new_tasks
from tests.credentials import OURS

POOL_FILE = f"{POOL_FILE_NAME}-of-a-test"


class MemoryFilePool:
    """A BlockStore in a sealed memory file, as an engine on a CPU has it."""

    def __init__(self, num_blocks: int, block_bytes: int, num_layers: int, seals: int = fcntl.F_SEAL_SHRINK):
        self.num_blocks, self.block_bytes, self._num_layers = num_blocks, block_bytes, num_layers
        self.token = secrets.token_bytes(16)
        self.fd = os.memfd_create(POOL_FILE, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        num_bytes = num_blocks * block_bytes
        os.ftruncate(self.fd, num_bytes + len(self.token))
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        mapped = mmap.mmap(self.fd, num_bytes + len(self.token))
        mapped[num_bytes:] = self.token
        self.array = np.frombuffer(mapped, np.uint8, num_bytes).reshape(num_blocks, block_bytes)
        self.host_id = "this host"

    def rows(self) -> memoryview:
        return self.array.data

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytearray:
        return bytearray(self._parts(layers)[list(block_ids)].tobytes())

    def write(self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview) -> None:
        parts = self._parts(layers)
        parts[list(block_ids)] = np.frombuffer(payload, np.uint8).reshape(len(block_ids), parts.shape[1])

    def export(self) -> PoolExport | None:
        num_bytes = self.num_blocks * self.block_bytes
        return PoolExport(self.host_id, os.getpid(), self.fd, num_bytes, self.token.hex())

    def close(self) -> None:
        del self.array
        os.close(self.fd)

    def _parts(self, layers: LayerRange) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        layer_bytes = self.block_bytes // self._num_layers
        return self.array[:, layers.start * layer_bytes : layers.stop * layer_bytes]


class CopyingPool(MemoryFilePool):
    """The same without direct access to its rows, as an engine on a GPU has it."""

    def rows(self) -> None:  # type: ignore[override]
        return None


class DevicePool(CopyingPool):
    """In what stands for a GPU's memory, and can be opened by another process through its driver alone."""

    def export(self) -> None:
        return None

    def device_memory(self) -> DeviceMemory:
        return DeviceMemory(self.array.ctypes.data, self.array.nbytes, 0, self.host_id)


class Worker:
    """One worker's transports and what they stand on."""

    def __init__(self, side: LocalSide, order: Sequence[str]):
        self.side = side
        self.transports = Transports(side, order)
        self.transport = self.transports._by_name[order[0]]
        self.server: RpcServer | None = None

    @property
    def pool(self) -> MemoryFilePool:
        assert isinstance(self.side.blocks, MemoryFilePool)
        return self.side.blocks

    async def start(self) -> None:
        self.server = await self.side.rpc.serve("127.0.0.1:0", {Call.KV: self.transports.kv_handler})

    @property
    def address(self) -> str:
        assert self.server is not None
        return self.server.address

    async def kill(self) -> None:
        """As peers see a process that dies: all its streams break."""
        assert self.server is not None
        await asyncio.gather(self.side.rpc.close(), self.server.stop(0))

    async def close(self) -> None:
        await self.transports.close()
        await self.side.rpc.close()
        assert self.server is not None
        await self.server.stop(0)
        await self.side.executor.close()


@dataclasses.dataclass
class Transfer:
    """Both ends of one Prefill call between two workers."""

    sender: SegmentSender
    receiver: SegmentReceiver
    choice: TransportChoice

    async def close(self) -> None:
        await self.sender.close()
        await self.receiver.close()


async def open_transfer(source: Worker, decode: Worker) -> Transfer:
    accepted = source.transports.choose(decode.transports.offers())
    receiver = await decode.transports.connect(accepted.choice, source.address)
    if isinstance(decode.transport, ProcessGroupTransport):
        await decode.transport.warm_up(source.address)
    return Transfer(accepted.sender, receiver, accepted.choice)


class Pair:
    """A source and a decode worker, with random bytes in both pools."""

    def __init__(self, world: "World", num_blocks: int, block_bytes: int, num_layers: int, suffix: str = ""):
        self.world = world
        rng = np.random.default_rng([num_blocks, len(suffix), sum(suffix.encode())])
        self.source = self._make_worker(f"source{suffix}", num_blocks, block_bytes, num_layers)
        self.decode = self._make_worker(f"decode{suffix}", num_blocks, block_bytes, num_layers)
        for worker in (self.source, self.decode):
            worker.pool.array[:] = rng.integers(0, 256, worker.pool.array.shape, np.uint8)
        self.all_layers = LayerRange(0, num_layers)

    def _make_worker(self, host: str, num_blocks: int, block_bytes: int, num_layers: int) -> Worker:
        pool = self.world.make_pool(num_blocks, block_bytes, num_layers)
        executor, rpc = self.world.make_executor(), self.world.make_rpc(host)
        clock = VirtualClock() if self.world.is_virtual else LoopClock()
        side = LocalSide(pool, num_layers, executor, rpc, clock, SeededRng(sum(host.encode())))
        return Worker(side, (self.world.transport,))

    async def open(self) -> Transfer:
        return await open_transfer(self.source, self.decode)

    def part(self, worker: Worker, block_id: int, layers: LayerRange) -> bytes:
        layer_bytes = worker.side.layer_bytes
        return bytes(worker.pool.array[block_id, layers.start * layer_bytes : layers.stop * layer_bytes])

    async def start(self) -> None:
        await self.source.start()
        await self.decode.start()

    async def close(self) -> None:
        await self.decode.close()
        await self.source.close()
        self.decode.pool.close()
        self.source.pool.close()


Story = Callable[[Pair], Awaitable[None]]


class World:
    """A transport, the Rpc and the executor under it, and the pools that it moves between."""

    def __init__(self, transport: str, rpc: str, pool: type[MemoryFilePool]):
        self.transport = transport
        self.rpc_name = rpc
        self.make_pool = pool
        self.network = MemoryNetwork()

    @property
    def is_virtual(self) -> bool:
        return self.rpc_name == "virtual"

    def make_rpc(self, host: str) -> Rpc:
        if self.rpc_name == "grpc":
            return GrpcRpc(OURS)
        return MemoryRpc(self.network, host)

    def make_executor(self) -> EngineExecutor:
        engine = FakeEngine(1)
        return InlineExecutor(engine, VirtualClock()) if self.is_virtual else ThreadExecutor(engine)

    def skip_without_its_package(self) -> None:
        if self.transport == "nixl":
            pytest.importorskip("nixl", reason="NIXL is not installed: pip install 'pdserve[nixl]'")

    def run(self, story: Story, num_blocks: int = 40, block_bytes: int = 1536, num_layers: int = 3) -> None:
        """Run the story of a pair; nothing is left afterwards."""
        self.skip_without_its_package()
        with nothing_left(), MemfdDriver.in_place_of_cuda():
            run = run_virtual if self.is_virtual else asyncio.run
            run(self._tell(story, num_blocks, block_bytes, num_layers))

    async def _tell(self, story: Story, *shape: int) -> None:
        pair = Pair(self, *shape)
        await pair.start()
        try:
            await story(pair)
        finally:
            await pair.close()
            await no_new_tasks(set())


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """No mapping of a pool, no descriptor of a pool or a process, no thread of an executor."""
    yield
    gc.collect()  # exceptions that the test has kept
    assert num_mappings() == 0
    assert open_descriptors() == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("kv-")] == []


def open_descriptors() -> list[str]:
    """What the descriptors of pools and processes point to."""
    targets = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            targets.append(os.readlink(link))
    return [target for target in targets if POOL_FILE in target or "pidfd" in target]


def num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count(POOL_FILE)


WORLDS = {
    "grpc-virtual": ("grpc", "virtual", MemoryFilePool),
    "grpc-virtual-copying": ("grpc", "virtual", CopyingPool),
    "grpc-threads": ("grpc", "memory", MemoryFilePool),
    "grpc": ("grpc", "grpc", MemoryFilePool),
    "process_group": ("process_group", "grpc", MemoryFilePool),
    "process_group-copying": ("process_group", "grpc", CopyingPool),
    "shared_memory": ("shared_memory", "memory", MemoryFilePool),
    "shared_memory-copying": ("shared_memory", "memory", CopyingPool),
    "nixl": ("nixl", "memory", MemoryFilePool),
    "cuda_ipc": ("cuda_ipc", "memory", DevicePool),
}


def block_ids(count: int, num_blocks: int, seed: int) -> list[BlockId]:
    """Distinct blocks in no order."""
    return [BlockId(block_id) for block_id in random.Random(seed).sample(range(num_blocks), count)]
