"""What one seed means: the shape of the system, the requests, and the faults that are meant to strike."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from decode_worker.request import Phase
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from router.requests import GenerateRequest
from tests.simulation.coverage import POSSIBLE, STATES, Combination, Stage

BLOCK_SIZE = 4
NUM_REQUESTS = 20
NUM_FAULTS = 5
"""At least, each."""

ARRIVALS_S = 0.4
"""Requests come within this time, and faults are aimed from somewhere in it on."""

NATURAL = ("resumed", "healed", "deadline", "preempted", "client too slow")
"""Events that follow from others or from what is asked, and that nobody aims."""

EOS_TOKENS = tuple(range(20))
"""Of 1000: some requests end before their max_tokens."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of one client."""

    at_s: float
    router: int
    request: GenerateRequest
    read_pause_s: float
    """After each reading."""
    max_unread_tokens: int


@dataclass(frozen=True, slots=True)
class Aim:
    """A fault, and whom it is to meet; after `patience_s` it meets anybody."""

    at_s: float
    at: Combination
    patience_s: float


@dataclass(frozen=True, slots=True)
class Scenario:
    num_blocks: int
    """Of each worker's pool."""
    latency_s: float
    """Longest time that a message takes."""
    late_s: float
    """Longest time by which steps and copies are late."""
    window_segments: int
    max_segment_blocks: int
    members_from_s: float
    """When the routers learn of the workers; until then requests wait."""
    prefill_from_s: float
    """When they learn of the prefill workers; until then decode workers compute prompts."""
    asked: Sequence[Asked]
    aims: Sequence[Aim]


def draw_scenario(random: Random) -> Scenario:
    """The same for the same state of `random`."""
    num_blocks = random.choice((12, 16, 24))
    aims = [_draw_aim(random) for _ in range(NUM_FAULTS + random.randrange(4))]
    aimed_states = {aim.at.state for aim in aims}
    return Scenario(
        num_blocks=num_blocks,
        latency_s=random.choice((0.0, 0.0, 0.001, 0.004)),
        late_s=random.choice((0.0, 0.001, 0.004)),
        window_segments=random.randrange(1, 4),
        max_segment_blocks=random.randrange(1, 4),
        members_from_s=0.2 if Stage.WAITING in aimed_states else 0.0,
        prefill_from_s=0.5 if Phase.PREFILLING in aimed_states else 0.0,
        asked=[_draw_asked(random, index, num_blocks) for index in range(NUM_REQUESTS + random.randrange(4))],
        aims=aims,
    )


def _draw_asked(random: Random, index: int, num_blocks: int) -> Asked:
    is_slow = random.random() < 0.06
    return Asked(
        at_s=random.random() * ARRIVALS_S,
        router=random.randrange(2),
        request=_draw_request(random, index, num_blocks),
        read_pause_s=0.15 if is_slow else 0.0,
        max_unread_tokens=2 if is_slow else 64,
    )


def _draw_request(random: Random, index: int, num_blocks: int) -> GenerateRequest:
    max_tokens = random.choice((1, 2, 6, 6, 14))
    length = random.randrange(1, min(34, num_blocks * BLOCK_SIZE - max_tokens))
    shared = random.choice((0, 0, 9, 18, 27))  # leading tokens of one of two common prompts
    prompt = _prompt(random.randrange(2), min(shared, length)) + _prompt(100 + index, max(0, length - shared))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=random.choice((0.0, 1.0)))
    deadline_s = random.random() * 0.3 if random.random() < 0.08 else None
    return GenerateRequest(pack_tokens(prompt), sampling, seed=index, deadline_s=deadline_s)


def _prompt(which: int, length: int) -> list[int]:
    return [20 + (which * 7919 + place * 104729) % 979 for place in range(length)]


def _draw_aim(random: Random) -> Aim:
    role = random.choice(tuple(STATES))
    return Aim(random.random() * ARRIVALS_S, random.choice(_AIMABLE[role]), patience_s=0.3)


_AIMABLE = {
    role: [at for at in POSSIBLE if at.role == role and not at.event.endswith(NATURAL)] for role in STATES
}
