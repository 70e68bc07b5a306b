"""Transports whose calls are abandoned, whose peers die, and the choice between them."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.contract.errors import ConfigError, ProtocolViolation, StreamBroken, Unavailable
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.contract.ports import EngineExecutor
from pdserve.contract.work import LayerRange, PoolExport
from pdserve.handoff.digest import digest
from pdserve.handoff.transports import grpc_stream
from pdserve.handoff.transports.base import SegmentSender
from pdserve.handoff.transports.grpc_stream import MESSAGE_BYTES, cut
from pdserve.handoff.transports.negotiation import DEFAULT_ORDER, Transports
from pdserve.handoff.transports.shared_memory import MAX_IDLE_MAPPINGS
from tests.contract.transport_pair import (
    WORLDS,
    MemoryFilePool,
    Pair,
    World,
    block_ids,
    num_mappings,
    open_descriptors,
)

T = TypeVar("T")

GRPC_WORLDS = [name for name in WORLDS if name.startswith("grpc")]


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return World(*WORLDS[request.param])


@pytest.fixture(params=GRPC_WORLDS)
def grpc_world(request: pytest.FixtureRequest) -> World:
    return World(*WORLDS[request.param])


@pytest.fixture
def shared_memory() -> World:
    return World(*WORLDS["shared_memory"])


# Calls that are abandoned


def test_a_call_without_segments(world: World) -> None:
    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        await transfer.close()
        await transfer.close()

    world.run(story)


def test_a_source_that_ends_before_the_decode_worker_comes(world: World) -> None:
    async def story(pair: Pair) -> None:
        accepted = pair.source.transports.choose(pair.decode.transports.offers())
        await accepted.sender.close()
        with pytest.raises(StreamBroken):
            await accepted.sender.send(0, 0, block_ids(2, 40, 1), pair.all_layers)

    world.run(story)


def test_a_source_that_ends_between_segments(grpc_world: World) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(4, 40, 1)
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        assert await transfer.receiver.receive(segment, ids)
        await transfer.sender.close()
        with pytest.raises(StreamBroken):
            await transfer.receiver.receive(dataclasses.replace(segment, index=1), ids)
        with pytest.raises(StreamBroken):  # and stays so
            await transfer.receiver.receive(dataclasses.replace(segment, index=1), ids)
        await transfer.close()

    grpc_world.run(story)


def test_a_source_that_ends_with_bytes_unsent(grpc_world: World) -> None:
    """Nobody reads, more is queued than the stream takes; closing still ends at once."""

    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        for index in range(4):
            await transfer.sender.send(index, 0, block_ids(40, 40, 1), pair.all_layers)
        await transfer.sender.close()
        await transfer.receiver.close()

    grpc_world.run(story, 40, 768 * 1024, 3)


def test_an_unknown_transfer_is_refused(grpc_world: World) -> None:
    async def story(pair: Pair) -> None:
        choice = TransportChoice("grpc", "", transfer_id="no such")
        receiver = await pair.decode.transports.connect(choice, pair.source.address)
        ids = block_ids(1, 40, 1)
        segment = Segment(0, 0, 1, pair.all_layers, 0, pair.decode.side.blocks.block_bytes)
        with pytest.raises(StreamBroken, match="no such"):
            await receiver.receive(segment, ids)
        await receiver.close()

    grpc_world.run(story)


def test_a_decode_worker_that_never_comes() -> None:
    async def story(pair: Pair) -> None:
        accepted = pair.source.transports.choose(pair.decode.transports.offers())
        with pytest.raises(StreamBroken, match="did not open"):
            await accepted.sender.send(0, 0, block_ids(2, 40, 1), pair.all_layers)
        assert pair.source.side.clock.now() == pytest.approx(grpc_stream.MEETING_TIMEOUT_S)
        await accepted.sender.close()

    World(*WORLDS["grpc-virtual"]).run(story)


def test_a_receive_that_is_cancelled_while_it_waits(grpc_world: World) -> None:
    async def story(pair: Pair) -> None:
        before = pair.decode.pool.array.copy()
        transfer = await pair.open()
        ids = block_ids(4, 40, 1)
        segment = Segment(0, 0, 4, pair.all_layers, 0, 4 * pair.decode.side.blocks.block_bytes)
        receiving = asyncio.ensure_future(transfer.receiver.receive(segment, ids))
        await asyncio.sleep(0)
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        with pytest.raises(StreamBroken):
            await transfer.receiver.receive(segment, ids)
        await transfer.close()
        np.testing.assert_array_equal(pair.decode.pool.array, before)

    grpc_world.run(story)


class HeldCopies:
    """An executor's `copy` whose job waits on its thread until the test lets it go."""

    def __init__(self, executor: EngineExecutor):
        self.started = asyncio.Event()
        self.go = threading.Event()
        self.ended = False
        self._copy = executor.copy
        self._loop = asyncio.get_running_loop()

    async def copy(self, job: Callable[[], T]) -> T:
        def held() -> T:
            self._loop.call_soon_threadsafe(self.started.set)
            assert self.go.wait(60)
            result = job()
            self.ended = True
            return result

        return await self._copy(held)


