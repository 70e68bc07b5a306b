"""A few hundred of the seeds that `make simulate-faults` runs thousands of, and that a seed is a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.command import run_bounded
from tests.simulation.run import run_seed
from tests.simulation.scenario import NUM_FAULTS, NUM_REQUESTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_no_fault_changes_a_token_or_leaves_anything(first: int) -> None:
    outcomes = [run_bounded(seed) for seed in range(first, first + 50)]
    failed = {outcome.seed: outcome.failures for outcome in outcomes if outcome.failures}
    assert not failed, "see one with: python -m tests.simulation --seeds SEED --events"
    assert min(outcome.num_faults for outcome in outcomes) >= NUM_FAULTS
    assert min(outcome.ends.total() for outcome in outcomes) >= NUM_REQUESTS


def test_a_seed_is_the_same_run_again_also_in_another_process() -> None:
    seeds = range(3)
    first, second = ([run_seed(seed).log.digest() for seed in seeds] for _ in range(2))
    assert first == second
    elsewhere = subprocess.run(
        [sys.executable, "-c", _PRINT_DIGESTS],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.split() == first


_PRINT_DIGESTS = """
from tests.simulation.run import run_seed
for seed in range(3):
    print(run_seed(seed).log.digest())
"""
