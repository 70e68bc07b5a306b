"""Sends requests when they are due, and keeps out of their way."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from load_generator.records import Record
from load_generator.target import Target
from load_generator.traces import PlannedRequest
from pdserve.contract.ports import Clock

PROGRESS_INTERVAL_S = 1.0
AHEAD_S = 1.0
"""How long before a request is due its body is made."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run is."""

    seconds: float
    num_planned: int
    num_sent: int
    num_ended: int
    num_failed: int

    @property
    def num_running(self) -> int:
        return self.num_sent - self.num_ended


class Run:
    """One run against one target."""

    def __init__(
        self,
        target: Target,
        planned: Sequence[PlannedRequest],
        clock: Clock,
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        self._target = target
        self._records = [Record(index, request) for index, request in enumerate(planned)]
        self._clock = clock
        self._tell = tell
        self._began_at = clock.now()

    async def open_loop(self) -> list[Record]:
        """Send every request when it is due, whatever became of the others. Returns when all have ended."""
        async with asyncio.TaskGroup() as requests:
            watch = asyncio.create_task(self._watch())
            for record in self._records:
                await self._sleep_until(record.planned.due_s - AHEAD_S)
                body = self._target.body(record)
                await self._sleep_until(record.planned.due_s)
                requests.create_task(self._target.send(record, body, self._now))
        watch.cancel()
        return self._records

    async def closed_loop(self, concurrency: int) -> list[Record]:
        """`concurrency` requests are in flight all the time; each is due when the one before it has ended."""
        waiting = iter(self._records)

        async def client() -> None:
            for record in waiting:
                body = self._target.body(record)
                record.planned = _due_now(record.planned, self._now())
                await self._target.send(record, body, self._now)

        async with asyncio.TaskGroup() as clients:
            watch = asyncio.create_task(self._watch())
            for _ in range(concurrency):
                clients.create_task(client())
        watch.cancel()
        return self._records

    def _now(self) -> float:
        return self._clock.now() - self._began_at

    async def _sleep_until(self, due_s: float) -> None:
        delay_s = due_s - self._now()
        if delay_s > 0:
            await self._clock.sleep(delay_s)

    async def _watch(self) -> None:
        while True:
            await self._clock.sleep(PROGRESS_INTERVAL_S)
            self._tell(self._progress())

    def _progress(self) -> Progress:
        return Progress(
            self._now(),
            len(self._records),
            sum(record.sent_at is not None for record in self._records),
            sum(record.ended_at is not None for record in self._records),
            sum(record.error is not None for record in self._records),
        )


def _due_now(request: PlannedRequest, now: float) -> PlannedRequest:
    return PlannedRequest(
        now, request.num_prompt_tokens, request.num_output_tokens, request.prefix_ids, request.block_tokens
    )
