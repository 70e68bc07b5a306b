"""One system on Ray for all tests that only use it: starting one takes most of their time."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.ray_cluster import Pdserve, Up, private_pdserve
from tests.small_models import SmallModel, make_model
from tests.small_tokenizers import save_chat_folder

VOCAB = 420


@dataclass(frozen=True)
class RaySystem:
    """A running `pdserve up` with a small random Llama, split."""

    pdserve: Pdserve
    up: Up
    model: SmallModel

    @property
    def url(self) -> str:
        return self.up.url


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """A small random Llama with a tokeniser and a chat template."""
    model = make_model("llama", tmp_path_factory.mktemp("models") / "small-llama", vocab_size=VOCAB)
    save_chat_folder(model.folder)
    return model


@pytest.fixture(scope="session")
def pdserve() -> Iterator[Pdserve]:
    with private_pdserve() as pdserve:
        yield pdserve


@pytest.fixture(scope="session")
def ray_system(pdserve: Pdserve, chat_model: SmallModel) -> Iterator[RaySystem]:
    options = ["--port", "0", "--threads", "1", "--set", "engine.kv_memory=16MiB"]
    for process, price in (("pools.prefill", 2.0), ("pools.decode", 3.0), ("router", 0.5)):
        options += ["--set", f"{process}.price_per_hour={price}"]
    with pdserve.up("--model", str(chat_model.folder), *options) as up:
        yield RaySystem(pdserve, up, chat_model)
