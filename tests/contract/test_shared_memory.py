"""Shared memory: pools of other processes, mapped for as long as they are there and needed."""

import asyncio
import dataclasses
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.messages import Segment, TransportChoice
from pdserve.contract.work import PoolExport
from pdserve.handoff.digest import digest
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


@pytest.fixture
def shared_memory() -> World:
    return World(*WORLDS["shared_memory"])


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
        part_of_it = dataclasses.replace(export, num_bytes=export.num_bytes - 1536)
        reader, writer = os.pipe()
        no_file = dataclasses.replace(export, fd=reader)
        for wrong in (other_token, too_large, part_of_it, no_file):
            with pytest.raises(StreamBroken):
                await pair.decode.transports.connect(TransportChoice("shared_memory", "", wrong), "source")
        os.close(reader)
        os.close(writer)

    shared_memory.run(story)


def test_a_source_cannot_make_the_receiver_map_what_is_no_pool(shared_memory: World) -> None:
    """Even a file whose last bytes it knows: here zeros."""

    async def story(pair: Pair) -> None:
        num_bytes = 40 * 1536
        secret = os.memfd_create("somebody's secret", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(secret, num_bytes + 16)
        fcntl.fcntl(secret, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        export = PoolExport("this host", os.getpid(), secret, num_bytes, "00" * 16)
        with pytest.raises(StreamBroken, match="is not the offered pool"):
            await pair.decode.transports.connect(TransportChoice("shared_memory", "", export), "source")
        os.close(secret)

    shared_memory.run(story)


@pytest.mark.parametrize(
    "fields",
    [
        {"token": ""},
        {"token": "00"},
        {"token": "no hexadecimal"},
        {"pid": 0},
        {"pid": -1},
        {"pid": 2**40},
        {"fd": -1},
        {"fd": 2**40},
        {"num_bytes": 0},
        {"num_bytes": -16},
        {"num_bytes": 2**63},
    ],
    ids=str,
)
def test_an_export_that_no_pool_has(shared_memory: World, fields: dict[str, object]) -> None:
    async def story(pair: Pair) -> None:
        export = dataclasses.replace(pair.source.pool.export(), **fields)  # type: ignore[type-var]
        with pytest.raises(ProtocolViolation, match="the source"):
            await pair.decode.transports.connect(TransportChoice("shared_memory", "", export), "source")

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
