"""The main of a worker process in tests: prints where it serves, then answers questions on stdin."""

import asyncio
import json
import signal
import sys
from dataclasses import asdict

import torch

from controller.worker import Worker, WorkerSettings
from pdserve.contract.messages import Role
from pdserve.engine.engine import ModelEngine
from pdserve.engine.settings import EngineSettings
from tests.held_steps import HeldSteps
from tests.local_system import start_worker


async def main(name: str, role: str, engine: dict[str, object]) -> None:
    torch.set_num_threads(1)
    loaded = ModelEngine.load(EngineSettings(**engine))  # type: ignore[arg-type]
    worker = await start_worker(name, Role(role), loaded, WorkerSettings())
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    answers = _Answers(worker)
    answering = asyncio.create_task(_answer_all(answers, stopping))
    _say({"address": worker.address, "incarnation": worker.incarnation})
    await stopping.wait()
    answering.cancel()
    answers.release()
    await worker.stop()


async def _answer_all(answers: "_Answers", stopping: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        _say(await answers.answer(line.decode()))
    stopping.set()  # the test has gone


class _Answers:
    """To the lines that the test writes, in order."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._held: HeldSteps | None = None

    async def answer(self, line: str) -> dict[str, object]:
        match line.split():
            case ["blocks"]:
                return asdict(self._worker.block_counts()) | {"holds": len(self._worker.ledger.owners())}
            case ["metric", name, *labels]:
                labels_of = dict(label.split("=") for label in labels) | {"pool": self._worker.role.value}
                return {"value": self._worker.registry.get_sample_value(f"pdserve_{name}", labels_of) or 0.0}
            case ["hold", num_free]:
                self._held = HeldSteps(self._worker, int(num_free))
            case ["standing"]:
                assert self._held is not None
                await self._held.standing()
            case ["release"]:
                self.release()
            case other:
                raise ValueError(f"{other} is no question")
        return {}

    def release(self) -> None:
        """Let the engine run on, if it was held."""
        if self._held is not None:
            self._held.release()


def _say(answer: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1])))
