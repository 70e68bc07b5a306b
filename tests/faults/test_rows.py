"""One case of every row of the fault table, on one real system. `make faults` runs all of them."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.faults.rehearsal import Case, Rehearsal, rehearsal
from tests.faults.rows import cases, one_case_per_row
from tests.ray_cluster import private_pdserve
from tests.small_models import make_model
from tests.small_tokenizers import save_chat_folder


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path_factory.mktemp("models") / "small-llama", vocab_size=420)
    save_chat_folder(model.folder)
    with private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
        yield system


@pytest.mark.parametrize("case", one_case_per_row(), ids=lambda case: case.what)
def test_nothing_is_lost_wrong_or_left(system: Rehearsal, case: Case) -> None:
    seed = 10_000 + [known.what for known in one_case_per_row()].index(case.what)
    run = asyncio.run(system.run(replace(case, seed=seed)))
    assert run.happened
    assert (run.problems, run.num_lost, run.num_wrong_tokens, run.num_leaked_blocks) == ([], 0, 0, 0)


def test_no_two_cases_have_one_name() -> None:
    names = [case.what for case in cases()]
    assert len(set(names)) == len(names)
