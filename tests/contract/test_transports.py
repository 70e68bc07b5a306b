"""What every transport must do with the bytes, in every world in which it can run."""

import asyncio
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.contract.errors import ProtocolViolation
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Message, Segment
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import digest
from pdserve.handoff.transports.pieces import PIECE_BYTES, cut
from tests.contract.transport_pair import (
    WORLDS,
    MemoryFilePool,
    Pair,
    Worker,
    World,
    block_ids,
    open_transfer,
)


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest) -> World:
    return World(*WORLDS[request.param])


@pytest.mark.parametrize(
    ("num_blocks", "block_bytes", "num_layers", "count"),
    [
        (3, 8, 1, 1),  # one lane
        (40, 1536, 3, 40),
        (40, 24 * 5, 3, 17),  # rows at odd lanes
        (4000, 1024, 2, 3999),
        (300, 64 * 1024, 4, 123),
        (4, 5 * PIECE_BYTES // 2, 5, 3),  # a block over several pieces
    ],
)
def test_every_byte_arrives(
    world: World, num_blocks: int, block_bytes: int, num_layers: int, count: int
) -> None:
    async def story(pair: Pair) -> None:
        sources, targets = block_ids(count, num_blocks, 1), block_ids(count, num_blocks, 2)
        before = pair.decode.pool.array.copy()
        transfer = await pair.open()
        segment = await transfer.sender.send(7, 5, sources, pair.all_layers)
        assert await transfer.receiver.receive(segment, targets)
        await transfer.close()

        expected = before
        expected[targets] = pair.source.pool.array[sources]
        np.testing.assert_array_equal(pair.decode.pool.array, expected)
        canonical = pair.source.pool.array[sources].tobytes()
        assert dataclasses.replace(segment, source_blocks=()) == Segment(
            7, 5, count, pair.all_layers, digest(canonical), len(canonical)
        )
        assert transfer.sender.stats.num_bytes == transfer.receiver.stats.num_bytes == len(canonical)

    world.run(story, num_blocks, block_bytes, num_layers)


@pytest.mark.parametrize("layers", [LayerRange(0, 3), LayerRange(1, 3)])
def test_neighbouring_blocks(world: World, layers: LayerRange) -> None:
    """Ids that count up at one end, at both, and from different places on."""

    async def story(pair: Pair) -> None:
        up, mixed = [*range(10, 30)], [*range(20, 30), 35, 3, 4, 5, *range(12, 18)]
        before = pair.decode.pool.array.copy()
        for sources, targets in ((up, up), (up, mixed), (mixed, up), (mixed, mixed)):
            transfer = await pair.open()
            ids = [BlockId(block) for block in targets]
            segment = await transfer.sender.send(0, 0, [BlockId(block) for block in sources], layers)
            pair.decode.pool.array[:] = before
            assert await transfer.receiver.receive(segment, ids)
            await transfer.close()
            for source, target in zip(sources, targets, strict=True):
                assert pair.part(pair.decode, target, layers) == pair.part(pair.source, source, layers)
            untouched = [block for block in range(40) if block not in targets]
            np.testing.assert_array_equal(pair.decode.pool.array[untouched], before[untouched])

    world.run(story, 40, 96 * 1024, 3)


def test_layers_travel_in_groups(world: World) -> None:
    async def story(pair: Pair) -> None:
        sources, targets = block_ids(10, 40, 3), block_ids(10, 40, 4)
        transfer = await pair.open()
        for index, layers in enumerate((LayerRange(2, 3), LayerRange(0, 2))):
            segment = await transfer.sender.send(index, 0, sources, layers)
            untouched = [pair.part(pair.decode, block, LayerRange(0, 2)) for block in targets]
            assert await transfer.receiver.receive(segment, targets)
            if index == 0:
                assert untouched == [pair.part(pair.decode, block, LayerRange(0, 2)) for block in targets]
        await transfer.close()
        np.testing.assert_array_equal(pair.decode.pool.array[targets], pair.source.pool.array[sources])

    world.run(story)


def test_a_slow_receiver_slows_the_source(world: World) -> None:
    """Several times what the streams hold is sent by a source that is always ahead."""

    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        announced: asyncio.Queue[tuple[Segment, list[BlockId]]] = asyncio.Queue()

        async def send_all() -> None:
            for index in range(12):
                ids = block_ids(20, 40, index)
                announced.put_nowait((await transfer.sender.send(index, 0, ids, pair.all_layers), ids))

        sending = asyncio.ensure_future(send_all())
        for index in range(12):
            segment, ids = await announced.get()
            targets = block_ids(20, 40, index + 100)
            for _ in range(20):
                await asyncio.sleep(0)
            assert await transfer.receiver.receive(segment, targets)
            np.testing.assert_array_equal(pair.decode.pool.array[targets], pair.source.pool.array[ids])
        await sending
        await transfer.close()

    world.run(story, 40, 384 * 1024, 3)


def test_many_calls_at_once(world: World) -> None:
    async def story(pair: Pair) -> None:
        async def call(number: int) -> None:
            own = [BlockId(block) for block in range(number * 8, number * 8 + 8)]
            transfer = await pair.open()
            for index in range(4):
                pieces = own[index * 2 : index * 2 + 2]
                segment = await transfer.sender.send(index, index * 2, pieces, pair.all_layers)
                assert await transfer.receiver.receive(segment, pieces)
            await transfer.close()

        await asyncio.gather(*(call(number) for number in range(25)))
        np.testing.assert_array_equal(pair.decode.pool.array, pair.source.pool.array)

    world.run(story, 200)


def test_a_long_prompt_under_a_full_window(world: World) -> None:
    """Segments of 256 blocks and an odd tail. At most eight are unacknowledged, as in a Prefill call, and the
    source is always ahead."""

    async def story(pair: Pair) -> None:
        sources, targets = block_ids(3001, 3200, 1), block_ids(3001, 3200, 2)
        expected = pair.decode.pool.array.copy()
        expected[targets] = pair.source.pool.array[sources]
        transfer = await pair.open()
        window = asyncio.Semaphore(8)
        announced: asyncio.Queue[Segment | None] = asyncio.Queue()

        async def send_all() -> None:
            for index, first in enumerate(range(0, len(sources), 256)):
                await window.acquire()
                ids = sources[first : first + 256]
                announced.put_nowait(await transfer.sender.send(index, first, ids, pair.all_layers))
            announced.put_nowait(None)

        sending = asyncio.ensure_future(send_all())
        num_blocks = 0
        while (segment := await announced.get()) is not None:
            for _ in range(20):
                await asyncio.sleep(0)  # the source goes ahead as far as it may
            last = segment.first_block + segment.num_blocks
            assert await transfer.receiver.receive(segment, targets[segment.first_block : last])
            num_blocks += segment.num_blocks
            window.release()
        await sending
        await transfer.close()
        assert num_blocks == len(sources)
        np.testing.assert_array_equal(pair.decode.pool.array, expected)

    world.run(story, 3200, 48, 3)


def test_many_pairs_at_once(world: World) -> None:
    """Each of four sources ships to each of four decode workers, all at the same time."""

    async def story(first: Pair) -> None:
        others = [Pair(world, 64, 1536, 3, suffix=f"-{number}") for number in range(3)]
        for pair in others:
            await pair.start()
        pairs = [first, *others]

        async def ship(source: Worker, decode: Worker, quarter: int) -> None:
            ids = [BlockId(block) for block in range(quarter * 16, quarter * 16 + 16)]
            transfer = await open_transfer(source, decode)
            for index in range(4):
                part = ids[index * 4 : index * 4 + 4]
                segment = await transfer.sender.send(index, index * 4, part, first.all_layers)
                assert await transfer.receiver.receive(segment, part)
            await transfer.close()

        await asyncio.gather(
            *(
                ship(from_pair.source, to_pair.decode, quarter)
                for quarter, from_pair in enumerate(pairs)
                for to_pair in pairs
            )
        )
        for pair in pairs:
            for quarter, from_pair in enumerate(pairs):
                rows = slice(quarter * 16, quarter * 16 + 16)
                np.testing.assert_array_equal(pair.decode.pool.array[rows], from_pair.source.pool.array[rows])
        for pair in others:
            await pair.close()

    world.run(story, 64)


# What is wrong is found


def test_a_source_that_changes_what_it_has_announced_is_found_out(world: World) -> None:
    """Whatever arrives then is the old or the new, never a mixture that is believed."""

    async def story(pair: Pair) -> None:
        ids = block_ids(12, 40, 5)
        old = pair.source.pool.array[ids].copy()
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        pair.source.pool.array[ids] ^= 255
        matched = await transfer.receiver.receive(segment, ids)
        assert matched == np.array_equal(pair.decode.pool.array[ids], old)
        assert transfer.receiver.stats.num_mismatches == (not matched)
        await transfer.close()

    world.run(story)


def test_a_wrong_digest_is_found_and_the_segment_sent_again(world: World) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(12, 40, 5)
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        wrong = dataclasses.replace(segment, digest=segment.digest ^ 1)
        later = await transfer.sender.send(1, 0, ids, pair.all_layers)
        assert not await transfer.receiver.receive(wrong, ids)
        again = await transfer.sender.send(0, 0, ids, pair.all_layers)
        assert again == segment
        assert await transfer.receiver.receive(later, ids)
        assert await transfer.receiver.receive(again, ids)
        assert transfer.receiver.stats.num_mismatches == 1
        await transfer.close()

    world.run(story)


def test_a_flipped_bit_is_found() -> None:
    """In the source's pool, between its digest and the copy."""

    async def story(pair: Pair) -> None:
        ids = block_ids(12, 40, 5)
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        pair.source.pool.array[ids[7], 1000] ^= 4
        assert not await transfer.receiver.receive(segment, ids)
        pair.source.pool.array[ids[7], 1000] ^= 4
        assert await transfer.receiver.receive(segment, ids)
        await transfer.close()

    World("shared_memory", "memory", MemoryFilePool).run(story)


class CorruptingStream:
    """Flips a bit of the second KV message that arrives."""

    def __init__(self, stream: MessageStream):
        self._stream = stream
        self._num_received = 0
        self.peer, self.send, self.cancel = stream.peer, stream.send, stream.cancel

    async def receive(self) -> Message:
        message = await self._stream.receive()
        self._num_received += 1
        if self._num_received == 2 and isinstance(message, bytes):
            return bytes([message[0] ^ 128]) + message[1:]
        return message


def test_a_bit_flipped_on_the_wire_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        rpc = pair.decode.side.rpc
        really_open = rpc.open

        async def open_corrupting(address: str, call: Call) -> MessageStream:
            return CorruptingStream(await really_open(address, call))

        monkeypatch.setattr(rpc, "open", open_corrupting)
        ids = block_ids(40, 40, 5)
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        assert not await transfer.receiver.receive(segment, ids)
        assert await transfer.receiver.receive(await transfer.sender.send(0, 0, ids, pair.all_layers), ids)
        await transfer.close()

    World("grpc", "virtual", MemoryFilePool).run(story, 40, 96 * 1024, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"num_blocks": 3},
        {"num_bytes": 8},
        {"layers": LayerRange(0, 4)},
        {"layers": LayerRange(2, 2)},
        {"layers": LayerRange(-1, 2)},
    ],
)
def test_a_segment_that_does_not_fit_is_refused(world: World, change: dict[str, object]) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(4, 40, 6)
        before = pair.decode.pool.array.copy()
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        with pytest.raises(ProtocolViolation):
            await transfer.receiver.receive(dataclasses.replace(segment, **change), ids)  # type: ignore[arg-type]
        await transfer.close()
        np.testing.assert_array_equal(pair.decode.pool.array, before)

    world.run(story)


@pytest.mark.parametrize("rows", [(0, 40), (-1, 0), (0,)])
def test_blocks_outside_the_source_pool_are_refused(rows: tuple[int, ...]) -> None:
    async def story(pair: Pair) -> None:
        ids = block_ids(2, 40, 6)
        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, ids, pair.all_layers)
        with pytest.raises(ProtocolViolation):
            await transfer.receiver.receive(dataclasses.replace(segment, source_blocks=rows), ids)
        await transfer.close()

    World("shared_memory", "memory", MemoryFilePool).run(story)


@given(st.integers(0, 50), st.integers(1, 80), st.integers(0, 79), st.integers(1, 3 * PIECE_BYTES // 8))
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
        assert piece.num_bytes <= max(PIECE_BYTES, layer_bytes)
        assert piece.layers == layers or piece.stop == piece.start + 1
        first_lane += piece.num_bytes // 8
        for block in range(piece.start, piece.stop):
            covered.append((block, piece.layers.start, piece.layers.stop))
    assert [(block, layer) for block, start, stop in covered for layer in range(start, stop)] == [
        (block, layer) for block in range(num_blocks) for layer in range(layers.start, layers.stop)
    ]
