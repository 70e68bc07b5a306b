"""The simulator against hand-computed scenarios, a step-by-step loop, queueing theory and a plain LRU."""

import random
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policies import lru_hits as bound_hits
from load_generator.traces import PlannedRequest
from pdserve.contract.errors import ConfigError
from router.admission import AdmissionLimits
from router.placement.policies import POLICIES
from simulator.system import SimulatedSystem, simulate
from simulator.timing import Timing
from tests.simulated import TIMING, asked, served, split, unsplit, with_cost


def times(record_times: Sequence[float]) -> list[float]:
    return [round(at, 9) for at in record_times]


def test_one_unsplit_request_by_hand() -> None:
    """A prompt of 100 tokens is two chunks, of 64 and 36 tokens; then steps of one sequence."""
    _, (record,) = served([asked(1.0, 100, 3)], unsplit())
    first = 1.0 + (0.010 + 0.064) + (0.010 + 0.036)
    assert times(record.token_times) == times([first, first + 0.012, first + 0.024])
    assert record.num_output_tokens == 3


def test_one_split_request_by_hand() -> None:
    """The first chunk's KV travels 64 ms from the end of its step on. A quarter of the second chunk's step is
    over when the link is first wanted again, but that is busy until then; its 36 ms of KV follow at once."""
    _, (record,) = served([asked(0.0, 100, 3)], split())
    first_chunk, first_token = 0.074, 0.074 + 0.046
    arrived = first_chunk + 0.064 + 0.036
    assert times(record.token_times) == times([first_token, arrived + 0.012, arrived + 0.024])


def test_a_fast_network_leaves_the_tail_of_the_last_chunk() -> None:
    timing = replace(TIMING, link_bytes_per_s=1e5 * 100)  # 0.01 ms a token
    _, (record,) = served([asked(0.0, 64, 2)], split(timing))
    assert times(record.token_times) == times([0.074, 0.074 + 0.25 * 0.00064 + 0.012])


def test_messages_between_processes_take_their_time() -> None:
    """Submit, open, ask, answer before the prompt is computed; the first token's two hops after it."""
    _, (record,) = served([asked(0.0, 64, 1)], split(replace(TIMING, message_s=0.001)))
    assert times(record.token_times) == times([4 * 0.001 + 0.074 + 2 * 0.001])


def test_sequences_share_steps_by_hand() -> None:
    """The second prompt is computed beside the first one's decode step; from then on both decode."""
    _, (one, two) = served([asked(0.0, 10, 4), asked(0.025, 20, 2)], unsplit())
    # 0: prompt of 10. 20 ms: decode alone, to 32. 32: decode with a prompt of 20, to 64. 64: both, to 78.
    assert times(one.token_times) == [0.020, 0.032, 0.064, 0.078]
    assert times(two.token_times) == [0.064, 0.078]


def test_a_cached_prefix_is_not_computed_again() -> None:
    planned = [asked(0.0, 48, 1, [1, 2, 3]), asked(10.0, 48, 1, [1, 2, 4]), asked(20.0, 48, 1, [1, 2, 3])]
    _, records = served(planned, unsplit())
    assert [record.num_cached_tokens for record in records] == [0, 32, 32]  # the last block never counts
    assert times(records[1].token_times) == [10.0 + 0.010 + 0.016]


def test_kv_that_the_decode_worker_holds_does_not_travel() -> None:
    planned = [asked(0.0, 64, 2, [1, 2, 3, 4]), asked(10.0, 64, 2, [1, 2, 3, 5])]
    _, (_, again) = served(planned, split())
    first_token = 10.0 + 0.010 + 0.016  # 48 tokens are cached at the prefill worker, too
    arrived = max(first_token - 0.75 * 0.026 + 0.016, first_token + 0.25 * 0.016)
    assert times(again.token_times) == times([first_token, arrived + 0.012])


def test_a_request_that_can_never_fit_is_refused() -> None:
    _, (record,) = served([asked(0.0, 20_000, 2)], unsplit())
    assert record.error is not None
    assert record.error.startswith("request_too_long")


def test_admission_refuses_what_is_too_much() -> None:
    system = replace(unsplit(), limits=AdmissionLimits(max_requests=2))
    _, records = served([asked(0.0, 64, 5) for _ in range(3)], system)
    assert [record.error is None for record in records] == [True, True, False]