@pytest.mark.parametrize("name", ["grpc", "grpc-threads", "shared_memory", "shared_memory-copying"])
@pytest.mark.parametrize("end", ["source", "decode"])
def test_a_cancelled_copy_touches_no_block_afterwards(
    name: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`send` and `receive` return only when their copy has ended, and so does closing meanwhile."""

    async def story(pair: Pair) -> None:
        ids = block_ids(4, 40, 1)
        transfer = await pair.open()
        job: asyncio.Future[object]
        if end == "source":
            held = HeldCopies(pair.source.side.executor)
            monkeypatch.setattr(pair.source.side.executor, "copy", held.copy)
            job = asyncio.ensure_future(transfer.sender.send(0, 0, ids, pair.all_layers))
        else:
            segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
            held = HeldCopies(pair.decode.side.executor)
            monkeypatch.setattr(pair.decode.side.executor, "copy", held.copy)
            job = asyncio.ensure_future(transfer.receiver.receive(segment, ids))
        await held.started.wait()
        job.cancel()
        closing = asyncio.ensure_future((transfer.sender if end == "source" else transfer.receiver).close())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not job.done()
        assert not closing.done()
        held.go.set()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert held.ended
        await closing
        await transfer.close()

    World(*WORLDS[name]).run(story)


# Peers that die


def test_a_source_that_dies(grpc_world: World) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(4, 40, 1)
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        assert await transfer.receiver.receive(segment, ids)
        receiving = asyncio.ensure_future(transfer.receiver.receive(segment, ids))
        await asyncio.sleep(0)
        await pair.source.kill()
        with pytest.raises(StreamBroken):
            await receiving
        await transfer.close()

    grpc_world.run(story)


def test_a_decode_worker_that_dies(grpc_world: World) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(4, 40, 1)
        transfer = await pair.open()
        await transfer.sender.send(0, 0, ids, pair.all_layers)
        await pair.decode.kill()
        with pytest.raises(StreamBroken):
            await send_until_it_breaks(transfer.sender, pair)
        await transfer.close()

    grpc_world.run(story)


async def send_until_it_breaks(sender: SegmentSender, pair: Pair) -> None:
    while True:
        await sender.send(1, 0, block_ids(1, 40, 1), pair.all_layers)
        await asyncio.sleep(0)


OWNER = """
import sys
from tests.contract.transport_pair import MemoryFilePool
pool = MemoryFilePool(40, 1536, 3)
pool.array[:] = 7
export = pool.export()
print(export.pid, export.fd, export.num_bytes, export.token, flush=True)
for line in sys.stdin:
    pool.close()
    print("closed", flush=True)
"""


class OtherProcess:
    """A process that owns a pool of sevens."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        pid, fd, num_bytes, token = self.process.stdout.readline().split()
        self.export = PoolExport("this host", int(pid), int(fd), int(num_bytes), token)
        self.choice = TransportChoice("shared_memory", "", pool=self.export)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close_pool(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "closed\n"


@pytest.fixture
def owner() -> Iterator[OtherProcess]:
    other = OtherProcess()
    yield other
    other.kill()
    for pipe in (other.process.stdin, other.process.stdout):
        assert pipe is not None
        pipe.close()


def sevens(pair: Pair) -> Segment:
    """Two blocks of the other process."""
    payload = bytes([7]) * (2 * pair.decode.side.blocks.block_bytes)
    value = digest(payload)
    return Segment(0, 0, 2, pair.all_layers, value, len(payload), source_blocks=(39, 0))


def test_a_pool_of_another_process(shared_memory: World, owner: OtherProcess) -> None:
    async def story(pair: Pair) -> None:
        targets = block_ids(2, 40, 1)
        for _ in range(3):
            receiver = await pair.decode.transports.connect(owner.choice, "source")
            assert await receiver.receive(sevens(pair), targets)
            await receiver.close()
        assert (pair.decode.pool.array[targets] == 7).all()
        assert num_mappings() == 2 + 1  # the pair's own and one for all three calls
        assert len(open_descriptors()) == 4 + 2

    shared_memory.run(story)


def test_a_source_process_that_dies(shared_memory: World, owner: OtherProcess) -> None:
    """Its memory stays readable for the call that uses it, and goes with that call."""

    async def story(pair: Pair) -> None:
        targets = block_ids(2, 40, 1)
        receiver = await pair.decode.transports.connect(owner.choice, "source")
        owner.kill()
        await let_the_loop_look()
        with pytest.raises(StreamBroken, match="gone"):
            await receiver.receive(sevens(pair), targets)
        assert num_mappings() == 2 + 1
        await receiver.close()
        assert num_mappings() == 2
        with pytest.raises(StreamBroken, match="gone"):
            await pair.decode.transports.connect(owner.choice, "source")

    shared_memory.run(story)


def test_an_idle_mapping_goes_with_its_owner(shared_memory: World, owner: OtherProcess) -> None:
    async def story(pair: Pair) -> None:
        receiver = await pair.decode.transports.connect(owner.choice, "source")
        await receiver.close()
        assert num_mappings() == 2 + 1
        owner.kill()
        await let_the_loop_look()
        assert num_mappings() == 2

    shared_memory.run(story)


async def let_the_loop_look() -> None:
    """What was to be noticed has happened before; the loop polls for it in every turn."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_a_pool_that_the_owner_has_closed(shared_memory: World, owner: OtherProcess) -> None:
    async def story(pair: Pair) -> None:
        owner.close_pool()
        with pytest.raises(StreamBroken, match="gone"):
            await pair.decode.transports.connect(owner.choice, "source")

    shared_memory.run(story)


def test_another_file_at_the_same_descriptor(shared_memory: World) -> None:
    async def story(pair: Pair) -> None:
        export = pair.source.pool.export()
        assert export is not None
        other_token = dataclasses.replace(export, token="00" * 16)
        too_large = dataclasses.replace(export, num_bytes=export.num_bytes * 2)
        reader, writer = os.pipe()
        no_file = dataclasses.replace(export, fd=reader)
        for wrong in (other_token, too_large, no_file):
            with pytest.raises(StreamBroken):
                await pair.decode.transports.connect(TransportChoice("shared_memory", "", wrong), "source")
        os.close(reader)
        os.close(writer)

    shared_memory.run(story)


def test_a_new_pool_at_the_same_descriptor(shared_memory: World) -> None:
    """As after a restart in the same process: the old mapping goes when its last call has ended."""

    async def story(pair: Pair) -> None:
        first = await pair.open()
        old = pair.source.pool
        new = MemoryFilePool(40, 1536, 3)
        new.array[:] = 9
        os.dup2(new.fd, old.fd)
        export = dataclasses.replace(new.export(), fd=old.fd)  # type: ignore[type-var]
        receiver = await pair.decode.transports.connect(
            TransportChoice("shared_memory", "", export), "source"
        )
        with pytest.raises(StreamBroken):
            await first.receiver.receive(sevens(pair), block_ids(2, 40, 1))
        await first.close()
        nines = digest(bytes([9]) * (2 * 1536))
        segment = dataclasses.replace(sevens(pair), digest=nines)
        assert await receiver.receive(segment, block_ids(2, 40, 1))
        await receiver.close()
        new.close()

    shared_memory.run(story)


def test_idle_mappings_are_bounded(shared_memory: World) -> None:
    async def story(pair: Pair) -> None:
        pools = [MemoryFilePool(2, 1536, 3) for _ in range(MAX_IDLE_MAPPINGS + 3)]
        choices = [TransportChoice("shared_memory", "", pool.export()) for pool in pools]
        receivers = [await pair.decode.transports.connect(choice, "source") for choice in choices]
        assert num_mappings() == 2 + 2 * len(pools)
        for receiver in receivers:
            await receiver.close()
        assert num_mappings() == 2 + len(pools) + MAX_IDLE_MAPPINGS
        for pool in pools:
            pool.close()

    shared_memory.run(story)


# Which transport


def both(pair: Pair) -> tuple[Transports, Transports]:
    return Transports(pair.source.side), Transports(pair.decode.side)


def test_the_fastest_in_common_is_chosen(shared_memory: World) -> None:
    async def story(pair: Pair) -> None:
        source, decode = both(pair)
        assert [offer.name for offer in decode.offers()] == list(DEFAULT_ORDER)
        assert source.choose(decode.offers()).choice.name == "shared_memory"
        accepted = source.choose([TransportOffer("nixl"), TransportOffer("grpc")])
        assert accepted.choice.name == "grpc"
        assert "shared_memory: not offered" in accepted.choice.reason
        await accepted.sender.close()

    shared_memory.run(story)


def test_another_host_falls_back_to_grpc(shared_memory: World) -> None:
    async def story(pair: Pair) -> None:
        source, decode = both(pair)
        pair.decode.pool.host_id = "another host"
        accepted = source.choose(decode.offers())
        assert accepted.choice.name == "grpc"
        assert "different host" in accepted.choice.reason
        await accepted.sender.close()

    shared_memory.run(story)


def test_a_pool_that_is_not_sealed_is_not_shared(shared_memory: World) -> None:
    async def story(pair: Pair) -> None:
        pool = MemoryFilePool(40, 1536, 3, seals=0)
        side = dataclasses.replace(pair.source.side, blocks=pool)
        accepted = Transports(side).choose((*pair.decode.transports.offers(), TransportOffer("grpc")))
        assert accepted.choice.name == "grpc"
        assert "sealed" in accepted.choice.reason
        unsealed = TransportChoice("shared_memory", "", pool.export())
        with pytest.raises(StreamBroken):
            await pair.decode.transports.connect(unsealed, "source")
        await accepted.sender.close()
        pool.close()

    shared_memory.run(story)


def test_a_worker_that_may_not_look_offers_shared_memory_no_more(
    shared_memory: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(pair: Pair) -> None:
        def refuse(pid: int) -> int:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "pidfd_open", refuse)
        choice = pair.source.transports.choose(pair.decode.transports.offers()).choice
        with pytest.raises(StreamBroken, match="not permitted"):
            await pair.decode.transports.connect(choice, "source")
        assert pair.decode.transports.offers() == ()

    shared_memory.run(story)


def test_nothing_in_common(shared_memory: World) -> None:
    async def story(pair: Pair) -> None:
        with pytest.raises(Unavailable, match="shared_memory: not offered"):
            pair.source.transports.choose([TransportOffer("nixl")])
        with pytest.raises(ProtocolViolation):
            await pair.decode.transports.connect(TransportChoice("nixl", ""), "source")
        grpc_too = Transports(pair.decode.side)
        with pytest.raises(ProtocolViolation):
            await grpc_too.connect(TransportChoice("grpc", ""), "source")
        with pytest.raises(ProtocolViolation):
            await pair.decode.transports.connect(TransportChoice("shared_memory", ""), "source")
        for order in ((), ("shared_memory", "carrier_pigeon")):
            with pytest.raises(ConfigError):
                Transports(pair.source.side, order)

    shared_memory.run(story)


def test_layers_of_odd_bytes_are_refused() -> None:
    async def story(pair: Pair) -> None:
        for num_layers in (5, 96):  # 307.2 bytes, 16 bytes
            if num_layers == 5:
                with pytest.raises(ConfigError):
                    dataclasses.replace(pair.source.side, num_layers=num_layers)
            else:
                dataclasses.replace(pair.source.side, num_layers=num_layers)

    World(*WORLDS["grpc-virtual"]).run(story)


@given(st.integers(0, 50), st.integers(1, 80), st.integers(0, 79), st.integers(1, 3 * MESSAGE_BYTES // 8))
def test_pieces_cover_a_segment_in_canonical_order(
    num_blocks: int, num_layers: int, first_layer: int, layer_lanes: int
) -> None:
    layers = LayerRange(first_layer, first_layer + num_layers)
    layer_bytes = layer_lanes * 8
    covered: list[tuple[int, int, int]] = []
    first_lane = 0
    for piece in cut(num_blocks, layers, layer_bytes):
        assert piece.first_lane == first_lane
        assert piece.num_bytes == (piece.stop - piece.start) * len(piece.layers) * layer_bytes
        assert piece.num_bytes <= max(MESSAGE_BYTES, layer_bytes)
        assert piece.layers == layers or piece.stop == piece.start + 1
        first_lane += piece.num_bytes // 8
        for block in range(piece.start, piece.stop):
            covered.append((block, piece.layers.start, piece.layers.stop))
    assert [(block, layer) for block, start, stop in covered for layer in range(start, stop)] == [
        (block, layer) for block in range(num_blocks) for layer in range(layers.start, layers.stop)
    ]
