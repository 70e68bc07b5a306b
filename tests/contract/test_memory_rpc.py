"""What only the network in memory has: virtual time, and things that can be made to go wrong."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pdserve.clock import VirtualClock, run_virtual
from pdserve.contract.errors import StreamBroken
from pdserve.contract.ids import Incarnation, RouterId
from pdserve.contract.messages import End, Message, SessionOpen, SessionReady
from pdserve.contract.ports import Call, MessageStream, RpcServer
from pdserve.rpc.channel import PEER_LOST_S
from pdserve.rpc.memory_rpc import Arrival, Leg, MemoryNetwork, MemoryRpc

OPEN = SessionOpen(RouterId("router-0"), Incarnation(1), Incarnation(2))
READY = SessionReady(Incarnation(2))


class Stage:
    """A router with an open stream to a worker whose handler answers, and how that handler ended."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.network = MemoryNetwork()
        self.router = MemoryRpc(self.network, "router")
        self.worker = MemoryRpc(self.network, "worker")
        self.handler_ended: dict[str, float] = {}

    async def serve(self, address: str = "worker:1") -> RpcServer:
        return await self.worker.serve(address, {Call.SESSION: self._answer})

    async def open(self, address: str = "worker:1") -> MessageStream:
        stream = await self.router.open(address, Call.SESSION)
        await stream.send(OPEN)
        assert await stream.receive() == READY
        return stream

    async def broken_at(self, stream: MessageStream) -> float:
        with pytest.raises(StreamBroken):
            await stream.receive()
        return self.clock.now()

    async def _answer(self, stream: MessageStream) -> None:
        try:
            while not isinstance(await stream.receive(), End):
                await stream.send(READY)
            await stream.send(End())
        except (StreamBroken, asyncio.CancelledError) as failure:
            self.handler_ended[type(failure).__name__] = self.clock.now()
            raise


