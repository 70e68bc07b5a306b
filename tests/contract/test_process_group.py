"""The process group between two workers: it fails, is rebuilt, makes room; peers die and freeze."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator

import numpy as np
import pytest

from pdserve.contract.errors import ErrorCode, ProtocolViolation, StreamBroken
from pdserve.contract.messages import End, TransportChoice, TransportOffer
from pdserve.contract.ports import Call
from pdserve.handoff.transports import process_group
from pdserve.handoff.transports.base import Declined
from pdserve.handoff.transports.kv_streams import greet
from pdserve.handoff.transports.pair_groups.budget import GroupBudget
from pdserve.handoff.transports.pair_groups.live_group import LiveGroup
from pdserve.handoff.transports.pair_groups.messages import Build, Hello, Want, decode, encode
from pdserve.handoff.transports.pair_groups.receiver_link import Arrival
from pdserve.handoff.transports.process_group import ProcessGroupTransport
from tests.contract.rpc_pair import receive_all
from tests.contract.transport_pair import WORLDS, Pair, Transfer, Worker, World, block_ids, open_transfer

MIB = 1 << 20


@pytest.fixture
def world() -> World:
    return World(*WORLDS["process_group"])


def transport(worker: Worker) -> ProcessGroupTransport:
    assert isinstance(worker.transport, ProcessGroupTransport)
    return worker.transport


def live_group(worker: Worker) -> LiveGroup:
    """Of the decode worker's only link."""
    (link,) = transport(worker)._links.values()
    assert link._live is not None
    return link._live


def num_pieces_by_stream(transfer: Transfer) -> int:
    assert isinstance(transfer.receiver, process_group._Receiver)
    return transfer.receiver.num_pieces_by_stream


async def move(pair: Pair, transfer: Transfer, index: int) -> None:
    """Another segment, and it is the right one."""
    sources, targets = block_ids(8, 40, index), block_ids(8, 40, index + 50)
    segment = await transfer.sender.send(index, 0, sources, pair.all_layers)
    assert await transfer.receiver.receive(segment, targets)
    np.testing.assert_array_equal(pair.decode.pool.array[targets], pair.source.pool.array[sources])


# By the group and by the stream


def test_segments_go_by_the_group_once_it_is_built(world: World) -> None:
    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        await move(pair, transfer, 0)
        assert num_pieces_by_stream(transfer) == 0
        assert transport(pair.source).num_groups == transport(pair.decode).num_groups == 1
        await transfer.close()

    world.run(story)


def test_the_first_call_does_not_wait_for_the_group(world: World) -> None:
    async def story(pair: Pair) -> None:
        accepted = pair.source.transports.choose(pair.decode.transports.offers())
        receiver = await pair.decode.transports.connect(accepted.choice, pair.source.address)
        transfer = Transfer(accepted.sender, receiver, accepted.choice)
        ids = block_ids(4, 40, 1)
        sending = asyncio.ensure_future(transfer.sender.send(0, 0, ids, pair.all_layers))
        assert await transfer.receiver.receive(await sending, ids)
        await transfer.close()

    world.run(story)


@pytest.mark.parametrize("end", ["source", "decode"])
def test_a_group_that_fails_costs_no_call(world: World, end: str) -> None:
    """What was under way comes on the stream; a group of the next generation carries what follows."""

    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        first = live_group(pair.decode)
        sources, targets = block_ids(40, 40, 1), block_ids(40, 40, 2)
        segment = await transfer.sender.send(0, 0, sources, pair.all_layers)
        receiving = asyncio.ensure_future(transfer.receiver.receive(segment, targets))
        await asyncio.sleep(0)
        group = first if end == "decode" else next(iter(transport(pair.source)._served))._live
        assert group is not None
        await group.group._abort()
        assert await receiving
        np.testing.assert_array_equal(pair.decode.pool.array[targets], pair.source.pool.array[sources])
        index = 1
        while live_group_or_none(pair.decode) in (None, first):
            await move(pair, transfer, index)
            index += 1
        await transport(pair.decode).warm_up(pair.source.address)
        before = num_pieces_by_stream(transfer)
        await move(pair, transfer, index)
        assert num_pieces_by_stream(transfer) == before > 0
        await transfer.close()

    world.run(story, 40, MIB, 4)


def live_group_or_none(worker: Worker) -> LiveGroup | None:
    (link,) = transport(worker)._links.values()
    return link._live


