"""A poisonous request is found out and refused; those beside it get their answers."""

import asyncio
from pathlib import Path

import torch

from tests.faults.poison import poison, poisonable_system
from tests.small_models import make_model
from tests.small_tokenizers import save_chat_folder


def test_a_poisonous_request_is_condemned_and_nobody_else_is_harmed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path / "small-llama", vocab_size=420)
    save_chat_folder(model.folder)
    with poisonable_system(model) as system:
        run = asyncio.run(poison(system))
    assert run.happened
    assert (run.problems, run.num_lost, run.num_wrong_tokens, run.num_leaked_blocks) == ([], 0, 0, 0)