def play(story: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        stage = Stage()
        await stage.serve()
        await story(stage)

    run_virtual(main())


def test_messages_are_passed_as_they_are() -> None:
    async def story(stage: Stage) -> None:
        received: list[Message] = []

        async def serve(stream: MessageStream) -> None:
            received.append(await stream.receive())
            await stream.send(End())

        server = await stage.worker.serve("worker:0", {Call.SESSION: serve})
        stream = await stage.router.open(server.address, Call.SESSION)
        await stream.send(OPEN)
        await stream.receive()
        assert received[0] is OPEN

    play(story)


def test_latency_delays_each_direction_and_keeps_the_order() -> None:
    def latency(source: str, target: str, message: Message | None) -> float:
        return {"router": 0.25, "worker": 0.5}[source] if message is not None else 0.0

    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.latency = latency
        for _ in range(3):
            await stream.send(OPEN)
        stage.network.latency = lambda *_: 0.125
        await stream.send(End())  # sent later with less latency: it does not overtake
        assert [await stream.receive() for _ in range(4)] == [READY, READY, READY, End()]
        assert stage.clock.now() == 0.375

    play(story)


def test_a_killed_worker_breaks_its_streams_and_can_be_replaced() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.kill("worker:1")
        assert await stage.broken_at(stream) == 0
        assert await stage.broken_at(await stage.router.open("worker:1", Call.SESSION)) == 0
        await stage.clock.sleep(0)
        assert stage.handler_ended == {"StreamBroken": 0}
        await stage.serve()
        await stage.open()

    play(story)


def test_a_killed_router_breaks_its_streams_at_the_worker() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.latency = lambda *_: 1.0
        stage.network.kill("router")
        assert await stage.broken_at(stream) == 0
        await stage.clock.sleep(2)
        assert stage.handler_ended == {"StreamBroken": 1.0}

    play(story)


def test_a_cut_is_noticed_by_both_sides_after_the_keepalive() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        other = MemoryRpc(stage.network, "other-router")
        untouched = await other.open("worker:1", Call.SESSION)
        stage.network.cut("router", "worker:1")
        await stream.send(OPEN)  # lost on the way
        assert await stage.broken_at(await stage.router.open("worker:1", Call.SESSION)) == 0
        assert await stage.broken_at(stream) == PEER_LOST_S
        await stage.clock.sleep(0)
        assert stage.handler_ended == {"StreamBroken": PEER_LOST_S}
        await untouched.send(End())
        assert await untouched.receive() == End()

    play(story)


def test_a_cut_that_heals_in_time_only_delays() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.cut("router", "worker")
        await stream.send(OPEN)
        await stream.send(OPEN)
        await stage.clock.sleep(PEER_LOST_S - 1)
        stage.network.heal("worker", "router")
        assert [await stream.receive() for _ in range(2)] == [READY, READY]
        await stage.clock.sleep(PEER_LOST_S)
        await stream.send(End())
        assert await stream.receive() == End()
        await stage.open()

    play(story)


def test_a_stream_cancelled_during_a_cut_reaches_the_other_side_later() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.cut("router", "worker")
        stream.cancel()
        await stage.clock.sleep(1)
        assert not stage.handler_ended
        await stage.clock.sleep(PEER_LOST_S)
        assert stage.handler_ended == {"StreamBroken": PEER_LOST_S}

    play(story)


def test_a_frozen_host_answers_late_when_it_is_resumed_in_time() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.freeze("worker")
        await stream.send(OPEN)
        await stage.clock.sleep(PEER_LOST_S / 2)
        stage.network.thaw("worker")
        assert await stream.receive() == READY
        await stage.clock.sleep(2 * PEER_LOST_S)
        assert stage.handler_ended == {}
        stream.cancel()

    play(story)


def test_a_host_that_stays_frozen_is_given_up_and_hears_of_it_when_it_is_resumed() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.freeze("worker")
        late = await stage.router.open("worker:1", Call.SESSION)
        assert await stage.broken_at(stream) == PEER_LOST_S
        assert await stage.broken_at(late) == PEER_LOST_S
        await stage.clock.sleep(1)
        assert stage.handler_ended == {}
        stage.network.thaw("worker")
        await stage.clock.sleep(0)
        await stage.clock.sleep(1)
        assert stage.handler_ended == {"StreamBroken": PEER_LOST_S + 1}

    play(story)


def test_a_killed_process_opens_no_stream_and_a_new_one_on_its_host_does() -> None:
    async def story(stage: Stage) -> None:
        stage.network.kill("router")
        await stage.broken_at(await stage.router.open("worker:1", Call.SESSION))
        stage.router = MemoryRpc(stage.network, "router")
        (await stage.open()).cancel()

    play(story)


def _carried(*fates: list[Arrival]) -> Callable[[Leg, Message], list[Arrival]]:
    """The n-th message fares as the n-th of `fates`, later ones arrive at once."""
    remaining = list(fates)

    def carry(leg: Leg, message: Message) -> list[Arrival]:
        return remaining.pop(0) if remaining else [Arrival(0.0, message)]

    return carry


async def _received(receiver: MessageStream, count: int) -> list[Message]:
    return [await receiver.receive() for _ in range(count)]


@pytest.mark.parametrize(
    ("first", "arrive"),
    [
        ([], [b"2", b"3"]),
        ([Arrival(0.0, b"1"), Arrival(0.1, b"1")], [b"1", b"1", b"2"]),
        ([Arrival(0.1, b"1")], [b"1", b"2", b"3"]),
        ([Arrival(0.1, b"1", in_order=False)], [b"2", b"3", b"1"]),
        ([Arrival(0.0, b"0")], [b"0", b"2", b"3"]),
    ],
    ids=["dropped", "doubled", "late", "overtaken", "changed"],
)
def test_messages_fare_as_the_carriage_says(first: list[Arrival], arrive: list[bytes]) -> None:
    async def main() -> None:
        network = MemoryNetwork(carriage=_carried(first))
        received: list[Message] = []

        async def serve(stream: MessageStream) -> None:
            received.extend(await _received(stream, len(arrive)))
            await stream.send(End())

        await MemoryRpc(network, "worker").serve("worker:1", {Call.KV: serve})
        stream = await MemoryRpc(network, "router").open("worker:1", Call.KV)
        for message in (b"1", b"2", b"3"):
            await stream.send(message)
        assert await stream.receive() == End()
        assert received == arrive
        stream.cancel()

    run_virtual(main())


def test_what_cannot_be_decoded_breaks_the_stream_at_both_sides() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.carriage = _carried([Arrival(0.0, None)])
        await stream.send(OPEN)
        await stage.broken_at(stream)
        await stage.clock.sleep(0)
        assert stage.handler_ended == {"StreamBroken": 0.0}

    play(story)


def test_messages_that_are_lost_leave_room_for_others() -> None:
    async def story(stage: Stage) -> None:
        stream = await stage.open()
        stage.network.carriage = lambda leg, message: []
        for _ in range(100):
            await stream.send(OPEN)
        stream.cancel()

    play(story)
