"""CUDA IPC, with memory files in place of GPU memory: who opens what of whom, and for how long."""

import asyncio
import dataclasses
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.contract.work import DeviceMemory
from pdserve.handoff.digest import digest
from pdserve.handoff.transports.base import Accepted, Declined
from pdserve.handoff.transports.cuda_ipc import CudaIpcTransport
from pdserve.handoff.transports.ipc_driver import ExportedPool, IpcError, OpenPool
from pdserve.handoff.transports.open_peers import MAX_IDLE
from tests.contract.memfd_driver import MemfdDriver
from tests.contract.transport_pair import (
    WORLDS,
    DevicePool,
    MemoryFilePool,
    Pair,
    World,
    block_ids,
    num_mappings,
    open_descriptors,
)


@pytest.fixture
def world() -> World:
    return World(*WORLDS["cuda_ipc"])


SOURCE = """
import sys
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.messages import TransportOffer
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.handoff.transports.base import LocalSide
from pdserve.handoff.transports.cuda_ipc import CudaIpcTransport
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from tests.contract.memfd_driver import MemfdDriver
from tests.contract.transport_pair import DevicePool
pool = DevicePool(40, 1536, 3)
pool.array[:] = 7
rpc = MemoryRpc(MemoryNetwork(), "source")
side = LocalSide(pool, 3, ThreadExecutor(FakeEngine(1)), rpc, LoopClock(), SystemRng())
transport = CudaIpcTransport(side, MemfdDriver)
print("ready", flush=True)
for line in sys.stdin:
    offer = TransportOffer("cuda_ipc", pool.host_id, bytes.fromhex(line))
    print(transport.accept(offer).choice.endpoint.hex(), flush=True)
"""


class OtherProcess:
    """A source with a pool of sevens."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SOURCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def choose(self, pair: Pair) -> TransportChoice:
        (offer,) = pair.decode.transports.offers()
        assert self.process.stdin is not None
        print(offer.endpoint.hex(), file=self.process.stdin, flush=True)
        return TransportChoice("cuda_ipc", "", endpoint=bytes.fromhex(self._line()))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")


@pytest.fixture
def source() -> Iterator[OtherProcess]:
    other = OtherProcess()
    yield other
    other.close()


def sevens(pair: Pair) -> Segment:
    """Two blocks of the other process."""
    payload = bytes([7]) * (2 * pair.decode.side.blocks.block_bytes)
    return Segment(0, 0, 2, pair.all_layers, digest(payload), len(payload), source_blocks=(39, 0))


def transport_of(pair: Pair) -> CudaIpcTransport:
    transport = pair.decode.transports._by_name["cuda_ipc"]
    assert isinstance(transport, CudaIpcTransport)
    return transport


# What is open, and for how long


def test_a_pool_of_another_process(world: World, source: OtherProcess) -> None:
    async def story(pair: Pair) -> None:
        targets = block_ids(2, 40, 1)
        choice = source.choose(pair)
        receivers = await asyncio.gather(
            *(pair.decode.transports.connect(choice, "source") for _ in range(3))
        )
        for receiver in receivers:
            pair.decode.pool.array[targets] = 0
            assert await receiver.receive(sevens(pair), targets)
            assert (pair.decode.pool.array[targets] == 7).all()
            await receiver.close()
        assert num_mappings() == 2 + 1  # the pair's own and one for all three calls

    world.run(story)


def test_a_source_process_that_dies(world: World, source: OtherProcess) -> None:
    """What is open of it stays so for the call that uses it, and goes with that call."""

    async def story(pair: Pair) -> None:
        choice = source.choose(pair)
        receiver = await pair.decode.transports.connect(choice, "source")
        source.kill()
        await let_the_loop_look()
        with pytest.raises(StreamBroken, match="gone"):
            await receiver.receive(sevens(pair), block_ids(2, 40, 1))
        assert num_mappings() == 2 + 1
        await receiver.close()
        await transport_of(pair)._peers.close()
        assert num_mappings() == 2
        with pytest.raises(StreamBroken, match="gone"):
            await pair.decode.transports.connect(choice, "source")

    world.run(story)


def test_an_idle_pool_is_closed_when_its_owner_ends(world: World, source: OtherProcess) -> None:
    async def story(pair: Pair) -> None:
        receiver = await pair.decode.transports.connect(source.choose(pair), "source")
        await receiver.close()
        assert num_mappings() == 2 + 1
        source.kill()
        await let_the_loop_look()
        await asyncio.gather(*transport_of(pair)._peers._closing)
        assert num_mappings() == 2
        assert not [target for target in open_descriptors() if "pidfd" in target]

    world.run(story)


async def let_the_loop_look() -> None:
    """What was to be noticed has happened before; the loop polls for it in every turn."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_idle_pools_are_bounded(world: World) -> None:
    async def story(pair: Pair) -> None:
        pools = [DevicePool(2, 1536, 3) for _ in range(MAX_IDLE + 3)]
        for pool in pools:
            source = CudaIpcTransport(dataclasses.replace(pair.source.side, blocks=pool), MemfdDriver)
            accepted = source.accept(pair.decode.transports.offers()[0])
            assert isinstance(accepted, Accepted)
            receiver = await pair.decode.transports.connect(accepted.choice, "source")
            await receiver.close()
        await asyncio.gather(*transport_of(pair)._peers._closing)
        assert num_mappings() == 2 + len(pools) + MAX_IDLE
        for pool in pools:
            pool.close()

    world.run(story)


