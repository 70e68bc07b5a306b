"""Two workers that cannot reach each other, and everybody else can: requests go by another pair."""

import asyncio
from pathlib import Path

import pytest
import torch

from tests.faults.islands import why_not
from tests.faults.network_cut import cut_while_under_way, system_on_islands
from tests.small_models import make_model
from tests.small_tokenizers import save_chat_folder


@pytest.mark.timeout(300)  # three nodes of Ray start before the system does
def test_a_cut_link_costs_time_and_nothing_else(tmp_path: Path) -> None:
    if reason := why_not():
        pytest.skip(reason)
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path / "small-llama", vocab_size=420)
    save_chat_folder(model.folder)
    with system_on_islands(model) as (system, cluster):
        run = asyncio.run(cut_while_under_way(system, cluster))
    assert run.happened
    assert (run.problems, run.num_lost, run.num_wrong_tokens, run.num_leaked_blocks) == ([], 0, 0, 0)
