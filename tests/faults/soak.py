"""`make soak`: mixed load with faults for a long time, and everything stays flat.

python -m tests.faults.soak [--minutes M] [--output FILE]

Eight clients ask one question after the other, of a set whose answers are known and which is larger than
the KV pools. One request in twenty goes wrong on purpose: its client leaves, sets a deadline that is too
short, or reads slowly, or a worker is killed or frozen while it runs. Every request must end as its kind
says.
"""

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch

from benchmarks.conditions import conditions
from tests.faults.load import Answer, Client, Question, questions
from tests.faults.matrix import small_chat_model
from tests.faults.rehearsal import MODEL_NAME, Rehearsal, rehearsal
from tests.ray_cluster import ROOT, actors, private_pdserve, title

OUTPUT = ROOT / "benchmarks" / "results" / "soak-cpu.json"
NUM_CLIENTS = 8
NUM_QUESTIONS = 300
FAULT_SHARE = 0.05
WORKER_FAULT_EVERY_S = 40.0
"""With four workers each is let alone for longer than it takes until its deaths are forgotten."""
LOOK_EVERY_S = 15.0
WORKERS = ("decode-0", "prefill-0", "decode-1", "prefill-1")


class Kind(StrEnum):
    """Of a request, by what its client does."""

    PLAIN = "plain"
    LEAVES = "leaves"
    DEADLINE = "deadline"
    SLOW = "slow"