def test_a_group_that_is_dropped_while_it_is_built(world: World) -> None:
    async def story(pair: Pair) -> None:
        accepted = pair.source.transports.choose(pair.decode.transports.offers())
        receiver = await pair.decode.transports.connect(accepted.choice, pair.source.address)
        transfer = Transfer(accepted.sender, receiver, accepted.choice)
        live_group(pair.decode).retire()
        await move(pair, transfer, 0)
        assert num_pieces_by_stream(transfer) == 1
        await transfer.close()

    world.run(story)


# As many groups as a worker may have


def test_an_idle_group_makes_room(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "MAX_GROUPS", 1)

    async def story(pair: Pair) -> None:
        other = Pair(world, 40, 1536, 3, "-other")
        await other.start()
        first = await pair.open()
        await move(pair, first, 0)
        second = await open_transfer(other.source, pair.decode)
        ids = block_ids(2, 40, 1)
        assert await second.receiver.receive(await second.sender.send(0, 0, ids, pair.all_layers), ids)
        assert num_pieces_by_stream(second) == 1  # the first is in use
        await first.close()
        await second.close()
        third = await open_transfer(pair.source, other.decode)  # nor has the source room for another
        assert await third.receiver.receive(await third.sender.send(0, 0, ids, pair.all_layers), ids)
        assert transport(pair.source).num_groups <= 1
        assert transport(pair.decode).num_groups <= 1
        await third.close()
        await other.close()

    world.run(story)


class Idle:
    def __init__(self, budget: GroupBudget, idle: bool = True):
        self.idle, self.retired, self._budget = idle, False, budget

    def retire(self) -> None:
        self.retired = True
        self._budget.leave(self)


def test_the_one_idle_longest_is_retired() -> None:
    budget = GroupBudget(3)
    busy, old, used = Idle(budget, idle=False), Idle(budget), Idle(budget)
    assert budget.enter(busy)
    assert budget.enter(used)
    assert budget.enter(old)
    budget.touch(used)
    assert budget.enter(Idle(budget, idle=False))
    assert old.retired
    assert budget.enter(Idle(budget, idle=False))
    assert used.retired
    assert not budget.enter(Idle(budget))
    assert not busy.retired
    assert len(budget) == 3


# Peers that die or freeze

DECODE = """
import asyncio, sys
from pdserve.contract.messages import TransportChoice
from tests.contract.transport_pair import WORLDS, Pair, World

async def main(address, transfer_id, source_id):
    pair = Pair(World(*WORLDS["process_group"]), 40, 1 << 20, 4)
    choice = TransportChoice("process_group", "", transfer_id=transfer_id, endpoint=source_id.encode())
    receiver = await pair.decode.transports.connect(choice, address)
    await pair.decode.transport.warm_up(address)
    print("connected", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    arrival = receiver._link.want(transfer_id, 0, [2 << 20] * 20)
    await arrival.next_piece()
    print("arrived", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""


@contextlib.asynccontextmanager
async def decode_process(pair: Pair) -> AsyncIterator[tuple[asyncio.subprocess.Process, Transfer]]:
    """A decode worker in a process of its own, in the middle of its first segment."""
    accepted = pair.source.transports.choose(pair.decode.transports.offers())
    arguments = (pair.source.address, accepted.choice.transfer_id, accepted.choice.endpoint.decode())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", DECODE, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert await process.stdout.readline() == b"connected\n"
        ids = block_ids(40, 40, 1)
        await accepted.sender.send(0, 0, ids, pair.all_layers)
        process.stdin.write(b"sent\n")
        assert await process.stdout.readline() == b"arrived\n"
        yield process, Transfer(accepted.sender, accepted.sender, accepted.choice)  # type: ignore[arg-type]
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await accepted.sender.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_decode_process_that_dies_or_freezes(world: World, how: signal.Signals) -> None:
    """The source gives it up, keeps nothing of it and serves others."""

    async def story(pair: Pair) -> None:
        async with decode_process(pair) as (process, transfer):
            os.kill(process.pid, how)
            with pytest.raises(StreamBroken):
                await send_without_end(transfer, pair)
            assert transport(pair.source).num_groups == 0
            after = await pair.open()
            await move(pair, after, 0)
            assert num_pieces_by_stream(after) == 0
            await after.close()

    world.run(story, 40, MIB, 4)


SOURCE = """
import asyncio
from tests.contract.transport_pair import WORLDS, Pair, World, block_ids
from pdserve.contract.messages import TransportOffer

