"""A prefill worker: the real decisions, and steps and transfers that are formulas."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.ids import SubmitNumber, WorkerId
from pdserve.contract.messages import RequestTimings, Role, WorkerLoad, WorkerState
from pdserve.engine.block_allocator import BlockAllocator
from pdserve.engine.chunking import PromptProgress, chunk_tokens_within
from pdserve.handoff.ledger import BlockHold, BlockLedger
from prefill_worker.scheduler import plan_chunks, wants_more
from simulator.attempt import Attempt
from simulator.events import Events
from simulator.timing import Timing

if TYPE_CHECKING:
    from simulator.decode import DecodeWorker


@dataclass(slots=True)
class Link:
    """A worker's network: one transfer after the other."""

    free_at: float = 0.0


@dataclass(slots=True, eq=False)
class Job:
    """One prompt to compute, as `pdserve.handoff.prefill_job.PrefillJob`."""

    attempt: Attempt
    decode: DecodeWorker
    order: int
    num_computed: int = 0
    num_shipped: int = 0
    """Leading tokens that the decode worker has, or that are on their way."""
    arrives_at: float = 0.0
    """When all that was sent so far is there."""
    transfer_s: float = 0.0
    """Of what was sent so far, waiting for the link included."""
    transfer_tokens: int = 0
    hold: BlockHold | None = field(default=None)
    """None while it is queued, and when the call has ended."""
    ended: bool = False

    @property
    def num_to_compute(self) -> int:
        return self.attempt.num_to_prefill - self.num_computed


