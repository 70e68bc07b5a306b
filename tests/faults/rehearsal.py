"""A real system that suffers faults under load: processes on Ray, real sockets, the official client.

One run of a case:

1. Its faults are armed.
2. Requests with new prompts are sent, all at once, and read to their end.
3. Wait until everything is in service again: who died has been replaced, who was frozen goes on.
4. Every process checks its books; a hold that is left is a leak.
5. The same requests run again without faults: their tokens are the right ones. One of them is compared with
   transformers' own, too.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from tests.faults.console import CONFIG_NAME
from tests.faults.load import Answer, Client, Question, num_lost, num_wrong, questions
from tests.ray_cluster import END_TIMEOUT_S, ROOT, Pdserve, Up, actors, free_ports, title
from tests.reference import greedy_reference
from tests.small_models import SmallModel

MODEL_NAME = "rehearsal"
SETTLE_TIMEOUT_S = 60.0
"""How long a system may take until it is whole and at rest again; twice what a replacement takes here."""
ANSWER_TIMEOUT_S = 5 * SETTLE_TIMEOUT_S
"""How long an answer of the controller may take: the longest is a rollout, which replaces four workers."""
LOOK_S = 0.02
"""Between two looks at the books: nobody outside is told when a hold ends."""


@dataclass(frozen=True, slots=True)
class Case:
    """How one row of the fault table is provoked."""

    row: str
    """Key of `tests.faults.rows.ROWS`."""
    what: str
    """For people: which process, which state, what happens."""
    faults: tuple[Mapping[str, Any], ...] = ()
    kills: tuple[str, ...] = ()
    """Process ids that end because of it and are replaced; ``controller``: killed by the rehearsal itself."""
    num_requests: int = 8
    output: tuple[int, int] = (20, 80)
    prompt: tuple[int, int] = (30, 220)
    clients_retry: bool = False
    """The client may see a connection error and asks once more."""
    seed: int = 0


@dataclass(slots=True)
class Run:
    """What came of one run of a case."""

    row: str
    what: str
    happened: bool
    """All faults were seen to happen."""
    num_requests: int
    num_lost: int
    num_wrong_tokens: int
    num_leaked_blocks: int
    longest_pause_s: float
    """That a client saw between two events of its stream, or before the first."""
    whole_after_s: float
    """From the first request until everything was in service and at rest again."""
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.happened and not (
            self.num_lost or self.num_wrong_tokens or self.num_leaked_blocks or self.problems
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Console:
    """Blocking questions to the controller of a running system. Each is answered in ANSWER_TIMEOUT_S, or
    fails."""

    def __init__(self, pdserve: Pdserve) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.console"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=pdserve._env(),
            cwd=ROOT,
        )

    def wait_until_ready(self) -> None:
        self._answer()

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """It ends by itself, unless it hangs."""
        try:
            self._process.communicate(timeout=END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        # It says one line per question, so none waits in the stream's own buffer.
        has_said, _, _ = select.select([self._process.stdout], [], [], ANSWER_TIMEOUT_S)
        assert has_said, f"the controller has not answered for {ANSWER_TIMEOUT_S:g} s"
        line = self._process.stdout.readline()
        assert line, "the console has ended"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer


class Rehearsal:
    """A system that allows faults. `run` takes it through one case."""

    def __init__(self, up: Up, console: Console, model: SmallModel) -> None:
        self.up = up
        self._model = model
        self._console = console

    @property
    def url(self) -> str:
        return self.up.url

    async def run(
        self,
        case: Case,
        happen: Callable[[], Awaitable[None]] | None = None,
        heal: Callable[[], None] | None = None,
    ) -> Run:
        """`happen` is what else is done once the first answer has begun, `heal` when there are all."""
        before = await self.status()
        counted = await self._num_faults(before)
        asked = questions(case.num_requests, case.seed, case.prompt, case.output)
        for fault in case.faults:
            await self.arm(fault)
        started_at = time.monotonic()
        async with Client(self.url, MODEL_NAME) as client:
            answering = asyncio.create_task(client.ask_all(asked))
            if "controller" in case.kills:
                self._kill_controller(before)
            if happen is not None:
                await client.begun.wait()
                await happen()
            answers = await answering
            if heal is not None:
                heal()
            problems = await self._whole_again(before, case)
            if case.clients_retry:
                answers = await self._ask_once_more(client, asked, answers)
            leaked, books = await self.at_rest()
            whole_after_s = time.monotonic() - started_at
            happened = await self._have_happened(case, before, counted)
            expected = await client.ask_all(asked)
        problems += books
        problems += [f"request {i}: {answer.error}" for i, answer in enumerate(answers) if answer.error]
        problems += [f"without faults: {answer.error}" for answer in expected if answer.error]
        problems += self._differences_from_transformers(asked, expected)
        return Run(
            case.row,
            case.what,
            happened,
            len(asked),
            num_lost(asked, answers),
            num_wrong(answers, expected),
            leaked,
            round(max(answer.longest_pause_s for answer in answers), 3),
            round(whole_after_s, 2),
            problems,
        )

    async def status(self) -> dict[str, Any]:
        return await self.ask(status=True)

    async def arm(self, fault: Mapping[str, Any]) -> None:
        """Let a process suffer it, from its next such event on."""
        await self.ask(arm=dict(fault))

    async def at_rest(self) -> tuple[int, list[str]]:
        """Wait until nobody holds anything. Blocks that are held all the same, and what the processes find
        wrong with their books."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while True:
            processes = await self.check()
            silent = [process["id"] for process in processes if process["report"] is None]
            reports = [process["report"] for process in processes if process["report"]]
            holders = [holder for report in reports for holder in report["holders"]]
            if not (silent or holders) or time.monotonic() > deadline:
                break
            await asyncio.sleep(LOOK_S)
        problems = [f"{name} is silent" for name in silent]
        problems += [f"{holder['owner']} still holds {holder['num_blocks']} blocks" for holder in holders]
        problems += [problem for report in reports for problem in report["problems"]]
        return sum(holder["num_blocks"] for holder in holders), problems

    async def check(self) -> list[dict[str, Any]]:
        processes: list[dict[str, Any]] = (await self.ask(check=True))["processes"]
        return processes

    async def ask(self, **question: Any) -> dict[str, Any]:
        return await asyncio.to_thread(lambda: self._console.ask(**question))

    async def _whole_again(self, before: Mapping[str, Any], case: Case) -> list[str]:
        """Wait until everything serves and whoever was to end has been replaced. An engine that should have
        ended by itself and has not is a problem, and is ended here."""
        gone = {pid for name, pid in _pids(before).items() if name in case.kills}
        if await self._is_whole(gone):
            return []
        alive = [pid for pid in gone if psutil.pid_exists(pid)]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        assert await self._is_whole(gone), "the system does not come back"
        return [f"process {pid} had to be killed from outside" for pid in alive]

    async def _is_whole(self, gone: set[int]) -> bool:
        seen, deadline = 0, time.monotonic() + SETTLE_TIMEOUT_S
        while (left_s := deadline - time.monotonic()) > 0:
            status = await self.ask(follow=seen, within_s=left_s)
            if not status:
                return False
            seen = status["version"]
            if status["state"] == "ready" and not gone & set(_pids(status).values()):
                return True
        return False

    async def _ask_once_more(
        self, client: Client, asked: Sequence[Question], answers: Sequence[Answer]
    ) -> list[Answer]:
        return [
            await client.ask(question) if answer.error else answer
            for question, answer in zip(asked, answers, strict=True)
        ]

    async def _num_faults(self, status: Mapping[str, Any]) -> dict[str, float]:
        """Process id -> faults that have happened there."""
        async with httpx.AsyncClient(timeout=30.0) as http:
            processes = [*status["routers"], *status["workers"]]
            pages = await asyncio.gather(*[http.get(process["metrics_url"]) for process in processes])
        return {
            process["id"]: sample_sum(page.text, "pdserve_faults_total")
            for process, page in zip(processes, pages, strict=True)
        }

    async def _have_happened(
        self, case: Case, before: Mapping[str, Any], counted: Mapping[str, float]
    ) -> bool:
        """Who was to end has ended, and the others have counted at least one fault for each they were to
        suffer."""
        status = await self.status()
        pids, old = _pids(status), _pids(before)
        if any(pids.get(name) == old[name] for name in case.kills if name in old):
            return False
        now = await self._num_faults(status)
        return all(
            any(now[name] > counted[name] for name in now if _is_meant(fault, name))
            for fault in case.faults
            if fault["process"] not in case.kills and fault["do"] != "kill"
        )

    def _kill_controller(self, status: Mapping[str, Any]) -> None:
        known = set(_pids(status).values())
        (controller,) = [
            process
            for process in actors(self.up)
            if process.pid not in known and "ControllerActor" in title(process)
        ]
        controller.kill()

    def _differences_from_transformers(
        self, asked: Sequence[Question], expected: Sequence[Answer]
    ) -> list[str]:
        """Of the first greedy request: one is enough to know that the run without faults is right."""
        question, answer = next(
            pair for pair in zip(asked, expected, strict=True) if pair[0].temperature == 0
        )
        right = greedy_reference(self._model.reference, question.prompt, question.max_tokens)
        return [] if answer.tokens == right else ["the run without faults differs from transformers"]


