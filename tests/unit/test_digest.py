"""The digest against its definition, and what it must find."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.handoff.digest import LANE_BYTES, RUN_LANES, combine, digest

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