class PrefillWorker:
    """Computes prompts, the oldest first, and ships their KV."""

    role = Role.PREFILL
    prefill_share = 1.0

    def __init__(
        self, worker_id: WorkerId, timing: Timing, block_tokens: int, root: ChainRoot, events: Events
    ) -> None:
        self.worker_id = worker_id
        self.link = Link()
        self.allocator = BlockAllocator(timing.pool_tokens // block_tokens, 1)
        self.ledger = BlockLedger(self.allocator)
        self.busy_s = 0.0
        self._timing = timing
        self._block_tokens = block_tokens
        self._root = root
        self._events = events
        self._chunk_tokens = chunk_tokens_within(timing.step_budget_s, timing.cost, timing.chunk_tokens)
        self._jobs: dict[Attempt, Job] = {}
        self._queued: list[tuple[int, Job]] = []  # a heap, oldest first
        self._starting: dict[Job, None] = {}
        self._ready: dict[Job, None] = {}
        self._num_jobs = 0
        self._num_steps = 0
        self._in_step = False
        self._waiting_tokens = 0
        self._tokens_per_s = 0.0

    # What decode workers ask for.

    def open(self, attempt: Attempt, decode: DecodeWorker) -> None:
        """Compute the attempt's prompt for `decode`."""
        if attempt.hold is None:  # it has ended on the way
            return
        self._num_jobs += 1
        job = self._jobs[attempt] = Job(attempt, decode, self._num_jobs)
        self._waiting_tokens += job.num_to_compute
        heapq.heappush(self._queued, (job.order, job))
        self._wake()

    def cancel(self, attempt: Attempt) -> None:
        """The decode worker has given it up."""
        if attempt in self._jobs:
            self._leave(self._jobs[attempt])

    # What the worker tells.

    @property
    def is_busy(self) -> bool:
        return bool(self._jobs)

    def load(self) -> WorkerLoad:
        """As `controller.worker.Worker.load`."""
        return WorkerLoad(
            state=WorkerState.READY,
            waiting_requests=len(self._queued) + len(self._starting),
            waiting_tokens=self._waiting_tokens,
            running_sequences=len(self._ready),
            running_context_tokens=sum(job.num_computed for job in self._ready),
            blocks=self.ledger.counts(),
            step=self._num_steps,
            last_submit=SubmitNumber(0),
            prefill_tokens_per_s=self._tokens_per_s,
            decode_step_s=0.0,
            prefill_slowdown=1.0,
            decode_slowdown=1.0,
        )

    def check_empty(self) -> None:
        """Raises AssertionError unless everything has ended and every block came back."""
        self.ledger.check_integrity()
        assert not self.ledger.holds, f"{self.worker_id} still holds blocks"
        assert not self._jobs, f"{self.worker_id} still has calls"
        assert not self._waiting_tokens, (
            f"{self.worker_id} still has {self._waiting_tokens} tokens to compute"
        )

    # The loop.

    def _wake(self) -> None:
        if not self._in_step:
            self._begin()

    def _begin(self) -> None:
        self._admit()
        if not self._ready:
            return
        progress = [PromptProgress(job.num_computed, job.attempt.num_to_prefill) for job in self._ready]
        stops = plan_chunks(progress, self._chunk_tokens, self._timing.cost, self._timing.step_budget_s)
        chunks = list(zip(self._ready, stops, strict=False))
        seconds = self._timing.cost.fixed_s
        seconds += sum(self._timing.prefill_s(job.num_computed, stop) for job, stop in chunks)
        self._in_step = True
        self._events.after(seconds, lambda: self._computed(chunks, seconds))

    def _admit(self) -> None:
        in_line = sum(job.num_to_compute for job in self._ready)
        in_line += sum(job.num_to_compute for job in self._starting)
        while wants_more(in_line, self._chunk_tokens):
            job = self._start_next()
            if job is None:
                return
            in_line += job.num_to_compute

    def _start_next(self) -> Job | None:
        """Reserve the oldest waiting prompt; None when none waits or it does not fit."""
        while self._queued and self._queued[0][1].ended:
            heapq.heappop(self._queued)
        if not self._queued:
            return None
        job = self._queued[0][1]
        hold = self.ledger.open(f"prefill {job.attempt.request.index}/{job.attempt.number}")
        num_cached = hold.adopt_prefix(self._root, job.attempt.prompt_blocks) * self._block_tokens
        if job.attempt.num_blocks_to_prefill - len(hold.block_ids) > self.ledger.num_available:
            hold.release()
            return None
        hold.grow_to(job.attempt.num_blocks_to_prefill)
        heapq.heappop(self._queued)
        job.hold = hold
        job.num_computed = job.attempt.num_cached = num_cached
        self._waiting_tokens -= num_cached
        self._starting[job] = None
        self._events.after(self._timing.message_s, lambda: self._ask(job))
        return job

    def _ask(self, job: Job) -> None:
        """The decode worker reserves, or has no room; its answer takes its time."""
        if job.ended:
            return
        ask_again_s = job.decode.reserve(job.attempt)
        answer = self._reserved if ask_again_s is None else self._put_back
        self._events.after(self._timing.message_s, lambda: answer(job, ask_again_s or 0.0))

    def _reserved(self, job: Job, _: float) -> None:
        if job.ended:
            return
        del self._starting[job]
        self._ready[job] = None
        if job.hold is not None:
            job.hold.activate()
        job.num_shipped = min(job.attempt.num_computed, job.attempt.num_to_prefill)
        self._ship(job, job.num_computed, self._events.now, 0.0)
        self._wake()

    def _put_back(self, job: Job, ask_again_s: float) -> None:
        if job.ended:
            return
        del self._starting[job]
        self._waiting_tokens += job.num_computed
        job.num_computed = 0
        self._release(job)
        self._events.after(ask_again_s, lambda: self._offer_again(job))
        self._wake()

    def _offer_again(self, job: Job) -> None:
        if not job.ended:
            heapq.heappush(self._queued, (job.order, job))
            self._wake()

    def _computed(self, chunks: list[tuple[Job, int]], seconds: float) -> None:
        self._in_step = False
        self._num_steps += 1
        self.busy_s += seconds
        self._tokens_per_s = sum(stop - job.num_computed for job, stop in chunks) / seconds
        for job, stop in chunks:
            if not job.ended:  # else it was cancelled during the step
                self._advance(job, stop, seconds)
        self._begin()

    def _advance(self, job: Job, stop: int, seconds: float) -> None:
        self._waiting_tokens -= stop - job.num_computed
        job.num_computed = stop
        assert job.hold is not None
        job.hold.publish(self._root, job.attempt.request.block_ids, stop // self._block_tokens)
        if stop < job.attempt.num_to_prefill:
            self._ship(job, stop, self._events.now, 0.0)
        else:
            self._complete(job, seconds)

    def _complete(self, job: Job, seconds: float) -> None:
        """The first token leaves at once, past the KV."""
        attempt, decode = job.attempt, job.decode
        del self._ready[job]
        self._events.after(self._timing.message_s, lambda: decode.first_token(attempt))
        if attempt.num_to_decode:
            self._ship(job, attempt.num_to_prefill, self._events.now, seconds)
            self._events.at(job.arrives_at + self._timing.message_s, lambda: self._sealed(job))
        else:
            self._events.after(2 * self._timing.message_s, lambda: self._leave(job))

    def _sealed(self, job: Job) -> None:
        if not job.ended:
            self._leave(job)
            job.decode.sealed(job.attempt, self._timings(job))

    def _timings(self, job: Job) -> RequestTimings:
        return RequestTimings(
            transfer_s=job.transfer_s,
            transfer_bytes=job.transfer_tokens * self._timing.kv_bytes_per_token,
            transfer_is_whole=True,
        )

    def _ship(self, job: Job, stop: int, ready_at: float, step_s: float) -> None:
        """Send what is new of the first `stop` tokens. The last chunk's KV leaves in parts while its step of
        `step_s` runs, all but its tail."""
        num_tokens = max(0, stop - job.num_shipped)
        seconds = self._timing.transfer_s(num_tokens)
        tail_share = self._timing.tail_share if step_s else 1.0
        may_begin_at = ready_at - (1 - tail_share) * step_s
        begins_at = max(may_begin_at, self.link.free_at, job.decode.link.free_at)
        if num_tokens:
            job.transfer_tokens += num_tokens
            job.transfer_s += begins_at - may_begin_at + seconds
        job.arrives_at = max(begins_at + seconds, ready_at + tail_share * seconds, job.arrives_at)
        self.link.free_at = job.decode.link.free_at = max(begins_at + seconds, self.link.free_at)
        job.num_shipped = max(stop, job.num_shipped)

    def _leave(self, job: Job) -> None:
        """The call has ended: another may have room now."""
        if job.ended:
            return
        job.ended = True
        self._waiting_tokens -= job.num_to_compute
        del self._jobs[job.attempt]
        self._starting.pop(job, None)
        self._ready.pop(job, None)
        self._release(job)
        self._wake()

    def _release(self, job: Job) -> None:
        if job.hold is not None:
            job.hold.release()
            job.hold = None