def step_by_step(planned: Sequence[PlannedRequest], timing: Timing) -> list[list[float]]:
    """One unsplit worker with all the room it wants, prompts of one chunk: one step after the other."""
    cost, now = timing.cost, 0.0
    waiting, running = list(range(len(planned))), []
    tokens: list[list[float]] = [[] for _ in planned]
    while waiting or running:
        arrived = [index for index in waiting if planned[index].due_s <= now]
        if not arrived and not running:
            now = planned[waiting[0]].due_s
            continue
        waiting = waiting[len(arrived) :]
        context = sum(planned[index].num_prompt_tokens + len(tokens[index]) - 1 for index in running)
        num_prompt = sum(planned[index].num_prompt_tokens for index in arrived)
        now += cost.predict_s(num_prompt, len(running), context)
        for index in running + arrived:
            tokens[index].append(now)
        together = running + arrived
        running = [index for index in together if len(tokens[index]) < planned[index].num_output_tokens]
    return tokens


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.0, 0.3), st.integers(1, 64), st.integers(1, 60)), min_size=1, max_size=20)
)
def test_stretches_are_the_steps_that_would_have_been(asked_for: list[tuple[float, int, int]]) -> None:
    due_s, planned = 0.0, []
    for gap_s, num_prompt, num_output in asked_for:
        due_s += gap_s + 1e-6
        planned.append(asked(due_s, num_prompt, num_output))
    timing = replace(with_cost(per_context_token_s=1e-4), step_budget_s=1e9)
    _, records = served(planned, unsplit(timing))
    for record, expected in zip(records, step_by_step(planned, timing), strict=True):
        assert record.token_times == pytest.approx(expected)


def poisson(rate: float, count: int, num_prompt: int) -> list[PlannedRequest]:
    draw = random.Random(1)
    due_s, planned = 0.0, []
    for _ in range(count):
        due_s += draw.expovariate(rate)
        planned.append(asked(due_s, num_prompt, 1))
    return planned


@pytest.mark.parametrize("load", [0.5, 0.8])
@pytest.mark.parametrize("system", [unsplit(), split()], ids=["unsplit", "split"])
def test_one_worker_is_an_m_d_1_queue(load: float, system: SimulatedSystem) -> None:
    """Prompts of exactly one chunk, one per step: the mean wait is that of Pollaczek and Khinchine."""
    timing = replace(with_cost(fixed_s=0.0001, per_prefill_token_s=0.00001), step_budget_s=1e-6)
    service_s = 0.0001 + 64 * 0.00001
    one_per_step = replace(system, timing=timing)
    _, records = served(poisson(load / service_s, 20_000, 64), one_per_step)
    mean_s = sum(record.time_to_first_token_s for record in records) / len(records)
    assert mean_s == pytest.approx(service_s + load * service_s / (2 * (1 - load)), rel=0.05)


def families(draw: random.Random, count: int) -> list[PlannedRequest]:
    """Prompts that branch off from earlier ones at random depths; far apart in time."""
    prompts: list[list[int]] = [[0]]
    ids = 1
    for _ in range(count):
        origin = draw.choice(prompts[-40:])
        kept = origin[: draw.randrange(len(origin) + 1)]
        fresh = draw.randrange(1, 12)
        prompts.append([*kept, *range(ids, ids + fresh)])
        ids += fresh
    return [
        asked(index * 100.0, 16 * len(prompt) - draw.randrange(2) * 5, draw.randrange(1, 40), prompt)
        for index, prompt in enumerate(prompts)
    ]


