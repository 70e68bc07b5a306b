"""Workers whose pools are cut and laid out in different ways; what travels is in canonical order."""

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from pdserve.clock import LoopClock, SeededRng, VirtualClock, run_virtual
from pdserve.contract.ids import BlockId
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import digest
from pdserve.handoff.transports.base import LocalSide
from tests.contract.memfd_driver import MemfdDriver
from tests.contract.sharded_pool import PoolShape, ShardedPool
from tests.contract.transport_pair import WORLDS, MemoryFilePool, Worker, World, nothing_left

SHAPE = PoolShape()

POOLS: dict[str, Callable[[], ShardedPool]] = {
    "1 rank": lambda: ShardedPool(SHAPE, 1),
    "2 ranks": lambda: ShardedPool(SHAPE, 2),
    "4 ranks": lambda: ShardedPool(SHAPE, 4),
    "2 ranks, heads first": lambda: ShardedPool(SHAPE, 2, heads_first=True),
}

OF_ROWS = {"shared_memory", "nixl", "cuda_ipc"}
"""Transports that move rows of a pool as they lie there."""

ANY_LAYOUT = [name for name, (transport, *_) in WORLDS.items() if transport not in OF_ROWS]
ROWS = sorted({transport for transport, *_ in WORLDS.values()} & OF_ROWS)


def make_worker(world: World, host: str, pool: ShardedPool | MemoryFilePool) -> Worker:
    clock = VirtualClock() if world.is_virtual else LoopClock()
    executor, rpc = world.make_executor(), world.make_rpc(host)
    side = LocalSide(pool, SHAPE.num_layers, executor, rpc, clock, SeededRng(len(host)))
    order = (world.transport,) if world.transport == "grpc" else (world.transport, "grpc")
    return Worker(side, order)


def noise(seed: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
    return np.random.default_rng(seed).integers(0, 2**16, SHAPE.sizes, np.uint16)


async def move(source: Worker, decode: Worker, sources: list[BlockId], targets: list[BlockId]) -> str:
    """The last layer first, then the others; returns the reason of the choice."""
    await source.start()
    await decode.start()
    try:
        accepted = source.transports.choose(decode.transports.offers())
        receiver = await decode.transports.connect(accepted.choice, source.address)
        for index, layers in enumerate((LayerRange(2, 3), LayerRange(0, 2))):
            segment = await accepted.sender.send(index, 0, sources, layers)
            assert segment.digest == digest(source.side.blocks.read(sources, layers))
            assert await receiver.receive(segment, targets)
        await receiver.close()
        await accepted.sender.close()
        return f"{accepted.choice.name}: {accepted.choice.reason}"
    finally:
        await decode.close()
        await source.close()


def run(world: World, from_pool: ShardedPool, to_pool: ShardedPool) -> str:
    """Move some blocks between pools full of noise; everything has to lie where it belongs."""
    from_pool.fill(noise(1))
    to_pool.fill(noise(2))
    sources = [BlockId(block) for block in (7, 0, 23, 8, 9, 3, 15)]
    targets = [BlockId(block) for block in (1, 2, 3, 20, 0, 11, 6)]

    async def story() -> str:
        source, decode = make_worker(world, "source", from_pool), make_worker(world, "decode", to_pool)
        return await move(source, decode, sources, targets)

    with nothing_left():
        reason = run_virtual(story()) if world.is_virtual else asyncio.run(story())
    expected = noise(2)
    expected[targets] = noise(1)[sources]
    np.testing.assert_array_equal(to_pool.canonical, expected)
    np.testing.assert_array_equal(from_pool.canonical, noise(1))
    return reason


@pytest.mark.parametrize("name", ANY_LAYOUT)
@pytest.mark.parametrize("to_pool", POOLS)
@pytest.mark.parametrize("from_pool", POOLS)
def test_degrees_and_layouts_may_differ(name: str, from_pool: str, to_pool: str) -> None:
    world = World(*WORLDS[name])
    world.skip_without_its_package()
    assert run(world, POOLS[from_pool](), POOLS[to_pool]()).startswith(world.transport)


@pytest.mark.parametrize("transport", ROWS)
@pytest.mark.parametrize(
    ("from_pool", "to_pool"), [("1 rank", "4 ranks"), ("2 ranks, heads first", "1 rank")]
)
def test_what_moves_rows_leaves_such_pools_to_grpc(transport: str, from_pool: str, to_pool: str) -> None:
    world = next(World(*args) for args in WORLDS.values() if args[0] == transport)
    world.skip_without_its_package()
    reason = run(world, POOLS[from_pool](), POOLS[to_pool]())
    assert reason.startswith("grpc: ")
    assert f"{transport}: " in reason  # and why not


@pytest.mark.parametrize("transport", ROWS)
def test_a_source_that_cannot_be_read_by_rows_says_so(transport: str) -> None:
    """The decode worker's pool could be read and written so; the source's is cut by heads."""
    world = next(World(*args) for args in WORLDS.values() if args[0] == transport)
    world.skip_without_its_package()
    to_pool = world.make_pool(SHAPE.num_blocks, ShardedPool(SHAPE, 1).block_bytes, SHAPE.num_layers)
    from_pool = ShardedPool(SHAPE, 2)
    from_pool.fill(noise(1))

    async def story() -> str:
        source, decode = make_worker(world, "source", from_pool), make_worker(world, "decode", to_pool)
        ids = [BlockId(block) for block in range(SHAPE.num_blocks)]
        return await move(source, decode, ids, ids)

    with MemfdDriver.in_place_of_cuda():
        reason = asyncio.run(story())
    assert reason.startswith("grpc: ")
    assert f"{transport}: the source's pool " in reason
    np.testing.assert_array_equal(to_pool.array.reshape(-1), noise(1).view(np.uint8).reshape(-1))
    to_pool.close()
