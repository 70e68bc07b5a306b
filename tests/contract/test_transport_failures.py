"""Transports whose calls are abandoned and whose peers die."""

import asyncio
import dataclasses
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import numpy as np
import pytest

from pdserve.contract.errors import StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice
from pdserve.contract.ports import EngineExecutor
from pdserve.handoff.transports import grpc_stream
from pdserve.handoff.transports.base import SegmentReceiver, SegmentSender
from tests.contract.transport_pair import (
    WORLDS,
    Pair,
    World,
    block_ids,
)

T = TypeVar("T")

GRPC_WORLDS = [name for name in WORLDS if name.startswith("grpc")]
STREAM_WORLDS = [*GRPC_WORLDS, *(name for name in WORLDS if name.startswith("process_group"))]
"""Where the bytes come through the source's hands."""


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return World(*WORLDS[request.param])


@pytest.fixture(params=GRPC_WORLDS)
def grpc_world(request: pytest.FixtureRequest) -> World:
    return World(*WORLDS[request.param])


@pytest.fixture(params=STREAM_WORLDS)
def stream_world(request: pytest.FixtureRequest) -> World:
    return World(*WORLDS[request.param])


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


def test_a_source_that_ends_between_segments(stream_world: World) -> None:
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

    stream_world.run(story)


def test_a_source_that_ends_with_bytes_unsent(grpc_world: World) -> None:
    """Nobody reads, more is queued than the stream takes; closing still ends at once, and so does a send."""

    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        ids = [BlockId(block) for block in range(40)] * 3
        await transfer.sender.send(0, 0, ids, pair.all_layers)
        sending = asyncio.ensure_future(transfer.sender.send(1, 0, ids, pair.all_layers))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not sending.done()
        await transfer.sender.close()
        with pytest.raises(StreamBroken):
            await sending
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


def test_a_receive_that_is_cancelled_while_it_waits(stream_world: World) -> None:
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

    stream_world.run(story)


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


@pytest.mark.parametrize("name", [name for name in WORLDS if "virtual" not in name])
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


POINTS = ("chosen", "connected", "sent", "received", "sent ahead", "cancelled", "received again")
"""How far a transfer has come when it is given up."""


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("first", ["source", "decode"])
def test_a_transfer_given_up_at_any_point(world: World, point: str, first: str) -> None:
    """Both ends close, one or the other first; only what was received has changed, and the pair goes on."""

    async def story(pair: Pair) -> None:
        ids = block_ids(12, 40, 1)
        expected = pair.decode.pool.array.copy()
        ends = [end async for end in come_to(point, pair, ids)]
        for end in ends if first == "source" else reversed(ends):
            await end.close()
            await end.close()
        num_received = 4 * {"received": 1, "sent ahead": 1, "cancelled": 1, "received again": 2}.get(point, 0)
        if point == "cancelled":  # that copy may have ended, or not have begun
            expected[ids[4:8]] = pair.decode.pool.array[ids[4:8]]
        expected[ids[:num_received]] = pair.source.pool.array[ids[:num_received]]
        np.testing.assert_array_equal(pair.decode.pool.array, expected)

        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        assert await transfer.receiver.receive(segment, ids)
        await transfer.close()
        np.testing.assert_array_equal(pair.decode.pool.array[ids], pair.source.pool.array[ids])

    world.run(story)


async def come_to(
    point: str, pair: Pair, ids: list[BlockId]
) -> AsyncIterator[SegmentSender | SegmentReceiver]:
    """The ends of a transfer of three segments that has come to `point`."""
    accepted = pair.source.transports.choose(pair.decode.transports.offers())
    yield accepted.sender
    if point == "chosen":
        return
    receiver = await pair.decode.transports.connect(accepted.choice, pair.source.address)
    yield receiver
    reached = POINTS.index(point)
    segments = []
    if reached >= POINTS.index("sent"):
        segments.append(await accepted.sender.send(0, 0, ids[:4], pair.all_layers))
    if reached >= POINTS.index("received"):
        assert await receiver.receive(segments[0], ids[:4])
    if reached >= POINTS.index("sent ahead"):
        segments.append(await accepted.sender.send(1, 4, ids[4:8], pair.all_layers))
        segments.append(await accepted.sender.send(2, 8, ids[8:], pair.all_layers))
    if point == "cancelled":
        receiving = asyncio.ensure_future(receiver.receive(segments[1], ids[4:8]))
        await asyncio.sleep(0)
        receiving.cancel()
        await asyncio.wait([receiving])
    if point == "received again":
        assert await receiver.receive(segments[1], ids[4:8])


def test_many_transfers_given_up_while_others_go_on(world: World) -> None:
    async def story(pair: Pair) -> None:
        async def call(number: int) -> None:
            ids = [BlockId(block) for block in range(number * 8, number * 8 + 8)]
            transfer = await pair.open()
            segment = await transfer.sender.send(0, 0, ids[:4], pair.all_layers)
            assert await transfer.receiver.receive(segment, ids[:4])
            if number % 2 == 0:
                segment = await transfer.sender.send(1, 4, ids[4:], pair.all_layers)
                assert await transfer.receiver.receive(segment, ids[4:])
            await transfer.close()

        before = pair.decode.pool.array.copy()
        await asyncio.gather(*(call(number) for number in range(12)))
        for number in range(12):
            moved = slice(number * 8, number * 8 + (8 if number % 2 == 0 else 4))
            left = slice(moved.stop, number * 8 + 8)
            np.testing.assert_array_equal(pair.decode.pool.array[moved], pair.source.pool.array[moved])
            np.testing.assert_array_equal(pair.decode.pool.array[left], before[left])

    world.run(story, 96)


# Peers that die


def test_a_source_that_dies(stream_world: World) -> None:
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

    stream_world.run(story)


def test_a_decode_worker_that_dies(stream_world: World) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(4, 40, 1)
        transfer = await pair.open()
        await transfer.sender.send(0, 0, ids, pair.all_layers)
        await pair.decode.kill()
        with pytest.raises(StreamBroken):
            await send_until_it_breaks(transfer.sender, pair)
        await transfer.close()

    stream_world.run(story)


DECODE = """
import asyncio, sys
from pdserve.contract.messages import TransportChoice
from tests.contract.transport_pair import WORLDS, Pair, World

async def main(address, transfer_id):
    pair = Pair(World(*WORLDS["grpc"]), 40, 1536, 3)
    choice = TransportChoice("grpc", "", transfer_id=transfer_id)
    await pair.decode.transports.connect(choice, address)
    print("connected", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


def test_a_decode_process_that_is_killed() -> None:
    async def story(pair: Pair) -> None:
        offers = pair.decode.transports.offers()
        accepted = pair.source.transports.choose(offers)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", DECODE, pair.source.address, accepted.choice.transfer_id),
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"connected\n"
        await accepted.sender.send(0, 0, block_ids(4, 40, 1), pair.all_layers)
        process.kill()
        await process.wait()
        with pytest.raises(StreamBroken):
            await send_until_it_breaks(accepted.sender, pair)
        await accepted.sender.close()

    World(*WORLDS["grpc"]).run(story)


async def send_until_it_breaks(sender: SegmentSender, pair: Pair) -> None:
    while True:
        await sender.send(1, 0, block_ids(1, 40, 1), pair.all_layers)
        await asyncio.sleep(0)
