"""Ray's head dies: requests are served all the same, commands say what is wrong, nothing is left."""

import asyncio
from pathlib import Path

import psutil
import torch

from tests.faults.head import kill_head, lose_head
from tests.faults.rehearsal import rehearsal
from tests.ray_cluster import complete, private_pdserve
from tests.small_models import make_model
from tests.small_tokenizers import save_chat_folder


def test_requests_outlive_rays_head(tmp_path: Path) -> None:
    """The end of the block is Ctrl-C, after which nothing may be left."""
    torch.set_num_threads(1)
    model = make_model("llama", tmp_path / "small-llama", vocab_size=420)
    save_chat_folder(model.folder)
    with private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
        run = asyncio.run(lose_head(system, away_s=0.0))
    assert run.happened
    assert (run.problems, run.num_lost, run.num_wrong_tokens, run.num_leaked_blocks) == ([], 0, 0, 0)


def test_commands_say_that_rays_head_is_gone() -> None:
    with private_pdserve() as pdserve:
        up = pdserve.run("up", "--port", "0", "--set", "engine.kv_memory=16MiB", "--detach")
        assert (up.returncode, up.stderr) == (0, ""), up.stdout
        url = pdserve.record()["url"]
        before = complete(url, [5, 6, 7, 8])
        kill_head(psutil.Process(pdserve.record()["launcher_pid"]))
        for command in (["status"], ["status", "--json"], ["check"]):
            refusal = pdserve.refusal(*command)
            assert "Ray's head at " in refusal
            assert f"{url} still serves requests" in refusal
            assert "`pdserve down --name default`" in refusal
        assert complete(url, [5, 6, 7, 8]) == before
        down = pdserve.run("down")
        assert (down.returncode, down.stdout, down.stderr) == (0, "default is down\n", "")
        assert (pdserve.processes(), pdserve.records()) == ([], [])
