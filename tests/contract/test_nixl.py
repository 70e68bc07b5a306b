"""NIXL: sources in other processes that die, freeze and come back, over TCP and over what UCX chooses."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pdserve.clock import LoopClock
from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.handoff.digest import digest
from pdserve.handoff.transports.base import Declined
from pdserve.handoff.transports.negotiation import Transports
from pdserve.handoff.transports.nixl import NUM_SLOTS, NixlTransport
from pdserve.handoff.transports.nixl_agent import Descriptors
from pdserve.handoff.transports.nixl_remotes import MAX_IDLE_REMOTES, Remote
from pdserve.handoff.transports.staging import Staging
from tests.contract.transport_pair import WORLDS, CopyingPool, Pair, World

NUM_BLOCKS, BLOCK_BYTES = 40, 3 * 64 * 1024

SOURCE = """
import sys
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.messages import TransportOffer
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.handoff.transports.base import LocalSide
from pdserve.handoff.transports.negotiation import Transports
from pdserve.rpc.memory_rpc import MemoryNetwork, MemoryRpc
from tests.contract.transport_pair import MemoryFilePool
pool = MemoryFilePool(%d, %d, 3)
pool.array[:] = 7
rpc = MemoryRpc(MemoryNetwork(), "source")
side = LocalSide(pool, 3, ThreadExecutor(FakeEngine(1)), rpc, LoopClock(), SystemRng())
transports = Transports(side, ("nixl", "grpc"))
print("ready", flush=True)
for line in sys.stdin:
    offers = (TransportOffer("nixl", endpoint=bytes.fromhex(line)), TransportOffer("grpc"))
    choice = transports.choose(offers).choice
    print(choice.name, choice.endpoint.hex(), choice.reason, flush=True)
"""


class OtherProcess:
    """A source with a pool of sevens."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SOURCE % (NUM_BLOCKS, BLOCK_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def choose(self, offer: TransportOffer) -> TransportChoice:
        assert self.process.stdin is not None
        print(offer.endpoint.hex(), file=self.process.stdin, flush=True)
        name, endpoint, reason = self._line().split(" ", 2)
        return TransportChoice(name, reason, endpoint=bytes.fromhex(endpoint))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

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


