"""The digest against its definition, and what it must find."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.handoff.digest import (
    LANE_BYTES,
    RUN_LANES,
    Parts,
    as_ids,
    as_lanes,
    combine,
    copy_parts,
    digest,
    digest_parts,
)

MODULUS = 2**64


def splitmix64(state: int) -> int:
    """The output of one step of the generator from `state`, in plain integers."""
    z = (state + 0x9E3779B97F4A7C15) % MODULUS
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return z ^ (z >> 31)


def mix(n: int) -> int:
    return splitmix64(n * 0x9E3779B97F4A7C15 % MODULUS)


def weight(lane: int) -> int:
    """The definition, written down a second time."""
    run, column = divmod(lane, 8192)
    lane_weight = (mix(column) % 2**50) * 2**14 + 2 * column + 1
    run_weight = (mix(8192 + run) % 2**31) * 2**33 + (2**14 * run + 1) % 2**33
    return lane_weight * run_weight % MODULUS


def reference(payload: bytes, first_lane: int = 0) -> int:
    padded = payload + bytes(-len(payload) % 8)
    lanes = (int.from_bytes(padded[i : i + 8], "little") for i in range(0, len(padded), 8))
    return sum(lane * weight(first_lane + i) for i, lane in enumerate(lanes)) % MODULUS


def random_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def test_splitmix64_is_the_published_generator() -> None:
    assert [mix(n) for n in range(2)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


@given(st.binary(max_size=400), st.integers(0, 2**33))
def test_equals_its_definition(payload: bytes, first_lane: int) -> None:
    assert digest(payload, first_lane) == reference(payload, first_lane)


@pytest.mark.parametrize("first_lane", [0, 1, RUN_LANES - 1, RUN_LANES, 3 * RUN_LANES + 5, 1022 * RUN_LANES])
@pytest.mark.parametrize("num_lanes", [0, 1, RUN_LANES - 1, RUN_LANES, RUN_LANES + 1, 4 * RUN_LANES + 3])
@pytest.mark.parametrize("tail", [0, 1, 7])
def test_equals_its_definition_around_runs(first_lane: int, num_lanes: int, tail: int) -> None:
    payload = random_bytes(num_lanes * LANE_BYTES + tail)
    assert digest(payload, first_lane) == reference(payload, first_lane)


def test_takes_any_buffer() -> None:
    payload = random_bytes(1000)
    expected = digest(payload)
    assert digest(bytearray(payload)) == expected
    assert digest(memoryview(b"x" + payload)[1:]) == expected  # not aligned
    assert digest(np.frombuffer(payload, np.float64).reshape(5, 25).data) == expected


@given(st.integers(0, 60_000), st.lists(st.integers(0, 60_000), max_size=5))
def test_pieces_add_up(num_lanes: int, cuts: list[int]) -> None:
    payload = memoryview(random_bytes(num_lanes * LANE_BYTES + 3))
    bounds = [0, *sorted(min(cut, num_lanes) for cut in cuts), num_lanes + 1]
    shares = [
        digest(payload[start * LANE_BYTES : stop * LANE_BYTES], start) for start, stop in pairwise(bounds)
    ]
    random.shuffle(shares)
    assert combine(shares) == digest(payload)


def test_the_empty_payload_and_zeros() -> None:
    assert digest(b"") == 0
    assert digest(bytes(1000)) == 0


@given(
    st.integers(0, 20_000), st.integers(0, MODULUS - 1), st.integers(0, MODULUS - 1), st.integers(0, 1 << 32)
)
def test_every_change_of_one_lane_is_found(lane: int, old: int, new: int, first_lane: int) -> None:
    payload = bytearray((lane + 2) * LANE_BYTES)
    payload[lane * 8 : lane * 8 + 8] = old.to_bytes(8, "little")
    before = digest(payload, first_lane)
    payload[lane * 8 : lane * 8 + 8] = new.to_bytes(8, "little")
    assert (digest(payload, first_lane) == before) == (old == new)


def test_weights_of_32_gib_are_odd_and_differ_modulo_2_to_33() -> None:
    # weight mod 2**14 is 2 * column + 1, which names the column; among equal columns the weights differ by
    # an odd multiple of 2**14 * (run - run'), which 2**33 divides only when 2**19 divides run - run'.
    chosen = random.Random(1)
    for _ in range(2000):
        run, column = chosen.randrange(2**19), chosen.randrange(RUN_LANES)
        assert weight(run * RUN_LANES + column) % 2**14 == 2 * column + 1
        other = run ^ (1 << chosen.randrange(19))
        difference = weight(run * RUN_LANES + column) - weight(other * RUN_LANES + column)
        assert difference % 2**33 == (2**14 * (run - other) * weight(column)) % 2**33 != 0


@given(
    st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)
)
def test_every_swap_of_lanes_that_differ_in_their_low_halves_is_found(i: int, j: int, a: int, b: int) -> None:
    def lanes_at(values: dict[int, int]) -> int:
        return combine(digest(value.to_bytes(8, "little"), lane) for lane, value in values.items())

    if i != j and a % 2**32 != b % 2**32:
        assert lanes_at({i: a, j: b}) != lanes_at({i: b, j: a})


@given(st.integers(1, 40_000), st.integers(1, 2**20))
def test_swapped_and_shifted_blocks_are_found(block_lanes: int, shift: int) -> None:
    payload = random_bytes(block_lanes * LANE_BYTES * 2)
    for bytes_moved in {len(payload) // 2, shift * LANE_BYTES % len(payload)} - {0}:
        assert digest(payload) != digest(payload[bytes_moved:] + payload[:bytes_moved])


def pool(num_rows: int, num_lanes: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (num_rows, num_lanes * LANE_BYTES), np.uint8)


@pytest.mark.parametrize("num_lanes", [1, 7, 8, 9, 17, 1000, RUN_LANES, RUN_LANES + 1, 3 * RUN_LANES - 1])
@pytest.mark.parametrize("first_lane", [0, 5, RUN_LANES - 1])
def test_parts_of_rows_are_copied_and_digested(num_lanes: int, first_lane: int) -> None:
    """From some lanes of some rows into other lanes of other rows, and nothing beside them."""
    source, target = pool(7, num_lanes + 2, 1), pool(5, num_lanes + 4, 2)
    from_rows, to_rows = [6, 0, 3], [1, 4, 2]
    from_bytes = slice(2 * LANE_BYTES, (2 + num_lanes) * LANE_BYTES)
    to_bytes = slice(LANE_BYTES, (1 + num_lanes) * LANE_BYTES)
    expected = target.copy()
    expected[to_rows, to_bytes] = source[from_rows, from_bytes]

    taken = Parts(as_lanes(source), as_ids(from_rows), 2, 2 + num_lanes)
    placed = Parts(as_lanes(target), as_ids(to_rows), 1, 1 + num_lanes)
    value = copy_parts(placed, taken, first_lane)

    np.testing.assert_array_equal(target, expected)
    assert value == reference(source[from_rows, from_bytes].tobytes(), first_lane)
    assert digest_parts(placed, first_lane) == digest_parts(taken, first_lane) == value


def test_rows_that_may_only_be_read_and_no_rows_at_all() -> None:
    source = pool(3, 10, 1)
    source.flags.writeable = False
    parts = Parts(as_lanes(source), as_ids([2, 2]), 0, 10)
    assert digest_parts(parts) == reference(source[2].tobytes() * 2)
    assert digest_parts(parts._replace(row_ids=as_ids([]))) == 0


def test_what_lies_in_the_target_is_digested() -> None:
    """Not what was read from the source, which this copy changes while it goes on."""
    rows = as_lanes(pool(1, 4, 1))
    onto_itself = Parts(rows, as_ids([0]), 1, 4)
    value = copy_parts(onto_itself, Parts(rows, as_ids([0]), 0, 3))
    assert value == digest(rows[0, 1:4].tobytes())


@pytest.mark.parametrize("row_ids", [[-1], [3], [0, 1, 99]])
def test_rows_that_are_not_there_are_refused(row_ids: list[int]) -> None:
    good, bad = (Parts(as_lanes(pool(3, 4, 1)), as_ids(ids), 0, 4) for ids in ([0] * len(row_ids), row_ids))
    for target, source in ((good, bad), (bad, good)):
        with pytest.raises(IndexError, match="of 3"):
            copy_parts(target, source)
    with pytest.raises(IndexError):
        digest_parts(bad)


@pytest.mark.parametrize("change", [{"start": -1}, {"stop": 5}, {"start": 3, "stop": 2}])
def test_lanes_that_are_not_there_are_refused(change: dict[str, int]) -> None:
    parts = Parts(as_lanes(pool(3, 4, 1)), as_ids([0]), 0, 4)
    with pytest.raises(IndexError, match="of 4"):
        digest_parts(parts._replace(**change))  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"stop": 3}, {"row_ids": as_ids([0, 1])}])
def test_parts_that_do_not_pair_up_are_refused(change: dict[str, object]) -> None:
    parts = Parts(as_lanes(pool(3, 4, 1)), as_ids([0]), 0, 4)
    with pytest.raises(ValueError, match="do not go into"):
        copy_parts(parts, parts._replace(**change))  # type: ignore[arg-type]
