"""Which faults have met whom in which state: every (role, state, event) that is possible, counted.

The states are those of `decode_worker.request.Phase` and `pdserve.handoff.prefill_job.JobState`; a router's
request is waiting for a placement, submitted, or streaming. An event is what happens to the process that
something lives in ("killed"), to a peer of it ("source frozen"), to the stream that serves it ("Prefill
drop") or to the request itself ("client left").
"""

from collections import Counter
from collections.abc import Iterable
from enum import StrEnum
from itertools import product
from typing import NamedTuple

from decode_worker.request import Phase
from pdserve.handoff.prefill_job import JobState

PROCESS_FAULTS = ("killed", "frozen", "resumed", "hung", "failed")
LINK_FAULTS = ("cut off", "healed")
MESSAGE_FAULTS = ("drop", "delay", "duplicate", "reorder", "corrupt")


class Stage(StrEnum):
    """Where a request is, as its router sees it."""

    WAITING = "waiting"
    SUBMITTED = "submitted"
    STREAMING = "streaming"


class Combination(NamedTuple):
    """Something of `role` that is in `state` is met by `event`."""

    role: str
    state: str
    event: str


STATES: dict[str, tuple[str, ...]] = {
    "router": tuple(Stage),
    "decode": tuple(phase for phase in Phase if phase is not Phase.ENDED),
    "prefill": tuple(JobState),
}


def _of(who: str, faults: Iterable[str]) -> list[str]:
    return [f"{who} {fault}" for fault in faults]


EVENTS: dict[str, tuple[str, ...]] = {
    "router": (
        *PROCESS_FAULTS[:3],
        *_of("decode", PROCESS_FAULTS + LINK_FAULTS),
        *_of("prefill", PROCESS_FAULTS),
        *_of("Session", MESSAGE_FAULTS),
        *_of("Watch", MESSAGE_FAULTS),
        *_of("members", ("late", "doubled")),
        "client left",
        "client too slow",
        "deadline",
    ),
    "decode": (
        *PROCESS_FAULTS,
        "slow copies",
        *_of("router", PROCESS_FAULTS[:3] + LINK_FAULTS),
        *_of("source", PROCESS_FAULTS + LINK_FAULTS),
        *_of("Session", MESSAGE_FAULTS),
        *_of("Prefill", MESSAGE_FAULTS),
        *_of("Kv", MESSAGE_FAULTS),
        "client left",
        "deadline",
        "preempted",
    ),
    "prefill": (
        *PROCESS_FAULTS,
        "slow copies",
        *_of("taker", PROCESS_FAULTS + LINK_FAULTS),
        *_of("Prefill", MESSAGE_FAULTS),
        *_of("Kv", MESSAGE_FAULTS),
        "client left",
        "deadline",
        "preempted",
    ),
}


class Exclusion(NamedTuple):
    """Combinations that cannot be, and why."""

    role: str
    states: tuple[str, ...]
    events: tuple[str, ...]
    reason: str


EXCLUSIONS = (
    Exclusion(
        "router",
        (Stage.WAITING,),
        (
            *_of("decode", PROCESS_FAULTS + LINK_FAULTS),
            *_of("prefill", PROCESS_FAULTS),
            *_of("Session", MESSAGE_FAULTS),
            *_of("Watch", MESSAGE_FAULTS),
        ),
        "it has no worker",
    ),
    Exclusion(
        "router",
        (Stage.WAITING, Stage.SUBMITTED),
        ("client too slow",),
        "that is noticed when a token comes",
    ),
    Exclusion(
        "decode",
        (Phase.PREFILLING, Phase.DECODING),
        (
            *_of("source", PROCESS_FAULTS + LINK_FAULTS),
            *_of("Kv", MESSAGE_FAULTS),
            "slow copies",
        ),
        "nothing is fetched any more, or ever was",
    ),
    Exclusion("decode", (Phase.PREFILLING,), tuple(_of("Prefill", MESSAGE_FAULTS)), "nothing is fetched"),
    Exclusion("decode", (Phase.WAITING,), tuple(_of("Kv", MESSAGE_FAULTS)), "no transport is agreed on yet"),
    Exclusion("decode", (Phase.WAITING,), ("slow copies",), "nothing is copied yet"),
    Exclusion("decode", (Phase.WAITING,), ("preempted",), "it only loses its pins"),
    Exclusion("prefill", (JobState.QUEUED, JobState.STARTING), ("slow copies",), "nothing is copied yet"),
    Exclusion("prefill", (JobState.QUEUED,), tuple(_of("Prefill", MESSAGE_FAULTS)), "nothing is said then"),
    Exclusion("prefill", (JobState.QUEUED,), tuple(_of("Kv", MESSAGE_FAULTS)), "no bytes travel then"),
    Exclusion(
        "prefill", (JobState.QUEUED, JobState.STARTING), ("preempted",), "the decode worker reserves later"
    ),
)


def _is_possible(combination: Combination) -> bool:
    return not any(
        combination.role == exclusion.role
        and combination.state in exclusion.states
        and combination.event in exclusion.events
        for exclusion in EXCLUSIONS
    )


POSSIBLE: tuple[Combination, ...] = tuple(
    combination
    for role in STATES
    for state, event in product(STATES[role], EVENTS[role])
    if _is_possible(combination := Combination(role, str(state), event))
)


class Coverage:
    """How often each combination was met."""

    def __init__(self) -> None:
        self.hits: Counter[Combination] = Counter()

    def note(self, role: str, state: str, event: str) -> None:
        self.hits[Combination(role, str(state), event)] += 1

    def missing(self, min_hits: int) -> list[Combination]:
        """The possible combinations that were met less often."""
        return [combination for combination in POSSIBLE if self.hits[combination] < min_hits]

    def table(self) -> str:
        """One table per role; `-` is impossible (see the reasons below it)."""
        return "\n\n".join(self._table_of(role) for role in STATES)

    def _table_of(self, role: str) -> str:
        states = STATES[role]
        lines = [f"{role:<20}" + "".join(f"{state:>12}" for state in states)]
        for event in EVENTS[role]:
            cells = (self._cell(Combination(role, str(state), event)) for state in states)
            lines.append(f"{event:<20}" + "".join(f"{cell:>12}" for cell in cells))
        for exclusion in EXCLUSIONS:
            if exclusion.role == role:
                lines.append(
                    f"- {', '.join(exclusion.states)}: {', '.join(exclusion.events)}: {exclusion.reason}"
                )
        return "\n".join(lines)

    def _cell(self, combination: Combination) -> str:
        return str(self.hits[combination]) if combination in _POSSIBLE else "-"


_POSSIBLE = frozenset(POSSIBLE)
