"""What must survive, row by row, and how it is provoked at each state of the protocol on the real system."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tests.faults.rehearsal import Case

ROWS = {
    "client": "client disconnects, cancels, or its deadline passes, in any phase",
    "prefill killed": "prefill worker killed: queued, mid-chunk, sealed, after the end",
    "decode killed": "decode worker killed: reserved, receiving, decoding token n",
    "engine": "engine hung or failed",
    "router": "router killed",
    "session": "a Session with 500 streams breaks",
    "controller": "controller killed",
    "restarted": "worker restarted at the same address",
    "frozen": "worker frozen (SIGSTOP), resumed later",
    "cut": "network cut between prefill and decode only",
    "segments": "corrupted, missing, duplicated, reordered segment",
    "room": "no room at the decode worker",
    "no prefill": "all prefill workers gone",
    "no decode": "all decode workers gone",
    "poison": "poison request that kills workers",
    "head": "Ray head gone",
    "scale-in": "scale-in, and workers that are drained",
    "rollout": "rollout: every worker replaced by one with another configuration",
}

PREFILL_STATES = {
    "received PrefillOpen": "queued",
    "sent Starting": "about to start",
    "received Reserved": "reserved on both sides",
    "step": "computing a chunk",
    "sent Segment": "shipping",
    "sent FirstToken": "first token sent",
    "sent Sealed": "sealed",
    "sent End": "after the end",
}
"""Event -> what the prefill worker is doing then for the request."""
DECODE_STATES = {
    "received Submit": "submitted",
    "sent PrefillOpen": "waiting for its turn",
    "received Starting": "asked to reserve",
    "sent Reserved": "receiving",
    "received Segment": "receiving a segment",
    "received FirstToken": "first token received",
    "received Sealed": "sealed",
    "sent Frame": "decoding",
    "step": "computing a step",
}
FREEZE_S = 8.0
"""Longer than any side believes in a silent peer."""


def cases() -> list[Case]:
    """The whole matrix, in an order in which no process dies twice in a row."""
    # A cut keeps its pair out of use for a while, so cuts are kept apart.
    cuts = _cuts()
    found = [next(cuts), *_killed(), next(cuts), *_frozen(), next(cuts), *_engines(), next(cuts)]
    found += [*_segments(), *_pools(), *_rest()]
    return [_seeded(case, seed) for seed, case in enumerate(found)]


def one_case_per_row() -> list[Case]:
    """For continuous integration: what is cheap."""
    return [
        _killed_at("prefill", 0, "sent Segment", "shipping", 2),
        _killed_at("decode", 0, "sent Frame", "decoding", 4),
        _frozen_at("decode", 1, "received Segment", "receiving a segment", 1),
        _engine("prefill", 1, "fail"),
        _segment("corrupt"),
        _segment("repeat"),
        _cut_off(0, "received Segment", "receiving a segment"),
        _no_prefill(),
        _no_decode(),
        _session(100),
        _controller(),
        _router(),
    ]


def _killed() -> Iterator[Case]:
    for number, (event, state) in enumerate(PREFILL_STATES.items()):
        yield _killed_at("prefill", number % 2, event, state, 2)
    for number, (event, state) in enumerate(DECODE_STATES.items()):
        yield _killed_at("decode", number % 2, event, state, 2)


def _killed_at(pool: str, index: int, event: str, state: str, nth: int) -> Case:
    name = f"{pool}-{index}"
    fault = _fault(name, event, "kill", nth=nth)
    return Case(f"{pool} killed", f"{pool} worker killed at `{event}` ({state})", (fault,), (name,))


def _frozen() -> Iterator[Case]:
    for pool, states in (("prefill", PREFILL_STATES), ("decode", DECODE_STATES)):
        for number, (event, state) in enumerate(states.items()):
            yield _frozen_at(pool, number % 2, event, state, 2)


def _frozen_at(pool: str, index: int, event: str, state: str, nth: int) -> Case:
    fault = _fault(f"{pool}-{index}", event, "freeze", nth=nth, seconds=FREEZE_S)
    return Case("frozen", f"{pool} worker frozen for {FREEZE_S:g} s at `{event}` ({state})", (fault,))


def _engines() -> Iterator[Case]:
    for action in ("fail", "hang"):
        for pool in ("prefill", "decode"):
            yield _engine(pool, 0, action)
            yield _engine(pool, 1, action, nth=6)


def _engine(pool: str, index: int, action: str, nth: int = 2) -> Case:
    name = f"{pool}-{index}"
    happens = "fails" if action == "fail" else "hangs for ever"
    what = f"step {nth} of a {pool} worker {happens}"
    return Case("engine", what, (_fault(name, "step", action, nth=nth),), (name,))


def _segments() -> Iterator[Case]:
    for action in ("corrupt", "lose", "repeat", "swap"):
        yield _segment(action)


def _segment(action: str) -> Case:
    said = {"corrupt": "arrive corrupted", "lose": "are lost", "repeat": "come twice", "swap": "are swapped"}
    fault = _fault("decode", "received Segment", action, nth=3, count=2)
    return Case("segments", f"two segments {said[action]}", (fault,))


def _cuts() -> Iterator[Case]:
    for number, event in enumerate(
        ("sent PrefillOpen", "sent Reserved", "received Segment", "received Sealed")
    ):
        yield _cut_off(number % 2, event, DECODE_STATES[event])


def _cut_off(index: int, event: str, state: str) -> Case:
    fault = _fault(f"decode-{index}", event, "cut", nth=2, seconds=3.0)
    return Case(
        "cut", f"decode worker cut off from one prefill worker for 3 s at `{event}` ({state})", (fault,)
    )


def _pools() -> Iterator[Case]:
    yield _no_prefill()
    yield _no_decode()


def _no_prefill() -> Case:
    fault = _fault("prefill", "now", "kill")
    return Case("no prefill", "both prefill workers killed at once", (fault,), ("prefill-0", "prefill-1"))


def _no_decode() -> Case:
    fault = _fault("decode", "sent Frame", "kill", nth=3)
    return Case("no decode", "both decode workers killed while decoding", (fault,), ("decode-0", "decode-1"))


def _rest() -> Iterator[Case]:
    yield _session(500)
    yield _room()
    yield _controller()
    yield _router()


def _session(num_streams: int) -> Case:
    fault = _fault("router", "received Frame", "break", nth=30)
    return Case(
        "session",
        f"a Session breaks with {num_streams} requests in the system",
        (fault,),
        num_requests=num_streams,
        prompt=(10, 40),
        output=(10, 30),
    )


def _room() -> Case:
    """Three times what the pools of the decode workers hold."""
    return Case(
        "room", "600 requests for pools that hold 200", num_requests=600, prompt=(90, 110), output=(10, 20)
    )


def _controller() -> Case:
    return Case("controller", "controller killed under load", kills=("controller",))


def _router() -> Case:
    fault = _fault("router-0", "received Frame", "kill", nth=20)
    return Case("router", "router killed while it streams", (fault,), ("router-0",), clients_retry=True)


def _fault(process: str, at: str, do: str, **fields: Any) -> dict[str, Any]:
    return {"process": process, "at": at, "do": do, **fields}


def _seeded(case: Case, seed: int) -> Case:
    return replace(case, seed=seed)
