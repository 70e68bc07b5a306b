"""What the commands find out before they ask a controller."""

from pathlib import Path

import pytest

from controller import running
from controller.model_files import resolve_model
from controller.plan import ModelSource
from controller.pool_commands import model_of
from pdserve.config import load_config
from pdserve.contract.errors import ConfigError, NotFound
from pdserve.demo import demo_model_path


@pytest.fixture(autouse=True)
def no_system_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def test_the_model_of_a_system_on_a_cluster_is_no_folder_of_this_machine() -> None:
    """Its file need not tell where Ray is: `pdserve up --address` may have."""
    config = load_config(None, {"model.path": "some/model", "model.revision": "v2"})
    running.announce(running.this_launcher("default", is_local=False))
    assert model_of(config, None) == ModelSource("some/model", "v2", "some/model")
    running.withdraw("default")
    assert model_of(config, "head:6379") == ModelSource("some/model", "v2", "some/model")
    with pytest.raises(NotFound, match="no system named 'default' runs here"):
        model_of(config, None)


def test_workers_that_take_turns_need_no_room_for_all_at_once() -> None:
    """The workers that run now have it."""
    running.announce(running.this_launcher("default", is_local=True))
    config = load_config(None, {"engine.kv_memory": "100TiB", "model.device": "cpu"})
    assert model_of(config, None).path == str(demo_model_path().absolute())
    with pytest.raises(ConfigError, match="KV pools do not fit"):
        resolve_model(config, fetch=True)
