"""Which transport a pair of workers uses, and why."""

import dataclasses
import os

import pytest

from pdserve.contract.errors import ConfigError, ProtocolViolation, StreamBroken, Unavailable
from pdserve.contract.messages import TransportChoice, TransportOffer
from pdserve.handoff.transports.negotiation import DEFAULT_ORDER, Transports
from tests.contract.transport_pair import (
    WORLDS,
    MemoryFilePool,
    Pair,
    World,
)


@pytest.fixture
def shared_memory() -> World:
    return World(*WORLDS["shared_memory"])


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


def test_layers_without_whole_lanes_are_refused() -> None:
    async def story(pair: Pair) -> None:
        with pytest.raises(ConfigError, match="block_size"):
            dataclasses.replace(pair.source.side, num_layers=7)

    World(*WORLDS["grpc-virtual"]).run(story)