@pytest.fixture(params=["", "tcp"])
def nixl(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> World:
    """With what UCX chooses on one host, and with TCP, where the source's process has to take part."""
    if request.param:
        monkeypatch.setenv("UCX_TLS", request.param)
    world = World(*WORLDS["nixl"])
    world.skip_without_its_package()
    return world


@pytest.fixture
def source(nixl: World) -> Iterator[OtherProcess]:
    other = OtherProcess()
    yield other
    other.close()


def run(world: World, story: Callable[[Pair], object]) -> None:
    world.run(story, NUM_BLOCKS, BLOCK_BYTES, 3)  # type: ignore[arg-type]


def offer_of(pair: Pair) -> TransportOffer:
    (offer,) = pair.decode.transports.offers()
    return offer


def num_free(pair: Pair) -> int:
    transport = pair.decode.transports._by_name["nixl"]
    assert isinstance(transport, NixlTransport)
    return transport._staging._free.qsize()


class Reads:
    """All reads that are posted while it is there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started = asyncio.Event()
        self._ended: list[asyncio.Future[None]] = []
        really_read = Remote.read

        def read(remote: Remote, sources: Descriptors, targets: Descriptors) -> "asyncio.Future[None]":
            ended = really_read(remote, sources, targets)
            self._ended.append(ended)
            self.started.set()
            return ended

        monkeypatch.setattr(Remote, "read", read)

    async def have_ended(self) -> None:
        await asyncio.wait(self._ended)


TARGETS = [BlockId(block) for block in range(NUM_BLOCKS - 1, -1, -1)]


def sevens(pair: Pair) -> Segment:
    """The whole pool of the other process."""
    payload = bytes([7]) * (NUM_BLOCKS * BLOCK_BYTES)
    rows = tuple(range(NUM_BLOCKS))
    return Segment(0, 0, NUM_BLOCKS, pair.all_layers, digest(payload), len(payload), source_blocks=rows)


def test_a_pool_of_another_process(nixl: World, source: OtherProcess) -> None:
    async def story(pair: Pair) -> None:
        for _ in range(3):
            pair.decode.pool.array[:] = 0
            receiver = await pair.decode.transports.connect(source.choose(offer_of(pair)), "source")
            assert await receiver.receive(sevens(pair), TARGETS)
            await receiver.close()
            assert (pair.decode.pool.array == 7).all()
        assert num_free(pair) == NUM_SLOTS

    run(nixl, story)


def test_a_source_process_that_dies(nixl: World, source: OtherProcess) -> None:
    """Also for calls that come later, and without harm to calls from others."""

    async def story(pair: Pair) -> None:
        choice = source.choose(offer_of(pair))
        receiver = await pair.decode.transports.connect(choice, "source")
        assert await receiver.receive(sevens(pair), TARGETS)
        receiving = asyncio.ensure_future(receiver.receive(sevens(pair), TARGETS))
        await asyncio.sleep(0)
        source.kill()
        (outcome,) = await asyncio.gather(receiving, return_exceptions=True)
        assert outcome is True or isinstance(outcome, StreamBroken)
        with pytest.raises(StreamBroken):
            await receiver.receive(sevens(pair), TARGETS)
        await receiver.close()

        transfer = await pair.open()
        segment = await transfer.sender.send(0, 0, TARGETS, pair.all_layers)
        assert await transfer.receiver.receive(segment, TARGETS)
        await transfer.close()
        np.testing.assert_array_equal(pair.decode.pool.array, pair.source.pool.array)

    run(nixl, story)


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("UCX_TLS", "tcp")
    world = World(*WORLDS["nixl"])
    world.skip_without_its_package()
    return world


@pytest.fixture
def tcp_source(over_tcp: World) -> Iterator[OtherProcess]:
    other = OtherProcess()
    yield other
    other.close()


def test_a_frozen_source_is_given_up_and_used_again_when_it_is_back(
    over_tcp: World, tcp_source: OtherProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(pair: Pair) -> None:
        receiver = await pair.decode.transports.connect(tcp_source.choose(offer_of(pair)), "source")
        assert await receiver.receive(sevens(pair), TARGETS)
        reads = Reads(monkeypatch)
        tcp_source.signal(signal.SIGSTOP)
        with pytest.raises(StreamBroken, match="did not answer"):
            await receiver.receive(sevens(pair), TARGETS)
        await receiver.close()
        assert num_free(pair) < NUM_SLOTS  # what the reads may still write to is out of use
        offer = offer_of(pair)

        tcp_source.signal(signal.SIGCONT)
        choice = tcp_source.choose(offer)
        assert choice.name == "grpc"
        assert "an earlier read from here failed and has not ended" in choice.reason
        await reads.have_ended()
        assert num_free(pair) == NUM_SLOTS
        receiver = await pair.decode.transports.connect(tcp_source.choose(offer_of(pair)), "source")
        assert await receiver.receive(sevens(pair), TARGETS)
        await receiver.close()

    run(over_tcp, story)


def test_a_cancelled_receive_does_not_wait_for_its_reads(
    over_tcp: World, tcp_source: OtherProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their slots do, and no block is touched when they end."""

    async def story(pair: Pair) -> None:
        receiver = await pair.decode.transports.connect(tcp_source.choose(offer_of(pair)), "source")
        assert await receiver.receive(sevens(pair), TARGETS)
        before = pair.decode.pool.array.copy()
        reads = Reads(monkeypatch)
        tcp_source.signal(signal.SIGSTOP)
        receiving = asyncio.ensure_future(receiver.receive(sevens(pair), TARGETS))
        await reads.started.wait()
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        await receiver.close()
        assert num_free(pair) < NUM_SLOTS
        tcp_source.signal(signal.SIGCONT)
        await reads.have_ended()
        assert num_free(pair) == NUM_SLOTS
        np.testing.assert_array_equal(pair.decode.pool.array, before)

    run(over_tcp, story)


CLOSES_WHILE_READING = """
import asyncio
import pytest
from tests.contract.test_nixl import *

async def main() -> None:
    reads = Reads(pytest.MonkeyPatch())
    source = OtherProcess()
    pair = Pair(World(*WORLDS["nixl"]), NUM_BLOCKS, BLOCK_BYTES, 3)
    await pair.start()
    receiver = await pair.decode.transports.connect(source.choose(offer_of(pair)), "source")
    assert await receiver.receive(sevens(pair), TARGETS)
    source.signal(signal.SIGSTOP)
    reads.started.clear()
    receiving = asyncio.ensure_future(receiver.receive(sevens(pair), TARGETS))
    await reads.started.wait()
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    await receiver.close()
    await pair.close()
    source.close()
    print("closed")

asyncio.run(main())
"""


def test_closing_with_a_read_under_way(over_tcp: World) -> None:
    """The process still ends in good order."""
    result = subprocess.run(
        [sys.executable, "-c", CLOSES_WHILE_READING], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("closed\n")  # then UCX tells of the read


# Negotiation


@pytest.fixture
def world() -> World:
    world = World(*WORLDS["nixl"])
    world.skip_without_its_package()
    return world


def test_without_the_package_it_is_neither_offered_nor_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(pair: Pair) -> None:
        (offer,) = pair.decode.transports.offers()
        monkeypatch.setitem(sys.modules, "nixl", None)
        monkeypatch.delitem(sys.modules, "nixl._bindings", raising=False)
        without = Transports(pair.source.side, ("nixl", "grpc"))
        assert [offer.name for offer in without.offers()] == ["grpc"]
        nixl_offer = TransportOffer("nixl", endpoint=b"{}")
        accepted = without.choose((nixl_offer, offer))
        assert accepted.choice.name == "grpc"
        assert "NIXL is not installed here" in accepted.choice.reason
        assert "pip install 'pdserve[nixl]'" in accepted.choice.reason
        with pytest.raises(ProtocolViolation):
            await without.connect(TransportChoice("nixl", ""), "source")
        await accepted.sender.close()
        await without.close()

    World(*WORLDS["grpc-threads"]).run(story)


def test_another_layout_is_declined(world: World) -> None:
    async def story(pair: Pair) -> None:
        own = pair.decode.transports._by_name["nixl"]
        wider = dataclasses.replace(pair.decode.side, num_layers=1)
        other = NixlTransport(wider)
        offer = other.offer()
        assert offer is not None
        declined = own.accept(offer)
        assert isinstance(declined, Declined)
        assert "num_layers=1" in declined.reason
        await other.close()

    world.run(story)


def test_a_pool_without_rows_is_no_source_and_can_receive(world: World) -> None:
    async def story(pair: Pair) -> None:
        copying = dataclasses.replace(pair.decode.side, blocks=CopyingPool(40, 1536, 3))
        transport = NixlTransport(copying)
        declined = transport.accept(offer_of(pair))
        assert isinstance(declined, Declined)
        assert "canonical order" in declined.reason

        offer = transport.offer()
        assert offer is not None
        accepted = pair.source.transports.choose((offer,))
        receiver = await transport.connect(accepted.choice, "source")
        ids = [BlockId(3), BlockId(30)]
        segment = await accepted.sender.send(0, 0, ids, pair.all_layers)
        assert await receiver.receive(segment, ids)
        assert isinstance(copying.blocks, CopyingPool)
        np.testing.assert_array_equal(copying.blocks.array[ids], pair.source.pool.array[ids])
        await receiver.close()
        await accepted.sender.close()
        await transport.close()
        copying.blocks.close()

    world.run(story)


@pytest.mark.parametrize(
    "endpoint",
    [
        b"",
        b"\x80\x04.",
        b"{}",
        b'{"agent": "a", "metadata": "?", "kind": "DRAM", "address": 0, "num_bytes": 8, "device": 0}',
        b'{"agent": "a", "metadata": "AAAA", "kind": "DRAM", "address": 0, "num_bytes": 8, "device": 0}',
    ],
)
def test_an_endpoint_that_makes_no_sense(world: World, endpoint: bytes) -> None:
    async def story(pair: Pair) -> None:
        with pytest.raises(ProtocolViolation):
            await pair.decode.transports.connect(TransportChoice("nixl", "", endpoint=endpoint), "source")
        if b"agent" not in endpoint:
            with pytest.raises(ProtocolViolation):
                pair.source.transports.choose([TransportOffer("nixl", endpoint=endpoint)])
        transfer = await pair.open()
        await transfer.close()

    world.run(story)


def test_a_source_that_lies_about_its_agent_and_its_pool(world: World) -> None:
    async def story(pair: Pair) -> None:
        choice = pair.source.transports.choose(pair.decode.transports.offers()).choice
        start = choice.endpoint.index(b'"address":') + len(b'"address":')
        address = int(choice.endpoint[start:].split(b",")[0])
        for old, new in ((b'"agent":"pdserve', b'"agent":"another'), (str(address).encode(), b"4096")):
            lie = dataclasses.replace(choice, endpoint=choice.endpoint.replace(old, new))
            if b"another" in lie.endpoint:
                with pytest.raises(ProtocolViolation):
                    await pair.decode.transports.connect(lie, "source")
                continue
            receiver = await pair.decode.transports.connect(lie, "source")
            segment = Segment(0, 0, 1, pair.all_layers, 0, 1536, source_blocks=(0,))
            with pytest.raises(StreamBroken, match="NIXL refuses the read"):
                await receiver.receive(segment, [BlockId(0)])
            await receiver.close()
        assert num_free(pair) == NUM_SLOTS

    world.run(story)


def test_idle_sources_are_bounded(world: World) -> None:
    async def story(pair: Pair) -> None:
        sides = [
            dataclasses.replace(pair.source.side, rng=type(pair.source.side.rng)(seed))  # type: ignore[call-arg]
            for seed in range(MAX_IDLE_REMOTES + 2)
        ]
        sources = [NixlTransport(side) for side in sides]
        for source in sources:
            accepted = source.accept(offer_of(pair))
            assert not isinstance(accepted, Declined)
            receiver = await pair.decode.transports.connect(accepted.choice, "source")
            segment = await accepted.sender.send(0, 0, [BlockId(1)], pair.all_layers)
            assert await receiver.receive(segment, [BlockId(2)])
            await receiver.close()
            await accepted.sender.close()
        transport = pair.decode.transports._by_name["nixl"]
        assert isinstance(transport, NixlTransport)
        assert transport._remotes is not None
        assert len(transport._remotes._remotes) == MAX_IDLE_REMOTES
        for source in sources:
            await source.close()

    world.run(story)


# Staging memory


async def test_lost_slots_are_never_given_again() -> None:
    staging = Staging(2, 4096, LoopClock())
    first, second = await staging.acquire(), await staging.acquire()
    assert first.address != second.address
    assert not staging.has_free
    staging.lose(first)
    assert not staging.is_lost
    waiting = asyncio.ensure_future(staging.acquire())
    await asyncio.sleep(0)
    assert not waiting.done()
    staging.release(second)
    assert await waiting == second
    staging.lose(second)
    assert staging.is_lost


def test_a_worker_without_staging_offers_nixl_no_more(world: World) -> None:
    async def story(pair: Pair) -> None:
        transport = pair.decode.transports._by_name["nixl"]
        assert isinstance(transport, NixlTransport)
        for _ in range(NUM_SLOTS):
            transport._staging.lose(await transport._staging.acquire())
        assert pair.decode.transports.offers() == ()

    world.run(story)


def test_nothing_prints_or_changes_logging(world: World) -> None:
    """The package would turn the reporting of errors in logging off for the whole process."""
    script = (
        "import logging\n"
        "from pdserve.handoff.transports.nixl_agent import _import_bindings\n"
        "_import_bindings()\n"
        "assert logging.raiseExceptions\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