def test_a_call_that_is_cancelled_while_it_opens(world: World, source: OtherProcess) -> None:
    """What it has begun to open is there for the next one."""

    async def story(pair: Pair) -> None:
        choice = source.choose(pair)
        go, started = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        blocking = asyncio.ensure_future(pair.decode.side.executor.copy(lambda: hold(loop, started, go)))
        await started.wait()
        connecting = asyncio.ensure_future(pair.decode.transports.connect(choice, "source"))
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        go.set()
        await blocking
        receiver = await pair.decode.transports.connect(choice, "source")
        assert num_mappings() == 2 + 1
        await receiver.close()

    world.run(story)


def hold(loop: asyncio.AbstractEventLoop, started: asyncio.Event, go: threading.Event) -> None:
    loop.call_soon_threadsafe(started.set)
    assert go.wait(60)


# Negotiation


def test_another_host_another_layout_and_hidden_gpus_are_declined(world: World) -> None:
    async def story(pair: Pair) -> None:
        source = pair.source.transports._by_name["cuda_ipc"]
        (offer,) = pair.decode.transports.offers()
        elsewhere = dataclasses.replace(offer, host_id="another host")
        assert reason(source.accept(elsewhere)) == "different host or container"
        other_layers = dataclasses.replace(offer, endpoint=offer.endpoint.replace(b":3", b":1"))
        assert "other layers" in reason(source.accept(other_layers))
        hidden = dataclasses.replace(offer, endpoint=offer.endpoint.replace(b"GPU-in-a-file", b"GPU-other"))
        assert "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES" in reason(source.accept(hidden))

    world.run(story)


def reason(answer: object) -> str:
    assert isinstance(answer, Declined)
    return answer.reason


def test_a_pool_in_main_memory_takes_no_part() -> None:
    async def story(pair: Pair) -> None:
        transport = CudaIpcTransport(pair.source.side)
        assert transport.offer() is None
        assert "not in a GPU's memory" in reason(transport.accept(TransportOffer("cuda_ipc")))
        with pytest.raises(ProtocolViolation):
            await transport.connect(TransportChoice("cuda_ipc", ""), "source")
        await transport.close()

    World("grpc", "memory", MemoryFilePool).run(story)


class ExpandableMemory(MemfdDriver):
    """As with memory that CUDA cannot export."""

    def export(self) -> ExportedPool:
        raise IpcError("torch has it from expandable segments")


def test_a_pool_that_cannot_be_exported_can_still_receive(world: World) -> None:
    async def story(pair: Pair) -> None:
        transport = CudaIpcTransport(pair.decode.side, ExpandableMemory)
        assert "expandable" in reason(transport.accept(pair.decode.transports.offers()[0]))
        offer = transport.offer()
        assert offer is not None
        accepted = pair.source.transports.choose((offer,))
        receiver = await transport.connect(accepted.choice, "source")
        ids = [BlockId(3), BlockId(8)]
        assert await receiver.receive(await accepted.sender.send(0, 0, ids, pair.all_layers), ids)
        await receiver.close()
        await accepted.sender.close()
        await transport.close()

    world.run(story)


def test_without_cuda(world: World) -> None:
    async def story(pair: Pair) -> None:
        def no_driver(own: DeviceMemory, block_bytes: int) -> MemfdDriver:
            raise IpcError("CUDA's driver is not there")

        transport = CudaIpcTransport(pair.source.side, no_driver)
        assert transport.offer() is None
        assert "not there" in reason(transport.accept(pair.decode.transports.offers()[0]))

    world.run(story)


def test_a_gpu_whose_memory_cannot_be_opened_is_offered_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(pair: Pair) -> None:
        def refuse(self: MemfdDriver, exported: ExportedPool) -> OpenPool:
            raise IpcError("cuIpcOpenMemHandle_v2 failed")

        monkeypatch.setattr(MemfdDriver, "open", refuse)
        choice = pair.source.transports.choose(pair.decode.transports.offers()).choice
        with pytest.raises(StreamBroken, match="cuIpcOpenMemHandle_v2"):
            await pair.decode.transports.connect(choice, "source")
        assert pair.decode.transports.offers() == ()

    world.run(story)


def test_a_copy_and_a_digest_that_cuda_refuses(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        def refuse(*arguments: object) -> int:
            raise IpcError("an illegal address")

        ids = [BlockId(1)]
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        monkeypatch.setattr(MemfdDriver, "copy", refuse)
        with pytest.raises(StreamBroken, match="illegal address"):
            await transfer.receiver.receive(segment, ids)
        monkeypatch.setattr(MemfdDriver, "digest", refuse)
        with pytest.raises(StreamBroken, match="illegal address"):
            await transfer.sender.send(1, 0, ids, pair.all_layers)
        await transfer.close()

    world.run(story)


def test_a_source_that_describes_itself_in_two_ways(world: World) -> None:
    async def story(pair: Pair) -> None:
        first = await pair.open()
        lie = dataclasses.replace(
            first.choice, endpoint=first.choice.endpoint.replace(b'"offset":0', b'"offset":8')
        )
        with pytest.raises(ProtocolViolation, match="two ways"):
            await pair.decode.transports.connect(lie, "source")
        for endpoint in (b"", b"\x80\x04.", b'{"pid": "1"}'):
            with pytest.raises(ProtocolViolation):
                await pair.decode.transports.connect(TransportChoice("cuda_ipc", "", endpoint=endpoint), "s")
        ids = [BlockId(1)]
        assert await first.receiver.receive(await first.sender.send(0, 0, ids, pair.all_layers), ids)
        await first.close()

    world.run(story)
