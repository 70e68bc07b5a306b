"""The main of a worker process in tests: prints where it serves, then answers questions on stdin."""

import asyncio
import json
import signal
import sys
from dataclasses import asdict

import torch

from controller.worker import WorkerSettings
from pdserve.contract.messages import Role
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings
from tests.local_system import start_worker


async def main(name: str, role: str, engine: dict[str, object]) -> None:
    torch.set_num_threads(1)
    loaded = ModelEngine.load(EngineSettings(**engine))  # type: ignore[arg-type]
    worker = await start_worker(name, Role(role), loaded, WorkerSettings())
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    loop.add_reader(sys.stdin, _answer, worker, loop, stopping)
    _say({"address": worker.address, "incarnation": worker.incarnation})
    await stopping.wait()
    await worker.stop()


def _answer(worker, loop, stopping) -> None:  # type: ignore[no-untyped-def]
    if not sys.stdin.readline():
        loop.remove_reader(sys.stdin)
        stopping.set()  # the test has gone
        return
    _say(asdict(worker.block_counts()) | {"holds": len(worker.ledger.owners())})


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
