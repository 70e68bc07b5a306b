"""Messages that suffer what `faults` can do to them: the tokens stay the same and nothing is left."""

import asyncio
from typing import Any

import pytest

from pdserve.config import FaultConfig
from pdserve.contract.ports import Rpc
from pdserve.faults import Faults, FaultyRpc
from pdserve.handoff.sending import SendingSettings
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual
from tests.memory_system import MemorySystem, WorkerSettings, greedy

TO_DECODE = ("Starting", "Segment", "FirstToken", "Sealed")
TO_PREFILL = ("PrefillOpen", "Reserved", "Ack")


class RehearsingSystem(MemorySystem):
    """Two pairs; each worker's faults can be armed."""

    def __init__(self) -> None:
        self.faults: dict[str, Faults] = {}
        sending = SendingSettings(max_segment_bytes=1)
        super().__init__(2, 2, settings=WorkerSettings(sending=sending, transports=("grpc",)))

    def rpc_of(self, name: str) -> Rpc:
        self.faults[name] = Faults()
        return FaultyRpc(super().rpc_of(name), self.faults[name], self.clock)

    def arm(self, pool: str, **fields: Any) -> None:
        for name, faults in self.faults.items():
            if name.startswith(pool):
                faults.arm(FaultConfig(process=name, **fields))


async def rehearse(pool: str, **fields: Any) -> RehearsingSystem:
    async with RehearsingSystem() as system:
        system.arm(pool, **fields)
        prompts = [prompt_of(30 + i, seed=i) for i in range(6)]
        answers = await asyncio.gather(*[system.generate(p, greedy(12)) for p in prompts])
        assert answers == [system.expected(p, greedy(12)) for p in prompts]
        await system.at_rest()
    return system


# Streams neither lose nor reorder; with messages that nobody asks for again that is not tried.
ONCE = ("PrefillOpen", "Sealed")


def combinations(messages: tuple[str, ...], *actions: str) -> list[tuple[str, str]]:
    pairs = [(message, do) for message in messages for do in actions]
    return [(message, do) for message, do in pairs if message not in ONCE or do not in ("lose", "swap")]


@pytest.mark.parametrize(
    ("message", "do"), combinations(TO_DECODE, "lose", "repeat", "swap", "delay", "break", "cut")
)
def test_what_comes_to_the_decode_worker(message: str, do: str) -> None:
    seconds = {"seconds": 1.0} if do in ("delay", "cut") else {}
    run_virtual(rehearse("decode", at=f"received {message}", do=do, nth=2, **seconds), at_most_s=60)


@pytest.mark.parametrize(
    ("message", "do"), combinations(TO_PREFILL, "lose", "repeat", "swap", "delay", "break")
)
def test_what_comes_to_the_prefill_worker(message: str, do: str) -> None:
    seconds = {"seconds": 1.0} if do == "delay" else {}
    run_virtual(rehearse("prefill", at=f"received {message}", do=do, nth=2, **seconds), at_most_s=60)


@pytest.mark.parametrize("event", ["received Kv", "received Segment"])
def test_a_flipped_bit_is_noticed_and_sent_again(event: str) -> None:
    async def story() -> None:
        system = await rehearse("decode", at=event, do="corrupt", nth=2)
        assert sum(system.metric(f"prefill-{i}", "segments_resent_total") for i in range(2)) == 2

    run_virtual(story(), at_most_s=60)
