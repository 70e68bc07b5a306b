"""Messages that get lost, come twice or out of order although their stream stays whole: a bug somewhere, or a
network that does not keep its promises. Nobody waits for ever, no token is wrong, and nothing is left."""

import asyncio

import pytest

from pdserve.contract.messages import (
    Ack,
    Busy,
    Cancel,
    End,
    Failed,
    FirstToken,
    Frame,
    Hello,
    Holding,
    PrefillOpen,
    Report,
    Reserved,
    Sealed,
    Segment,
    SessionOpen,
    SessionReady,
    Starting,
    Submit,
    WatchOpen,
    Working,
)
from pdserve.contract.ports import Call, Rpc
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import StepCost
from pdserve.rpc.stream import Direction
from router.requests import GenerateRequest
from tests.journeys.test_faults_in_memory import prompt_of, run_virtual, until
from tests.lossy_rpc import LossyRpc, Mischief, Target
from tests.memory_system import MemorySystem, greedy

UP, DOWN = Direction.UP, Direction.DOWN
TRAVELS: list[tuple[type, Call, Direction, int]] = [
    (SessionOpen, Call.SESSION, UP, 1),
    (SessionReady, Call.SESSION, DOWN, 1),
    (Submit, Call.SESSION, UP, 1),
    (Submit, Call.SESSION, UP, 3),
    (Cancel, Call.SESSION, UP, 1),
    (Frame, Call.SESSION, DOWN, 1),
    (Frame, Call.SESSION, DOWN, 7),
    (Failed, Call.SESSION, DOWN, 1),
    (Holding, Call.SESSION, DOWN, 1),
    (WatchOpen, Call.WATCH, UP, 1),
    (Hello, Call.WATCH, DOWN, 1),
    (Report, Call.WATCH, DOWN, 1),
    (Report, Call.WATCH, DOWN, 4),
    (PrefillOpen, Call.PREFILL, UP, 1),
    (Starting, Call.PREFILL, DOWN, 1),
    (Starting, Call.PREFILL, DOWN, 2),
    (Reserved, Call.PREFILL, UP, 1),
    (Busy, Call.PREFILL, UP, 1),
    (Segment, Call.PREFILL, DOWN, 1),
    (Segment, Call.PREFILL, DOWN, 3),
    (Ack, Call.PREFILL, UP, 1),
    (Ack, Call.PREFILL, UP, 4),
    (FirstToken, Call.PREFILL, DOWN, 1),
    (Sealed, Call.PREFILL, DOWN, 1),
    (Working, Call.PREFILL, DOWN, 1),
    (End, Call.PREFILL, UP, 1),
    (End, Call.PREFILL, DOWN, 1),
    (bytes, Call.KV, UP, 1),
    (bytes, Call.KV, DOWN, 1),
    (bytes, Call.KV, DOWN, 2),
]
CASES = [
    pytest.param(mischief, *travels, id=f"{mischief}-{travels[0].__name__}-{travels[2]}-{travels[3]}")
    for travels in TRAVELS
    for mischief in Mischief
    if travels[0] is not End or mischief is Mischief.LOSE  # nothing follows an End
]


class LossySystem(MemorySystem):
    """Two workers of each role; steps are slow enough for signs of life, and the pools are tight."""

    def __init__(self, target: Target) -> None:
        self.target = target
        cost = StepCost(0.02, per_prefill_token_s=0.002, per_decode_sequence_s=0.0)
        super().__init__(num_prefill=1, num_decode=2, num_blocks=50, cost=cost)

    def rpc_of(self, name: str) -> Rpc:
        return LossyRpc(super().rpc_of(name), self.target)

    async def until_ready(self) -> None:
        """As soon as one of each role can be used: what was lost may keep the others away for a while."""
        await until(lambda: self.router.readiness().ready)

    async def leave_soon(self, prompt: list[int]) -> None:
        """A client that goes away after some tokens; so there is a Cancel."""
        request = GenerateRequest(pack_tokens(prompt), greedy(60), seed=7)
        deltas = self.router.generate(self.router.new_request_id(), request)
        for _ in range(3):
            await anext(deltas)
        await deltas.aclose()


async def serve_much(system: MemorySystem) -> None:
    """Long prompts that need all the room, so there are Busy and Failed, too."""
    prompts = [prompt_of(48 + 8 * i, seed=i) for i in range(8)]
    tasks = [asyncio.create_task(system.generate(prompt, greedy(40))) for prompt in prompts]
    for prompt, task in zip(prompts, tasks, strict=True):
        assert await task == system.expected(prompt, greedy(40))


@pytest.mark.parametrize(("mischief", "kind", "call", "direction", "nth"), CASES)
def test_a_message_that_does_not_arrive_once_and_in_order(
    mischief: Mischief, kind: type, call: Call, direction: Direction, nth: int
) -> None:
    async def story() -> None:
        target = Target(mischief, kind, direction, call, nth)
        async with LossySystem(target) as system:
            await asyncio.gather(serve_much(system), system.leave_soon(prompt_of(30, seed=99)))
            await system.clock.sleep(15)
            assert target.hit, f"there was no {kind.__name__} number {nth}"
            await system.at_rest()

    run_virtual(story(), at_most_s=120)