async def main():
    pair = Pair(World(*WORLDS["process_group"]), 40, 1 << 20, 4)
    await pair.source.start()
    accepted = pair.source.transports.choose(pair.decode.transports.offers())
    choice = accepted.choice
    print(pair.source.address, choice.transfer_id, choice.endpoint.decode(), flush=True)
    await accepted.sender.send(0, 0, block_ids(40, 40, 1), pair.all_layers)
    print("sent", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_source_process_that_dies_or_freezes(world: World, how: signal.Signals) -> None:
    async def story(pair: Pair) -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", SOURCE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        try:
            address, transfer_id, source_id = (await process.stdout.readline()).decode().split()
            choice = TransportChoice(
                "process_group", "", transfer_id=transfer_id, endpoint=source_id.encode()
            )
            receiver = await pair.decode.transports.connect(choice, address)
            assert isinstance(receiver, process_group._Receiver)
            await transport(pair.decode).warm_up(address)
            assert await process.stdout.readline() == b"sent\n"
            arrival = receiver._link.want(transfer_id, 0, [2 * MIB] * 20)
            await arrival.next_piece()
            os.kill(process.pid, how)
            with pytest.raises(StreamBroken):
                await take_all(arrival)
            await receiver.close()
            assert transport(pair.decode).num_groups == 0
        finally:
            process.kill()
            await process.wait()

    world.run(story, 40, MIB, 4)


async def send_without_end(transfer: Transfer, pair: Pair) -> None:
    while True:
        await transfer.sender.send(1, 0, block_ids(40, 40, 1), pair.all_layers)


async def take_all(arrival: Arrival) -> None:
    while True:
        await arrival.next_piece()


# What is refused


@pytest.mark.parametrize("endpoint", [b"", b"[]", b"{", b'["gloo"]', b"\xff"])
def test_an_offer_that_is_not_understood(world: World, endpoint: bytes) -> None:
    async def story(pair: Pair) -> None:
        answer = transport(pair.source).accept(TransportOffer("process_group", endpoint=endpoint))
        assert isinstance(answer, Declined)
        assert "not understood" in answer.reason

    world.run(story)


def test_a_gpu_and_a_cpu_have_no_group(world: World) -> None:
    async def story(pair: Pair) -> None:
        answer = transport(pair.source).accept(TransportOffer("process_group", endpoint=b'["nccl", "GPU-1"]'))
        assert isinstance(answer, Declined)
        assert "GPU" in answer.reason

    world.run(story)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff",
        b"[]",
        b'["Nobody"]',
        b'["Build"]',
        b'["Build", "1"]',
        b'["Build", true]',
        b'["Build", 1, 2]',
        b'["Want", "t", 0, 0, ["1"], 0]',
        b"[" * 100_000,
        End(),
    ],
)
def test_what_is_not_a_message_of_a_link(raw: object) -> None:
    with pytest.raises(ProtocolViolation):
        decode(raw)


@pytest.mark.parametrize(
    "lie",
    [
        b"no message",
        encode(Hello("127.0.0.1")),
        encode(Want("nobody's", 0, 0, [1 << 60], 0)),
        encode(Want("nobody's", 0, 0, [-1], 0)),
    ],
)
def test_a_link_that_lies_breaks_alone(world: World, lie: bytes) -> None:
    async def story(pair: Pair) -> None:
        transfer = await pair.open()
        stream = await pair.decode.side.rpc.open(pair.source.address, Call.KV)
        await stream.send(greet("process_group", encode(Hello("127.0.0.1"))))
        await stream.send(lie)
        *_, end = await receive_all(stream)
        assert isinstance(end, End)
        assert end.error is not None
        assert end.error.code is ErrorCode.PROTOCOL
        await move(pair, transfer, 0)
        await transfer.close()

    world.run(story)


def test_a_group_that_is_proposed_by_nobody(world: World) -> None:
    """Whoever proposes one and then builds none leaves nothing behind."""

    async def story(pair: Pair) -> None:
        stream = await pair.decode.side.rpc.open(pair.source.address, Call.KV)
        await stream.send(greet("process_group", encode(Hello("127.0.0.1"))))
        for generation in range(1, 4):
            await stream.send(encode(Build(generation)))
        await stream.receive()
        stream.cancel()

    world.run(story)
