"""The planted bugs still fit the code, and two of them are found; `make simulate-mutations` hunts all."""

import pytest

from tests.simulation.mutations.catalogue import MUTATIONS, Mutation
from tests.simulation.mutations.hunt import ROOT, hunt

QUICKLY_FOUND = ("publish before proven", "a broken Session leaves its requests running")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_bug_can_still_be_planted(mutation: Mutation) -> None:
    for edit in mutation.edits:
        assert (ROOT / edit.path).read_text().count(edit.old) == 1, f"adapt the bug to {edit.path}"


@pytest.mark.parametrize("name", QUICKLY_FOUND)
def test_a_planted_bug_is_found(name: str) -> None:
    (mutation,) = (mutation for mutation in MUTATIONS if mutation.name == name)
    assert hunt(mutation, max_seeds=60).seed is not None
