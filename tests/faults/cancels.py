"""Clients that go away: a storm of them under load, and how soon both sides' blocks are free."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import httpx

from tests.faults.load import Answer, Client, Question, questions
from tests.faults.rehearsal import MODEL_NAME, Rehearsal, sample_sum

STORM_WIDTH = 25
"""Requests at once."""
MAX_PATIENCE_S = 0.3
"""A request of these sizes takes about so long: clients leave at a random time until then."""
PROMPT = (150, 220)
OUTPUT = (100, 200)


@dataclass(frozen=True, slots=True)
class Cancels:
    """What came of clients that went away."""

    num_cancelled: int
    num_finished: int
    """They were answered before they could leave."""
    num_wrong_tokens: int
    """Of requests that ran beside the storm and were not cancelled."""
    num_leaked_blocks: int
    prefill_free_s: tuple[float, ...]
    """From the client's close until prefill workers hold no block, one cancel at a time, sorted."""
    decode_free_s: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


async def cancel(system: Rehearsal, num_storm: int, num_timed: int, seed: int = 0) -> Cancels:
    """A storm of `num_storm` cancels, and `num_timed` one by one."""
    random = Random(seed)
    async with Client(system.url, MODEL_NAME) as client:
        beside = questions(4, seed + 1, PROMPT, OUTPUT)
        bystanders = asyncio.create_task(client.ask_all(beside))
        num_finished = await _storm(client, questions(num_storm, seed + 2, PROMPT, OUTPUT), random)
        answers = await bystanders
        leaked, problems = await system.at_rest()
        assert not problems, problems
        timed = [
            await _timed(system, client, question, random)
            for question in questions(num_timed, seed + 3, PROMPT, OUTPUT)
        ]
        expected = await client.ask_all(beside)
    return Cancels(
        num_storm - num_finished,
        num_finished,
        sum(one.tokens != other.tokens for one, other in zip(answers, expected, strict=True)),
        leaked,
        tuple(sorted(round(prefill_s, 4) for prefill_s, _ in timed)),
        tuple(sorted(round(decode_s, 4) for _, decode_s in timed)),
    )


async def _storm(client: Client, asked: Sequence[Question], random: Random) -> int:
    """How many were answered to their end."""
    width = asyncio.Semaphore(STORM_WIDTH)

    async def one(question: Question, patience_s: float) -> bool:
        async with width:
            return await _leave_after(client, question, patience_s)

    patience = [random.uniform(0, MAX_PATIENCE_S * 4) for _ in asked]  # slower, with so many at once
    return sum(await asyncio.gather(*map(one, asked, patience)))


async def _leave_after(client: Client, question: Question, patience_s: float) -> bool:
    """Whether the request ended before."""
    answer = Answer()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(patience_s):
            await client.read(question, answer)
    return len(answer.tokens) == question.max_tokens


async def _timed(
    system: Rehearsal, client: Client, question: Question, random: Random
) -> tuple[float, float]:
    """Seconds until the prefill workers and the decode workers hold nothing."""
    workers = (await system.status())["workers"]
    async with httpx.AsyncClient() as http:
        for worker in workers:
            await http.get(worker["metrics_url"])  # so that the connections are there
        await _leave_after(client, question, random.uniform(0, MAX_PATIENCE_S))
        left_at = time.monotonic()
        prefill_at, decode_at = await asyncio.gather(
            *[
                _free_at(http, [worker["metrics_url"] for worker in workers if worker["pool"] == pool])
                for pool in ("prefill", "decode")
            ]
        )
    return prefill_at - left_at, decode_at - left_at


async def _free_at(http: httpx.AsyncClient, metrics_urls: Sequence[str]) -> float:
    """When none of the workers holds a block any more; they are asked again and again."""
    for url in metrics_urls:
        while _num_held((await http.get(url)).text):
            pass
    return time.monotonic()


def _num_held(page: str) -> float:
    held = [line for line in page.splitlines() if 'state="reserved"' in line or 'state="active"' in line]
    return sample_sum("\n".join(held), "pdserve_kv_blocks")
