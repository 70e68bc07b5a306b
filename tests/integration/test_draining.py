"""A worker that leaves while it serves: real model, real sockets, the official client's bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from controller.worker import WorkerSettings
from pdserve.engine.settings import EngineSettings
from tests.faults.load import Client, questions
from tests.local_system import LocalSystem
from tests.small_models import SmallModel, make_model
from tests.small_tokenizers import save_chat_folder

NEVER_S = 3600.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    model = make_model("llama", tmp_path_factory.mktemp("models") / "small-llama", vocab_size=420)
    save_chat_folder(model.folder)
    return model


@asynccontextmanager
async def two_and_two(folder: Path) -> AsyncIterator[tuple[LocalSystem, Client]]:
    engine = EngineSettings(str(folder), threads=1, kv_memory_bytes=16 << 20, chunk_tokens=32)
    settings = WorkerSettings(transports=("grpc",))
    async with LocalSystem(engine, num_prefill=2, num_decode=2, worker_settings=settings) as system:
        info = system.router.model_info()
        assert info is not None
        async with Client(system.url, info.name) as client:
            yield system, client


@pytest.mark.parametrize("deadline_s", [0.0, 0.05, NEVER_S])
@pytest.mark.parametrize("leaver", ["prefill-0", "decode-0"])
def test_no_client_notices(model: SmallModel, leaver: str, deadline_s: float) -> None:
    async def story() -> None:
        async with two_and_two(model.folder) as (system, client):
            asked = questions(12, seed=3)
            answering = asyncio.create_task(client.ask_all(asked))
            await client.begun.wait()
            worker = system.workers[leaver]
            worker.drain(deadline_s)
            await worker.ended()
            assert worker.ledger.owners() == []
            await system.replace_worker(leaver)
            answers = await answering
            await system.at_rest()
            again = await client.ask_all(asked)
            assert [answer.error for answer in [*answers, *again]] == [""] * 24
            assert [answer.tokens for answer in answers] == [answer.tokens for answer in again]
            counted = system.router.registry.get_sample_value
            moved, lost = (
                counted("pdserve_router_recoveries_total", {"cause": cause}) or 0.0
                for cause in ("draining", "worker_lost")
            )
            assert lost == 0, "what is given back is not lost"
            if deadline_s == 0.0 and leaver == "decode-0":
                assert moved > 0
            if deadline_s == NEVER_S:
                assert moved <= 12, "at most each was refused once"

    asyncio.run(story())
