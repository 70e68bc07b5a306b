"""CUDA IPC between two processes on one GPU: bytes, digests, and an exporter that is killed."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator

import pytest
import torch

from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.errors import StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice
from pdserve.contract.work import LayerRange
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.engine.kv_pool import KvLayout, KvPool
from pdserve.handoff.digest import digest
from pdserve.handoff.transports.base import LocalSide
from pdserve.handoff.transports.cuda_ipc import CudaIpcTransport
from pdserve.handoff.transports.device_digest import digest_tensor
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LAYOUT = KvLayout(num_layers=3, block_size=16, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
NUM_BLOCKS = 40
ALL = LayerRange(0, 3)
ROWS, TARGETS = [39, 0, 7, 8], [BlockId(block) for block in (1, 2, 38, 20)]

SOURCE = """
import asyncio, sys
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import TransportOffer
from tests.gpu.test_cuda_ipc_gpu import ALL, ROWS, make_side, CudaIpcTransport

async def main() -> None:
    side = make_side(seed=1)
    transport = CudaIpcTransport(side)
    offer = transport.offer()
    print(offer.host_id if offer else "", flush=True)
    for line in sys.stdin:
        answer = transport.accept(TransportOffer("cuda_ipc", offer.host_id, bytes.fromhex(line)))
        if not hasattr(answer, "choice"):
            print(answer.reason, flush=True)
            continue
        segment = await answer.sender.send(0, 0, [BlockId(row) for row in ROWS], ALL)
        print(answer.choice.endpoint.hex(), segment.digest, flush=True)

asyncio.run(main())
"""


def make_side(seed: int) -> LocalSide:
    """A worker's side with a pool of noise on the GPU."""
    torch.manual_seed(seed)
    pool = KvPool(LAYOUT, NUM_BLOCKS, torch.device("cuda", 0))
    pool.tensor.normal_()
    rpc = MemoryRpc(MemoryNetwork(), "gpu")
    return LocalSide(pool, LAYOUT.num_layers, ThreadExecutor(FakeEngine(1)), rpc, LoopClock(), SystemRng())


class OtherProcess:
    """A source on the same GPU."""

    def __init__(self, allocator: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SOURCE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": allocator},
        )
        assert self._line(), "the source offers the transport"

    def answer(self, transport: CudaIpcTransport) -> list[str]:
        offer = transport.offer()
        assert offer is not None
        assert self.process.stdin is not None
        print(offer.endpoint.hex(), file=self.process.stdin, flush=True)
        return self._line().split()

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
        return self.process.stdout.readline().strip()


@pytest.fixture
def source() -> Iterator[OtherProcess]:
    other = OtherProcess("expandable_segments:False")
    yield other
    other.close()


def run(story: Callable[[LocalSide, CudaIpcTransport], Awaitable[None]]) -> None:
    async def tell() -> None:
        side = make_side(seed=2)
        transport = CudaIpcTransport(side)
        try:
            await story(side, transport)
        finally:
            await transport.close()
            await side.executor.close()

    asyncio.run(tell())


def segment_of(side: LocalSide, value: int) -> Segment:
    num_bytes = len(ROWS) * side.part_bytes(ALL)
    return Segment(0, 0, len(ROWS), ALL, value, num_bytes, source_blocks=tuple(ROWS))


def test_every_byte_arrives_and_both_digests_are_the_cpus(source: OtherProcess) -> None:
    async def story(side: LocalSide, transport: CudaIpcTransport) -> None:
        endpoint, value = source.answer(transport)
        choice = TransportChoice("cuda_ipc", "", endpoint=bytes.fromhex(endpoint))
        receiver = await transport.connect(choice, "source")
        assert await receiver.receive(segment_of(side, int(value)), TARGETS)
        assert digest(side.blocks.read(TARGETS, ALL)) == int(value)
        await receiver.close()

    run(story)


def test_a_source_that_is_killed_harms_nobody(source: OtherProcess) -> None:
    """Its memory is closed, later calls are refused, and the own context still works."""

    async def story(side: LocalSide, transport: CudaIpcTransport) -> None:
        endpoint, value = source.answer(transport)
        choice = TransportChoice("cuda_ipc", "", endpoint=bytes.fromhex(endpoint))
        receiver = await transport.connect(choice, "source")
        receiving = asyncio.ensure_future(receiver.receive(segment_of(side, int(value)), TARGETS))
        source.kill()
        (outcome,) = await asyncio.gather(receiving, return_exceptions=True)
        assert isinstance(outcome, bool | StreamBroken)
        with pytest.raises(StreamBroken):
            await receiver.receive(segment_of(side, int(value)), TARGETS)
        await receiver.close()
        with pytest.raises(StreamBroken):
            await transport.connect(choice, "source")
        ones = torch.ones(1000, device="cuda")
        assert float(ones.sum()) == 1000

    run(story)


def test_expandable_segments_are_declined_with_the_reason() -> None:
    source = OtherProcess("expandable_segments:True")

    async def story(side: LocalSide, transport: CudaIpcTransport) -> None:
        assert "expandable_segments:False" in " ".join(source.answer(transport))

    run(story)
    source.close()


def test_the_digest_on_the_gpu() -> None:
    lanes = torch.randint(-(2**62), 2**62, (100_001,))
    assert digest_tensor(lanes.cuda()) == digest(lanes.numpy().tobytes())
