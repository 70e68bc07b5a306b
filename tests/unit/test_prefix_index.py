"""The index against a brute-force one, over random histories."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.contract.ids import BlockHash, Incarnation
from router.prefix_index import PrefixIndex

NAMES = [BlockHash(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(1, 30)]
workers = st.integers(1, 5).map(Incarnation)
some_names = st.lists(st.sampled_from(NAMES), unique=True, max_size=10)
events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), workers, some_names),
        st.tuples(st.just("end"), workers, some_names),
        st.tuples(st.just("store"), workers, some_names),
        st.tuples(st.just("remove"), workers, some_names),
        st.tuples(st.just("sweep"), workers, some_names),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(events, some_names)
def test_against_sets_of_names(
    history: list[tuple[str, Incarnation, list[BlockHash]]], prompt: list[BlockHash]
) -> None:
    index = PrefixIndex()
    truth: dict[Incarnation, set[BlockHash]] = {}
    for what, worker, names in history:
        if what == "add":
            index.add_worker(worker)
            truth[worker] = set()
        elif what == "end":
            index.remove_worker(worker)
            truth.pop(worker, None)
        elif what == "sweep":
            for _ in range(len(names) * 60):
                index.sweep()
        elif worker in truth and what == "store":
            index.store(worker, names)
            truth[worker] |= set(names)
        elif worker in truth:
            index.remove(worker, names)
            truth[worker] -= set(names)
    assert num_held_blocks(index, prompt) == _leading_runs(truth, prompt)
    for worker, held in truth.items():
        xor = 0
        for name in held:
            xor ^= name
        assert index.agrees(worker, len(held), xor)
        assert not index.agrees(worker, len(held) + 1, xor)


def test_a_swept_bit_is_given_to_the_next_worker_without_the_old_names() -> None:
    index = PrefixIndex()
    index.add_worker(Incarnation(1))
    index.store(Incarnation(1), NAMES)
    index.remove_worker(Incarnation(1))
    assert index.num_names == len(NAMES)
    for _ in range(256):
        index.sweep()
    assert index.num_names == 0
    index.add_worker(Incarnation(2))
    assert index.holders(NAMES) == []


def test_a_sweep_changes_one_shard_however_many_workers_have_died() -> None:
    names = [BlockHash(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(1, 3000)]
    index = PrefixIndex()
    for worker in range(1, 9):
        index.add_worker(Incarnation(worker))
        index.store(Incarnation(worker), names)
    for worker in range(1, 9):  # they die one after the other
        index.remove_worker(Incarnation(worker))
        before = [dict(shard) for shard in index._shards]
        index.sweep()
        assert sum(old != new for old, new in zip(before, index._shards, strict=True)) == 1
    for _ in range(255):
        index.sweep()
    assert index.num_names == 0


def num_held_blocks(index: PrefixIndex, prompt: list[BlockHash]) -> dict[Incarnation, int]:
    """What `holders` tells, by worker."""
    bits = {worker: index.bit_of(worker) for worker in map(Incarnation, range(1, 6))}
    depths = index.holders(prompt)
    assert depths == sorted(depths, reverse=True)
    return {worker: depth for depth, owners in depths for worker, bit in bits.items() if bit & owners}


def _leading_runs(
    truth: dict[Incarnation, set[BlockHash]], prompt: list[BlockHash]
) -> dict[Incarnation, int]:
    runs: dict[Incarnation, int] = defaultdict(int)
    for worker, held in truth.items():
        for name in prompt:
            if name not in held:
                break
            runs[worker] += 1
    return dict(runs)


@settings(max_examples=300)
@given(st.dictionaries(workers, st.integers(0, 200), min_size=1), st.integers(0, 200))
def test_prefixes_that_are_held_from_their_beginning(depths: dict[Incarnation, int], num_asked: int) -> None:
    prompt = [BlockHash(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(1, 201)]
    index = PrefixIndex()
    for worker, depth in depths.items():
        index.add_worker(worker)
        index.store(worker, prompt[:depth])
    expected = {worker: min(depth, num_asked) for worker, depth in depths.items() if min(depth, num_asked)}
    assert num_held_blocks(index, prompt[:num_asked]) == expected


@settings(max_examples=100)
@given(st.integers(0, 60), st.integers(1, 60))
def test_a_prefix_without_its_beginning_is_not_held(first_held: int, num_asked: int) -> None:
    prompt = [BlockHash(i * 0x9E3779B97F4A7C15 % 2**64) for i in range(1, 61)]
    index = PrefixIndex()
    index.add_worker(Incarnation(1))
    index.add_worker(Incarnation(2))
    index.store(Incarnation(1), prompt[first_held:])
    index.store(Incarnation(2), prompt[:7])
    held = num_held_blocks(index, prompt[:num_asked])
    assert held.get(Incarnation(1), 0) == (num_asked if first_held == 0 else 0)
    assert held[Incarnation(2)] == min(7, num_asked)