@contextlib.contextmanager
def rehearsal(pdserve: Pdserve, model: SmallModel, *options: str, **sections: Any) -> Iterator[Rehearsal]:
    """Two prefill and two decode workers, each with one port to come back to; `sections` replace those of the
    configuration. Nothing is left at the end."""
    file = write_config(pdserve.runtime, model, **sections)
    with (
        pdserve.up("--config", str(file), "--allow-faults", *options) as up,
        contextlib.closing(Console(pdserve)) as console,
    ):
        console.wait_until_ready()
        yield Rehearsal(up, console, model)


def write_config(folder: Path, model: SmallModel, **sections: Any) -> Path:
    """A configuration with short chunks, so that small prompts have several segments."""
    first_port = free_ports(4)
    content = {
        "model": {"path": str(model.folder), "served_name": MODEL_NAME},
        "engine": {"threads": 1, "chunk_tokens": 32, "kv_memory": "16MiB"},
        "pools": {"prefill": {"replicas": 2}, "decode": {"replicas": 2}},
        "router": {"http_port": 0},
        "network": {"worker_ports": f"{first_port}-{first_port + 3}"},
    }
    file = folder / CONFIG_NAME
    file.write_text(yaml.safe_dump(content | sections))
    return file


def sample_sum(page: str, name: str) -> float:
    """Of all samples of one metric on a page in Prometheus' text format."""
    lines = [line for line in page.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _pids(status: Mapping[str, Any]) -> dict[str, int]:
    return {process["id"]: process["pid"] for process in [*status["routers"], *status["workers"]]}


def _is_meant(fault: Mapping[str, Any], process_id: str) -> bool:
    return fault["process"] in (process_id, process_id.rpartition("-")[0])
