"""Stretches of steps against the same steps added one by one."""

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.batch import StepLog
from simulator.stretch import Stretch

stretches = st.builds(
    Stretch,
    began_at=st.floats(0, 1e4),
    first_s=st.floats(1e-4, 1.0),
    growth_s=st.one_of(st.just(0.0), st.floats(1e-9, 1e-3)),
    num_steps=st.integers(1, 300),
)


def ends(stretch: Stretch) -> list[float]:
    """When each step ends, one by one."""
    seconds = [stretch.first_s + index * stretch.growth_s for index in range(stretch.num_steps)]
    return [stretch.began_at + until for until in accumulate(seconds)]


@given(stretches)
def test_a_stretch_ends_with_its_last_step(stretch: Stretch) -> None:
    assert stretch.ends_at == pytest.approx(ends(stretch)[-1])


@given(stretches, st.floats(0, 0.999999), st.integers(0, 299))
def test_the_step_at_a_moment_is_the_one_that_contains_it(stretch: Stretch, share: float, index: int) -> None:
    index %= stretch.num_steps
    until = ends(stretch)
    begins = [stretch.began_at, *until][index]
    now = begins + (0.001 + 0.998 * share) * (until[index] - begins)
    assert stretch.step_at(now) == index
    assert stretch.cut(now).num_steps == index + 1


@given(st.lists(stretches, max_size=5))
def test_a_log_tells_the_end_of_every_step(logged: list[Stretch]) -> None:
    expected = [end for stretch in logged for end in ends(stretch)]
    assert StepLog(logged).ends().tolist() == pytest.approx(expected)
