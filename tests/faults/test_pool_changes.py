"""A scale-in, a drain and a rollout under load. `make scale-storm` does so again and again."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.faults.pool_changes import Change, change, drain, rollout, scale_in, small_system
from tests.faults.rehearsal import Rehearsal

CHANGES = [scale_in("decode", 0.0), scale_in("prefill", 30.0), drain("decode-0", 0.3), rollout(150)]


@pytest.fixture(scope="module")
def system() -> Iterator[Rehearsal]:
    with small_system() as system:
        yield system


@pytest.mark.parametrize("wanted", CHANGES, ids=lambda wanted: wanted.what)
def test_no_request_notices(system: Rehearsal, wanted: Change) -> None:
    run = asyncio.run(change(system, wanted, seed=CHANGES.index(wanted)))
    assert run.happened
    assert (run.problems, run.num_lost, run.num_wrong_tokens, run.num_leaked_blocks) == ([], 0, 0, 0)