def lru_hits(planned: Sequence[PlannedRequest], num_blocks: int) -> list[int]:
    """Cached tokens of each request when they come one after the other to one cache of `num_blocks`, the
    least recently used block going first and of one request its deepest."""
    cache: OrderedDict[object, None] = OrderedDict()  # least recently used first
    hits = []
    for number, row in enumerate(planned):
        num_full = row.num_prompt_tokens // 16
        num_named = (row.num_prompt_tokens + row.num_output_tokens - 1) // 16
        names = [*row.prefix_ids[:num_full], *((number, place) for place in range(num_full, num_named))]
        reusable = names[: (row.num_prompt_tokens - 1) // 16]
        held = 0
        while held < len(reusable) and reusable[held] in cache:
            held += 1
        hits.append(held * 16)
        pinned = names[:held]
        for name in pinned:
            del cache[name]
        num_needed = -(-(row.num_prompt_tokens + row.num_output_tokens - 1) // 16)
        while len(cache) > num_blocks - num_needed:
            cache.popitem(last=False)
        for name in reversed(names):
            cache[name] = None
            cache.move_to_end(name)
    return hits


@pytest.mark.parametrize("num_blocks", [40, 100, 1000])
def test_hits_are_those_of_an_lru(num_blocks: int) -> None:
    planned = families(random.Random(num_blocks), 300)
    fitting = [row for row in planned if row.num_prompt_tokens + row.num_output_tokens <= num_blocks * 16]
    _, records = served(fitting, unsplit(replace(TIMING, pool_tokens=num_blocks * 16)))
    assert [record.num_cached_tokens for record in records] == lru_hits(fitting, num_blocks)


@pytest.mark.parametrize("num_blocks", [40, 1000])
def test_the_bound_of_the_benchmark_is_what_one_worker_reaches(num_blocks: int) -> None:
    """Where nothing but whole prompts is ever cached."""
    whole = [
        replace(row, num_prompt_tokens=16 * len(row.prefix_ids), num_output_tokens=1)
        for row in families(random.Random(4), 200)
        if len(row.prefix_ids) < num_blocks
    ]
    _, records = served(whole, unsplit(replace(TIMING, pool_tokens=num_blocks * 16)))
    assert [record.num_cached_tokens for record in records] == bound_hits(whole, 16, num_blocks)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    policy=st.sampled_from(sorted(POLICIES)),
    split_workers=st.booleans(),
    num_blocks=st.sampled_from([40, 60, 200]),
    gap_s=st.sampled_from([0.0, 0.02, 0.2]),
)
def test_every_request_ends_and_every_block_comes_back(
    seed: int, policy: str, split_workers: bool, num_blocks: int, gap_s: float
) -> None:
    """Also where the pools are so small that running sequences are preempted again and again."""
    draw = random.Random(seed)
    rows = [replace(row, due_s=place * gap_s) for place, row in enumerate(families(draw, 40))]
    planned = [row for row in rows if row.num_prompt_tokens + row.num_output_tokens <= num_blocks * 16]
    timing = replace(TIMING, pool_tokens=num_blocks * 16, message_s=0.0003)
    system = split(timing, policy, 2) if split_workers else unsplit(timing, 3, policy)
    _, records = served(planned, system)
    for row, record in zip(planned, records, strict=True):
        assert record.error is None
        assert record.num_output_tokens == row.num_output_tokens
        assert record.token_times == sorted(record.token_times)
        assert record.token_times[0] > row.due_s


def test_preemption_happens_and_keeps_what_was_made() -> None:
    timing = replace(TIMING, pool_tokens=10 * 16)
    finished, records = served([asked(0.0, 32, 100), asked(0.0, 32, 100)], unsplit(timing))
    assert sum(worker.num_preemptions for worker in finished.decode.values()) > 0
    assert [record.num_output_tokens for record in records] == [100, 100]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_is_the_same_run(policy: str) -> None:
    planned = [replace(row, due_s=index * 0.05) for index, row in enumerate(families(random.Random(3), 100))]

    def token_times(seed: int) -> list[list[float]]:
        system = replace(split(policy=policy, pairs=3), seed=seed)
        return [record.token_times for record in served(planned, system)[1]]

    assert token_times(1) == token_times(1)


def test_a_prompt_shares_with_others_in_smaller_blocks_too() -> None:
    planned = [asked(0.0, 64, 1, [1, 2], block=32), asked(9.0, 64, 1, [1, 3], block=32)]
    _, records = served(planned, unsplit())
    assert [record.num_cached_tokens for record in records] == [0, 32]


def test_what_cannot_be_simulated_is_said() -> None:
    with pytest.raises(ConfigError, match="policy"):
        simulate([asked(0.0, 1, 1)], replace(unsplit(), policy="astrology"))
    with pytest.raises(ConfigError, match="nobody decodes"):
        simulate([asked(0.0, 1, 1)], replace(split(), num_decode=0))
    with pytest.raises(ConfigError, match="does not divide"):
        simulate([asked(0.0, 64, 1, [1, 2], block=32)], replace(unsplit(), block_tokens=24))
