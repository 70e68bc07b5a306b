"""What a placement costs the router, and what its prefix index takes in and needs.

    python -m benchmarks.router --json results.json
    python -m benchmarks.router --smoke

One decision is all that the router does to place a prompt: see what is served, name its blocks, look them up,
choose by predicted seconds, book at both workers, and take the bookings back. Half of each prompt is held by
one prefill worker and a quarter of it by a decode worker; the others hold what others asked for. The index is
filled in events of 16 blocks, each of another prompt.

All times are of this thread's CPU, so that other processes on the machine only count as far as they take
caches and the core's other thread away. To tell how much that is, the time that it takes only to name a
prompt's blocks, a loop around a hash in C, is measured beside it: 35 us for 8K tokens on an idle core. A
stall is the longest single event. Medians of batches, alternating between sizes.
"""

import argparse
import gc
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psutil

from benchmarks.conditions import conditions
from pdserve.clock import SeededRng
from pdserve.contract.block_names import name_blocks
from pdserve.contract.ids import BlockHash, Incarnation, SubmitNumber, WorkerId
from pdserve.contract.messages import Hello, Member, Members, Report, Role, WorkerLoad, WorkerState
from pdserve.contract.tokens import TokenBytes, pack_tokens
from pdserve.contract.work import BlockCounts, ModelInfo, StepCost
from router.bookings import Booked
from router.fleet import Fleet
from router.placement.policies import make_policy
from router.placement.policy import PlacementPolicy, PlacementRequest
from router.prefix_index import PrefixIndex

BLOCK_SIZE = 16
COST = StepCost(0.02, 0.001, 0.001, 1e-7)
INFO = ModelInfo(
    name="imagined",
    architecture="imagined",
    revision="",
    dtype="bfloat16",
    vocab_size=32_000,
    max_model_len=200_000,
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    block_size=BLOCK_SIZE,
    num_blocks=60_000,
    block_bytes=2 << 20,
    eos_token_ids=(2,),
    fingerprint="imagined",
    chunk_tokens=512,
    deterministic=False,
)
PROMPTS = {"1K": 1_000, "8K": 8_000, "128K": 128_000}
WORKERS = (8, 64, 512)
EVENT_BLOCKS = 16
OWN_BLOCKS = 2_000
"""Blocks that each worker holds besides."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A fleet and prompts to place there."""

    fleet: Fleet
    policy: PlacementPolicy
    prompts: Sequence[TokenBytes]

    def decide(self, prompt: TokenBytes) -> None:
        """One decision, whole, whose request ends at once."""
        fleet = self.fleet
        info = fleet.model_info()
        assert info is not None
        names = name_blocks(prompt, info.block_size, 7)
        num_tokens = len(prompt) // 4
        seen = fleet.view(names, BLOCK_SIZE, now=1.0)
        placement = self.policy.choose(PlacementRequest(num_tokens, num_tokens + 100, 100.0), seen)
        assert placement is not None
        attempt = object()
        to_compute = placement.num_to_compute
        here = to_compute if placement.prefill is None else 0
        booked = Booked(here, num_tokens, SubmitNumber(1))
        decode = fleet.book(placement.decode, attempt, booked, names, placement.prefill is not None)
        prefill = None
        if placement.prefill is not None:
            prefill = fleet.book(placement.prefill, attempt, Booked(to_compute, 0), names)
            fleet.release(prefill, attempt)
        fleet.release(decode, attempt)


