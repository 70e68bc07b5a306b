"""The engine loop of a prefill worker: admit, schedule, run, publish."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass

from pdserve.contract.ports import Clock, EngineExecutor
from pdserve.contract.work import ModelInfo, StepBatch, StepCost, StepResult
from pdserve.engine.chunking import PromptProgress, chunk_tokens_within
from pdserve.engine.step_pace import StepPace
from pdserve.handoff.ledger import BlockLedger
from pdserve.handoff.prefill_job import JobState, PrefillJob
from pdserve.handoff.sending import PrefillSource
from pdserve.metrics import WorkerMetrics
from prefill_worker.scheduler import plan_chunks, wants_more


@dataclass(frozen=True, slots=True)
class Chunk:
    """One job's part of a step: its prompt is computed up to `stop`."""

    job: PrefillJob
    stop: int


class PrefillLoop:
    """Runs the jobs of a `PrefillSource`. Everything but the step itself happens on the event loop."""

    def __init__(
        self,
        info: ModelInfo,
        cost: StepCost,
        executor: EngineExecutor,
        ledger: BlockLedger,
        source: PrefillSource,
        clock: Clock,
        metrics: WorkerMetrics,
        work: asyncio.Event,
        step_budget_s: float,
    ) -> None:
        """`work` is set by whoever brings or changes work (the source's `wake`)."""
        self.num_steps = 0
        self.prefill_tokens_per_s = 0.0
        self.pace = StepPace(cost)
        self.decode_step_s = 0.0  # it never decodes
        self._info = info
        self._cost = cost
        self._executor = executor
        self._ledger = ledger
        self._source = source
        self._clock = clock
        self._metrics = metrics
        self._work = work
        self._step_budget_s = step_budget_s
        self._chunk_tokens = chunk_tokens_within(step_budget_s, cost, info.chunk_tokens)

    @property
    def running_sequences(self) -> int:
        return len(self._source.in_state(JobState.READY))

    @property
    def running_context_tokens(self) -> int:
        return sum(job.num_computed for job in self._source.in_state(JobState.READY))

    @property
    def waiting_requests(self) -> int:
        return self._source.num_waiting_requests

    @property
    def waiting_since(self) -> list[float]:
        """When each of them came."""
        return self._source.waiting_since

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._work.clear()
            self._admit()
            chunks = self._schedule()
            if chunks:
                self._publish(chunks, await self._step(chunks))
            else:
                await self._work.wait()

    async def over(self) -> None:
        """Nothing outlives `run`: the calls are their handlers'."""

    def _admit(self) -> None:
        num_tokens = self._source.num_tokens_in_line
        while wants_more(num_tokens, self._chunk_tokens):
            job = self._source.start_next(self._ledger)
            if job is None:
                return
            num_tokens += job.num_to_compute

    def _schedule(self) -> list[Chunk]:
        ready = self._source.in_state(JobState.READY)
        progress = [PromptProgress(job.num_computed, job.num_prompt) for job in ready]
        stops = plan_chunks(progress, self._chunk_tokens, self._cost, self._step_budget_s)
        return [Chunk(job, stop) for job, stop in zip(ready, stops, strict=False)]

    async def _step(self, chunks: list[Chunk]) -> StepResult:
        batch = StepBatch([chunk.job.next_step(chunk.stop) for chunk in chunks])
        ending = [chunk.job for chunk in chunks if chunk.stop == chunk.job.num_prompt]
        with ExitStack() as in_use:
            for chunk in chunks:
                in_use.enter_context(chunk.job.hold.in_use())
            result = await self._executor.step(batch, self._source.follow_layers(ending))
        self.num_steps += 1
        self.pace.note(batch, result.seconds)
        self.prefill_tokens_per_s = batch.num_new_tokens / max(result.seconds, 1e-9)
        self._metrics.engine.observe_step(batch, result.seconds)
        self._metrics.prompt_tokens.inc(batch.num_new_tokens)
        return result

    def _publish(self, chunks: list[Chunk], result: StepResult) -> None:
        now = self._clock.now()
        for chunk, sampled in zip(chunks, result.sampled, strict=True):
            if chunk.job in self._source.jobs:  # else its call ended during the step
                chunk.job.advance(chunk.stop, sampled, self._info.eos_token_ids, now)
                self._metrics.generated_tokens.inc(sampled is not None)