@dataclass
class Tally:
    """What became of all requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_faults: int = 0
    num_wrong_tokens: int = 0
    unaccounted: list[str] = field(default_factory=list)
    """Those that ended as they should not have, in words."""


@dataclass
class Soak:
    """One system from its start to rest."""

    system: Rehearsal
    seconds: float
    random: Random
    tally: Tally = field(default_factory=Tally)
    samples: list[dict[str, float]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _ends_at: float = 0.0
    _next_worker_fault_at: float = 0.0

    async def run(self) -> dict[str, Any]:
        asked = questions(NUM_QUESTIONS, seed=7)
        async with Client(self.system.url, MODEL_NAME) as client:
            known = {question: await client.ask(question) for question in asked}
            self._ends_at = time.monotonic() + self.seconds
            self._next_worker_fault_at = time.monotonic() + WORKER_FAULT_EVERY_S / 2
            victims = itertools.cycle(WORKERS)
            async with asyncio.TaskGroup() as tasks:
                for _ in range(NUM_CLIENTS):
                    tasks.create_task(self._ask_on(client, known, victims))
                tasks.create_task(self._look_on())
        leaked, problems = await self.system.at_rest()
        return self._result(leaked, self.problems + problems)

    async def _ask_on(
        self, client: Client, known: Mapping[Question, Answer], victims: "itertools.cycle[str]"
    ) -> None:
        asked = list(known)
        while time.monotonic() < self._ends_at:
            question = self.random.choice(asked)
            kind = Kind.PLAIN
            if self.random.random() < FAULT_SHARE:
                kind = await self._go_wrong(victims)
            await self.ask(client, question, kind, known[question])

    async def _go_wrong(self, victims: "itertools.cycle[str]") -> Kind:
        """A fault of a worker when it is time for one, else one of the client."""
        self.tally.num_faults += 1
        now = time.monotonic()
        if now < self._next_worker_fault_at or now > self._ends_at - WORKER_FAULT_EVERY_S / 2:
            return self.random.choice([Kind.LEAVES, Kind.DEADLINE, Kind.SLOW])
        self._next_worker_fault_at = now + WORKER_FAULT_EVERY_S
        fault: dict[str, Any] = {"process": next(victims), "at": "step", "nth": self.random.randint(1, 5)}
        fault |= self.random.choice([{"do": "kill"}, {"do": "fail"}, {"do": "freeze", "seconds": 8.0}])
        await self.system.arm(fault)
        return Kind.PLAIN

    async def _ask(self, client: Client, question: Question, kind: Kind, right: Answer) -> None:
        answer = Answer()
        deadline_s = self.random.uniform(0.02, 0.3) if kind is Kind.DEADLINE else None
        pause_s = 0.02 if kind is Kind.SLOW else 0.0
        patience_s = self.random.uniform(0.0, 0.3) if kind is Kind.LEAVES else None
        has_left = False
        try:
            async with asyncio.timeout(patience_s):
                await client.read(question, answer, deadline_s=deadline_s, pause_s=pause_s)
        except TimeoutError:
            has_left = True
        self._account(question, kind, has_left, answer, right)

    def _account(self, question: Question, kind: Kind, has_left: bool, answer: Answer, right: Answer) -> None:
        wrong = sum(one != other for one, other in zip(answer.tokens, right.tokens, strict=False))
        self.tally.num_wrong_tokens += wrong
        if answer.tokens == right.tokens and not answer.error:
            outcome = "answered"
        elif has_left:
            outcome = "left"
        elif kind is Kind.DEADLINE and "deadline" in answer.error:
            outcome = "past its deadline"
        else:
            outcome = "unaccounted for"
            got = f"{len(answer.tokens)} of {question.max_tokens} tokens"
            self.tally.unaccounted.append(f"{kind}: {got}, {answer.error or 'no error'}")
        self.tally.outcomes[outcome] += 1

    async def _look_on(self) -> None:
        """Sizes of all processes, and their books, again and again."""
        while time.monotonic() < self._ends_at:
            self.samples.append(await self._sizes())
            for process in await self.system.check():
                if process["report"]:
                    self.problems += process["report"]["problems"]
            await asyncio.sleep(min(LOOK_EVERY_S, max(0.0, self._ends_at - time.monotonic())))
        self.samples.append(await self._sizes())

    async def _sizes(self) -> dict[str, float]:
        """By process and size. A process that was just replaced counts from then on."""
        status = await self.system.status()
        found = {process["id"]: process["pid"] for process in [*status["routers"], *status["workers"]]}
        controllers = [
            process.pid for process in actors(self.system.up) if "ControllerActor" in title(process)
        ]
        found |= {"controller": controllers[0]} if controllers else {}
        sizes: dict[str, float] = {}
        for name, pid in found.items():
            try:
                process = psutil.Process(pid)
                memory = process.memory_info()
                sizes[f"{name} memory MiB"] = round((memory.rss - memory.shared) / 2**20, 1)
                sizes[f"{name} shared memory MiB"] = round(memory.shared / 2**20, 1)
                sizes[f"{name} open files"] = process.num_fds()
            except (psutil.Error, TypeError):  # it is being replaced
                continue
        return sizes

    def _result(self, leaked: int, problems: Sequence[str]) -> dict[str, Any]:
        first = self.samples[len(self.samples) // 5]
        last = self.samples[-1]
        return {
            "minutes": round(self.seconds / 60, 2),
            "num_requests": sum(self.tally.outcomes.values()),
            "outcomes": dict(self.tally.outcomes),
            "num_faults": self.tally.num_faults,
            "num_wrong_tokens": self.tally.num_wrong_tokens,
            "num_unaccounted": len(self.tally.unaccounted),
            "unaccounted": self.tally.unaccounted[:20],
            "num_leaked_blocks": leaked,
            "problems": list(problems),
            "growth": [(name, first[name], last[name]) for name in sorted(first) if name in last],
            "samples": self.samples,
        }


def main() -> int:
    """0 when every request is accounted for and nothing is wrong or left."""
    options = _options()
    torch.set_num_threads(1)
    with small_chat_model() as model, private_pdserve() as pdserve, rehearsal(pdserve, model) as system:
        result = asyncio.run(Soak(system, 60 * options.minutes, Random(options.seed)).run())
    content = {"conditions": conditions("soak", "tests.faults.soak"), **result}
    options.output.write_text(json.dumps(content, indent=1) + "\n")
    shown = {key: value for key, value in result.items() if key not in ("samples", "growth")}
    sys.stdout.write(json.dumps(shown, indent=1) + "\n")
    failures = ("num_unaccounted", "num_wrong_tokens", "num_leaked_blocks", "problems")
    return 1 if any(result[key] for key in failures) else 0


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="how long clients ask")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the results are written")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