def make_scene(num_workers: int, num_tokens: int, num_prompts: int, rng: random.Random) -> Scene:
    """Half of the workers prefill, half decode and have 8 to 24 sequences each."""
    roles = [Role.PREFILL, Role.DECODE] * (num_workers // 2)
    members = tuple(
        Member(
            WorkerId(f"{role.value}-{number}"),
            f"10.0.0.1:{number}",
            Incarnation(number),
            role,
            "",
            WorkerState.READY,
        )
        for number, role in enumerate(roles, start=1)
    )
    fleet = Fleet()
    fleet.set_members(Members(1, members))
    prompts = [pack_tokens([rng.randrange(32_000) for _ in range(num_tokens)]) for _ in range(num_prompts)]
    names = [name_blocks(prompt, BLOCK_SIZE, 7) for prompt in prompts]
    for member in members:
        held = [BlockHash(rng.getrandbits(64)) for _ in range(OWN_BLOCKS)]
        share = 2 if member.role is Role.PREFILL else 4
        for number, prompt_names in enumerate(names):
            if number % (num_workers // 2) == (member.incarnation - 1) // 2:
                held += prompt_names[: len(prompt_names) // share]
        _connect(fleet, member, held, _load(member.role, rng))
    return Scene(fleet, make_policy("predicted", SeededRng(1)), prompts)


def _load(role: Role, rng: random.Random) -> WorkerLoad:
    running = 0 if role is Role.PREFILL else rng.randrange(8, 24)
    waiting = rng.randrange(4_000) if role is Role.PREFILL else 0
    return WorkerLoad(
        WorkerState.READY,
        waiting // 1000,
        waiting,
        running,
        running * 1000,
        BlockCounts(20_000, 20_000, 0, 20_000),
        1,
        SubmitNumber(0),
        1000.0,
        0.02,
        1.0,
        1.0,
    )


def _connect(fleet: Fleet, member: Member, held: Sequence[BlockHash], load: WorkerLoad) -> None:
    view = fleet.workers[member.worker_id]
    fleet.hello(view, Hello(member.worker_id, member.incarnation, member.role, INFO, b"", COST, 0.5))
    fleet.connected(view)
    xor = 0
    for name in set(held):
        xor ^= name
    report = Report(member.incarnation, tuple(held), (), len(set(held)), xor, load)
    assert fleet.report(view, report, 1.0)


def time_decisions(scenes: dict[str, Scene], num_batches: int) -> dict[str, list[float]]:
    """Scene -> seconds of CPU of one decision, a figure a batch."""
    times: dict[str, list[float]] = {name: [] for name in scenes}
    for scene in scenes.values():
        for prompt in scene.prompts:
            scene.decide(prompt)
    for _ in range(num_batches):
        for name, scene in scenes.items():
            started = time.thread_time()
            for prompt in scene.prompts:
                scene.decide(prompt)
            times[name].append((time.thread_time() - started) / len(scene.prompts))
    return times


def time_naming(scenes: dict[str, Scene], num_batches: int) -> dict[str, list[float]]:
    """Scene -> seconds of CPU to name the blocks of one of its prompts."""
    times: dict[str, list[float]] = {name: [] for name in scenes}
    for _ in range(num_batches):
        for name, scene in scenes.items():
            started = time.thread_time()
            for prompt in scene.prompts:
                name_blocks(prompt, BLOCK_SIZE, 7)
            times[name].append((time.thread_time() - started) / len(scene.prompts))
    return times


def fill_index(num_blocks: int, num_workers: int) -> dict[str, float]:
    """Store `num_blocks` names, each at one worker."""
    index = PrefixIndex()
    workers = [Incarnation(number) for number in range(1, num_workers + 1)]
    for worker in workers:
        index.add_worker(worker)
    rng = random.Random(1)
    gc.collect()
    before = psutil.Process().memory_info().rss
    times = [
        _time_event(index, workers[event % num_workers], rng) for event in range(num_blocks // EVENT_BLOCKS)
    ]
    used = psutil.Process().memory_info().rss - before - 32 * len(times)  # a list of floats
    return {
        "blocks": index.num_names,
        "events_per_s": len(times) / sum(times),
        "bytes_per_block": used / index.num_names,
        "longest_event_ms": 1000 * max(times),
    }


def _time_event(index: PrefixIndex, worker: Incarnation, rng: random.Random) -> float:
    names = [BlockHash(rng.getrandbits(64)) for _ in range(EVENT_BLOCKS)]
    started = time.thread_time()
    index.store(worker, names)
    return time.thread_time() - started


def measure(
    num_batches: int, num_blocks: int, workers: Sequence[int], prompts: dict[str, int]
) -> dict[str, Any]:
    rng = random.Random(0)
    scenes = {
        f"{name} tokens, {num} workers": make_scene(num, length, max(4, min(64, 400_000 // length)), rng)
        for num in workers
        for name, length in prompts.items()
    }
    gc.freeze()  # as in a server that has run for a while: what is old is not looked at again
    decisions = time_decisions(scenes, num_batches)
    naming = time_naming(scenes, num_batches)
    del scenes
    gc.unfreeze()
    return {
        "naming_us": {name: dict(_summary(times)) for name, times in naming.items()},
        "decision_us": {name: dict(_summary(times)) for name, times in decisions.items()},
        "index": fill_index(num_blocks, num_workers=8),
    }


def _summary(seconds: Sequence[float]) -> Iterator[tuple[str, float]]:
    low, *_, high = quantiles(seconds, n=10) if len(seconds) > 1 else (seconds[0], seconds[0])
    yield "median", round(1e6 * median(seconds), 1)
    yield "p10", round(1e6 * low, 1)
    yield "p90", round(1e6 * high, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--smoke", action="store_true", help="few and small, only to see that it runs")
    args = parser.parse_args()
    smoke = (3, 100_000, (8,), {"1K": 1_000})
    result = measure(*(smoke if args.smoke else (31, 10_000_000, WORKERS, PROMPTS)))
    print(json.dumps(result, indent=2))
    if args.json:
        args.json.write_text(json.dumps(conditions("router") | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
