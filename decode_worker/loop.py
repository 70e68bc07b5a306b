"""The engine loop of a decode worker: admit, schedule, run, publish."""

import asyncio
import itertools
import logging
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from decode_worker.request import DecodeRequest, Phase, TokenSink
from decode_worker.scheduler import choose_victim, may_reserve, plan_chunks
from pdserve.contract.block_names import ChainRoot
from pdserve.contract.errors import (
    ErrorCode,
    ErrorInfo,
    PdserveError,
    Preempted,
    PrefillFailed,
    ProtocolViolation,
    RequestTooLong,
    Unavailable,
)
from pdserve.contract.ids import SubmitNumber, WorkerId
from pdserve.contract.messages import (
    Busy,
    Failed,
    FirstToken,
    PrefillOpen,
    PrefillSource,
    Refused,
    RequestTimings,
    Submit,
    TokenEvent,
)
from pdserve.contract.ports import Clock, EngineExecutor, Rpc
from pdserve.contract.sampling import finish_reason
from pdserve.contract.tokens import num_tokens, pack_tokens
from pdserve.contract.work import (
    ModelInfo,
    SampledToken,
    SequenceStep,
    StepBatch,
    StepCost,
    StepResult,
    TokenLogprobs,
)
from pdserve.engine.chunking import PromptProgress
from pdserve.handoff.ledger import BlockLedger
from pdserve.handoff.prefill_job import JobState, PrefillJob
from pdserve.handoff.receiving import FetchStats, PrefillFetch
from pdserve.handoff.sending import PrefillSource as PrefillCalls
from pdserve.handoff.transports.negotiation import Transports
from pdserve.metrics import WorkerMetrics

log = logging.getLogger(__name__)

ASK_AGAIN_MS = 20
MAX_ASK_AGAIN_MS = 400
"""When a prefill worker whose request finds no room is to ask again: this often for the oldest such request,
and at least this often for any."""


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    step_budget_s: float = 0.2
    """What one step should take at most when prompts are computed beside the running batch."""
    growth_reserve_blocks: int = 1
    """Blocks kept free for each running sequence when a new request reserves."""
    starvation_s: float = 1.0
    """A request that has found no room for this long keeps younger ones from reserving before it."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    decoding: list[DecodeRequest]
    prefilling: list[tuple[DecodeRequest, int]]  # (request, stop of its chunk)
    jobs: list[tuple[PrefillJob, int]]  # prompts of other workers, (job, stop of its chunk)
    sinks: set[TokenSink] = field(default_factory=set)  # whom the step's results concern

    def __bool__(self) -> bool:
        return bool(self.decoding or self.prefilling or self.jobs)

    @property
    def parts(self) -> list[SequenceStep]:
        return [
            *(request.decode_step() for request in self.decoding),
            *(request.prefill_step(stop) for request, stop in self.prefilling),
            *(job.next_step(stop) for job, stop in self.jobs),
        ]


class DecodeLoop:
    """All submissions of one decode worker. Everything but the step itself happens on the event loop."""

    def __init__(
        self,
        worker_id: WorkerId,
        info: ModelInfo,
        cost: StepCost,
        executor: EngineExecutor,
        ledger: BlockLedger,
        calls: PrefillCalls,
        transports: Transports,
        rpc: Rpc,
        clock: Clock,
        metrics: WorkerMetrics,
        work: asyncio.Event,
        settings: DecodeSettings,
    ) -> None:
        """`calls` are the Prefill calls of other workers; `work` is set by whoever brings or changes work."""
        self.num_steps = 0
        self.last_step_s = 0.0
        self.draining = False
        self._worker_id = worker_id
        self._info = info
        self._cost = cost
        self._executor = executor
        self._ledger = ledger
        self._calls = calls
        self._transports = transports
        self._rpc = rpc
        self._clock = clock
        self._metrics = metrics
        self._work = work
        self._settings = settings
        self._requests: dict[tuple[TokenSink, SubmitNumber], DecodeRequest] = {}  # live, oldest first
        self._fetches: set[asyncio.Task[None]] = set()

    # What routers ask for.

    def submit(self, sink: TokenSink, submit: Submit) -> None:
        """Take a submission, or refuse it at once."""
        refusal = self._refusal(submit)
        if refusal is not None:
            self._metrics.count_end(refusal.info.code.value)
            sink.answer(Refused(submit.number, refusal.info))
            return
        request = self._enrol(sink, submit)
        if submit.prefill is not None:
            request.fetch = asyncio.create_task(self._fetch(request, submit.prefill))
            self._fetches.add(request.fetch)
            request.fetch.add_done_callback(self._fetches.discard)
        self._work.set()

    def cancel(self, sink: TokenSink, number: SubmitNumber) -> None:
        """The router does not want a submission any more. It may have ended already."""
        request = self._requests.get((sink, number))
        if request is not None:
            self._end(request, ErrorCode.CANCELLED.value)

    def drop(self, sink: TokenSink) -> None:
        """A Session has broken: cancel all that came through it."""
        for request in [request for request in self._requests.values() if request.sink is sink]:
            self._end(request, ErrorCode.CANCELLED.value)

    # What the worker tells.

    def in_phase(self, phase: Phase) -> list[DecodeRequest]:
        """The requests in `phase`, oldest first."""
        return [request for request in self._requests.values() if request.phase is phase]

    @property
    def num_requests(self) -> int:
        return len(self._requests)

    @property
    def running_sequences(self) -> int:
        return len(self.in_phase(Phase.DECODING))

    @property
    def running_context_tokens(self) -> int:
        return sum(request.num_computed for request in self.in_phase(Phase.DECODING))

    @property
    def waiting_requests(self) -> int:
        return len(self._requests) - self.running_sequences + len(self._calls.in_state(JobState.QUEUED))

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that this worker itself is still to compute."""
        local = (
            r for r in self._requests.values() if r.submit.prefill is None and r.phase is not Phase.DECODING
        )
        return sum(request.num_to_prefill - request.num_computed for request in local)

    # The loop.

    async def run(self) -> None:
        """Until cancelled; then every request and fetch is ended."""
        try:
            while True:
                self._work.clear()
                self._admit()
                plan = self._schedule()
                if plan:
                    self._publish(plan, await self._step(plan))
                else:
                    await self._work.wait()
        finally:
            for request in list(self._requests.values()):
                self._end(request, ErrorCode.UNAVAILABLE.value)
            await asyncio.gather(*self._fetches, return_exceptions=True)

    def _admit(self) -> None:
        """Reserve for the oldest local prompts, and for the next prompt of another worker."""
        for request in self.in_phase(Phase.WAITING):
            if request.submit.prefill is None:
                if not self._reserve(request):
                    break
                request.move(Phase.PREFILLING)
        if not self._calls.num_tokens_in_line:
            self._calls.start_next(self._ledger)

    def _schedule(self) -> StepPlan:
        decoding = self._grow_running()
        prefilling = self.in_phase(Phase.PREFILLING)
        jobs = self._calls.in_state(JobState.READY)
        progress = [PromptProgress(r.num_computed, r.num_to_prefill) for r in prefilling]
        progress += [PromptProgress(job.num_computed, job.num_prompt) for job in jobs]
        stops = plan_chunks(
            progress,
            self._info.chunk_tokens,
            self._cost,
            self._settings.step_budget_s,
            len(decoding),
            sum(request.num_computed for request in decoding),
        )
        num_local = len(prefilling)
        return StepPlan(
            decoding=decoding,
            prefilling=list(zip(prefilling, stops[:num_local], strict=False)),
            jobs=list(zip(jobs, stops[num_local:], strict=False)),
        )

    async def _step(self, plan: StepPlan) -> StepResult:
        batch = StepBatch(plan.parts)
        holds = [request.hold for request in plan.decoding]
        holds += [request.hold for request, _ in plan.prefilling]
        holds += [job.hold for job, _ in plan.jobs]
        with ExitStack() as in_use:
            for hold in holds:
                in_use.enter_context(hold.in_use())
            result = await self._executor.step(batch)
        self.num_steps += 1
        self.last_step_s = result.seconds
        self._metrics.step_seconds.observe(result.seconds)
        self._metrics.batch_sequences.observe(len(batch.sequences))
        return result

    def _publish(self, plan: StepPlan, result: StepResult) -> None:
        sampled = iter(result.sampled)
        for request in plan.decoding:
            stop = min(request.num_tokens, request.num_computed + request.decode_step().num_new_tokens)
            self._advance(plan, request, stop, next(sampled))
        for request, stop in plan.prefilling:
            self._metrics.prompt_tokens.inc(stop - request.num_computed)
            self._advance(plan, request, stop, next(sampled))
        for job, stop in plan.jobs:
            self._advance_job(job, stop, next(sampled))
        for sink in plan.sinks:
            sink.flush(self.num_steps)

    def _advance(
        self, plan: StepPlan, request: DecodeRequest, stop: int, sampled: SampledToken | None
    ) -> None:
        if request.ended:  # during the step
            return
        request.computed(stop)
        if request.phase is Phase.PREFILLING and stop == request.num_to_prefill:
            request.move(Phase.DECODING)
            request.hold.activate()
        if sampled is not None:
            self._emit(request, sampled)
            plan.sinks.add(request.sink)

    def _advance_job(self, job: PrefillJob, stop: int, sampled: SampledToken | None) -> None:
        if job not in self._calls.jobs:  # its call ended during the step
            return
        ends = False
        if sampled is not None and job.request.sampling is not None:
            num_output = job.num_prompt - job.request.num_prompt_tokens + 1
            eos = self._info.eos_token_ids
            ends = finish_reason(job.request.sampling, sampled.token, num_output, eos) is not None
        job.advance(stop, sampled, ends, self._clock.now())

    # Blocks: who gets them, who gives them up.

    def _reserve(self, request: DecodeRequest) -> bool:
        """Hold the whole prompt, or note that there was no room."""
        if not request.hold.block_ids:
            self._pin(request)
        if self._must_let_pass(request) or not self._fits(request):
            request.no_room_since = request.no_room_since or self._clock.now()
            return False
        request.no_room_since = None
        self._metrics.prefix_query_tokens.inc(request.num_to_prefill)
        self._metrics.prefix_hit_tokens.inc(request.num_computed)
        request.hold.grow_to(request.num_blocks_to_prefill)
        return True

    def _fits(self, request: DecodeRequest) -> bool:
        """Whether the whole prompt can be held, if need be of blocks that younger ones only have pinned."""
        missing = request.num_blocks_to_prefill - len(request.hold.block_ids)
        reserve = self._settings.growth_reserve_blocks
        while not may_reserve(missing, self._ledger.num_available, self.running_sequences, reserve):
            if not self._unpin_newest(request):
                return False
        return True

    def _must_let_pass(self, request: DecodeRequest) -> bool:
        """Whether an older request has found no room for too long."""
        latest = self._clock.now() - self._settings.starvation_s
        return any(
            other.no_room_since is not None and other.no_room_since <= latest
            for other in self._requests.values()
            if other is not request and other.phase is Phase.WAITING and other.arrived_at < request.arrived_at
        )

    def _grow_running(self) -> list[DecodeRequest]:
        """Give every running sequence the blocks of this step, oldest first; those that got them."""
        for request in self.in_phase(Phase.DECODING):
            if not request.ended and self._make_room(request):
                request.hold.grow_to(request.num_blocks_needed)
        return [
            request
            for request in self.in_phase(Phase.DECODING)
            if len(request.hold.block_ids) >= request.num_blocks_needed
        ]

    def _make_room(self, request: DecodeRequest) -> bool:
        missing = request.num_blocks_needed - len(request.hold.block_ids)
        while missing > self._ledger.num_available:
            if self._unpin_newest():
                continue
            if self._ledger.num_retiring:
                return False  # these blocks come at once; nobody need be preempted for them
            victim = self._victim()
            if victim is None and self._computes_for_others:
                return False
            # Alone it still lacks room only when its own blocks keep twins from eviction: it starts again
            # with those twins as its prefix.
            self._preempt(victim or request)
            if victim is None or victim is request:
                return False
        return True

    @property
    def _computes_for_others(self) -> bool:
        return any(job.state is not JobState.QUEUED for job in self._calls.jobs)

    def _unpin_newest(self, than: DecodeRequest | None = None) -> bool:
        """Let the newest waiting request, but only one younger than `than`, lose its claim on cached blocks;
        it looks again when it starts."""
        for request in reversed(self._requests.values()):
            if request is than:
                return False
            if request.phase is Phase.WAITING and request.hold.block_ids:
                request.hold.unpin()
                return True
        return False

    def _victim(self) -> DecodeRequest | None:
        reserved = self.in_phase(Phase.RECEIVING) + self.in_phase(Phase.PREFILLING)
        running = self.in_phase(Phase.DECODING)
        match choose_victim(len(reserved), len(running)):
            case "reserved":
                return max(reserved, key=lambda request: request.arrived_at)
            case "running":
                return running[-1]
            case _:
                return None

    def _preempt(self, request: DecodeRequest) -> None:
        self._metrics.preemptions.inc()
        self._fail(request, Preempted(f"{self._worker_id} needed the blocks for older requests").info)

    # The life of one request.

    def _refusal(self, submit: Submit) -> PdserveError | None:
        if self.draining:
            return Unavailable(f"{self._worker_id} is draining")
        most_tokens = num_tokens(submit.prompt_tokens) + submit.sampling.max_tokens
        if most_tokens > self._info.max_model_len:
            return RequestTooLong(
                f"{most_tokens} tokens exceed the model's length of {self._info.max_model_len}"
            )
        capacity = self._info.num_blocks * self._info.block_size
        if most_tokens > capacity:
            return RequestTooLong(
                f"{most_tokens} tokens do not fit {self._worker_id}'s KV pool of {capacity} tokens"
            )
        return None

    def _enrol(self, sink: TokenSink, submit: Submit) -> DecodeRequest:
        root = ChainRoot(self._info.fingerprint, submit.cache_salt)
        hold = self._ledger.open(f"decode {submit.request_id}/{submit.attempt}")
        request = DecodeRequest(
            sink, submit, root, hold, self._info.block_size, self._info.deterministic, self._clock.now()
        )
        self._pin(request)
        self._requests[sink, submit.number] = request
        return request

    def _pin(self, request: DecodeRequest) -> None:
        num_blocks = request.hold.adopt_prefix(request.root, request.prefill_tokens)
        request.num_computed = num_blocks * self._info.block_size
        request.timings = replace(request.timings, cached_prompt_tokens_decode=request.num_computed)

    async def _fetch(self, request: DecodeRequest, source: PrefillSource) -> None:
        fetch = PrefillFetch(
            source.address,
            self._prefill_open(request, source),
            request.root,
            request.hold,
            _Arrival(self, request),
            self._rpc,
            self._transports,
            self._clock,
            self._metrics,
            self._info.block_size,
        )
        try:
            await fetch.run()
        except PdserveError as error:
            self._fetch_failed(request, source, error.info)
        except Exception as error:  # an error of ours must end the request, not strand it
            log.exception("fetching the KV of %s from %s", request.submit.request_id, source.worker_id)
            self._fetch_failed(request, source, PrefillFailed(f"{type(error).__name__}: {error}").info)
        finally:
            self._work.set()  # blocks may be free now

    def _prefill_open(self, request: DecodeRequest, source: PrefillSource) -> PrefillOpen:
        submit = request.submit
        return PrefillOpen(
            request_id=submit.request_id,
            attempt=submit.attempt,
            decode_worker_id=self._worker_id,
            source_incarnation=source.incarnation,
            fingerprint=self._info.fingerprint,
            tokens=request.prefill_tokens,
            num_prompt_tokens=request.num_prompt,
            held_blocks=len(request.hold.block_ids),
            transports=self._transports.offers(),
            sampling=submit.sampling if request.prefill_samples else None,
            seed=submit.seed,
            cache_salt=submit.cache_salt,
            priority=submit.priority,
            deadline_ms=submit.deadline_ms,
        )

    def _fetch_failed(self, request: DecodeRequest, source: PrefillSource, error: ErrorInfo) -> None:
        if request.phase not in (Phase.WAITING, Phase.RECEIVING):
            return  # everything had arrived; how the call ended does not matter any more
        if error.code not in (ErrorCode.REQUEST_TOO_LONG, ErrorCode.FINGERPRINT_MISMATCH):
            error = PrefillFailed(f"prefill at {source.worker_id} failed: {error.message}").info
        self._fail(request, error, lost_source=True)

    def _emit(self, request: DecodeRequest, sampled: SampledToken) -> None:
        index = request.num_output
        request.append(sampled, self._info.eos_token_ids)
        self._metrics.generated_tokens.inc()
        logprobs: tuple[TokenLogprobs, ...] = (sampled.logprobs,) if sampled.logprobs else ()
        event = TokenEvent(request.number, index, pack_tokens((sampled.token,)), logprobs, request.finish)
        is_first = index == request.num_known_output
        request.sink.emit(event, request.timings if is_first or request.finish else None)
        if request.finish is not None:
            self._end(request, request.finish.value)

    def _fail(self, request: DecodeRequest, error: ErrorInfo, lost_source: bool = False) -> None:
        request.sink.answer(Failed(request.number, error, lost_source))
        self._end(request, error.code.value)

    def _end(self, request: DecodeRequest, outcome: str) -> None:
        del self._requests[request.sink, request.number]
        self._metrics.count_end(outcome)
        request.move(Phase.ENDED)
        request.hold.release()
        # A fetch whose request has finished says goodbye to its source by itself; any other is stopped.
        if request.fetch is not None and request.finish is None:
            request.fetch.cancel()
        self._work.set()

    # Called by _Arrival.

    def reserve_for_fetch(self, request: DecodeRequest) -> int | Busy:
        if request.ended or not self._reserve(request):
            return Busy(self._ask_again_ms(request))
        request.move(Phase.RECEIVING)
        return request.num_computed // self._info.block_size

    def _ask_again_ms(self, request: DecodeRequest) -> int:
        """The more older ones wait, the later: else a long queue asks more often than it can be answered."""
        older = itertools.takewhile(lambda other: other is not request, self._requests.values())
        num_before = sum(other.phase is Phase.WAITING for other in older)
        return min(ASK_AGAIN_MS * (1 + num_before), MAX_ASK_AGAIN_MS)

    def first_token_arrived(self, request: DecodeRequest, first: FirstToken, stats: FetchStats) -> None:
        if request.ended:
            return
        if not request.prefill_samples or request.num_tokens != request.num_to_prefill:
            raise ProtocolViolation("a first token came that was not asked for, or came twice")
        request.timings = _timings(request, stats)
        self._emit(request, SampledToken(first.token, first.logprobs))
        request.sink.flush(self.num_steps)

    def all_arrived(self, request: DecodeRequest, stats: FetchStats) -> None:
        if request.ended:
            return
        if request.prefill_samples and request.num_tokens == request.num_to_prefill:
            raise ProtocolViolation("the source sealed the KV without a first token")
        request.timings = _timings(request, stats)
        request.computed(request.num_to_prefill)
        request.move(Phase.DECODING)
        request.hold.activate()
        self._work.set()


class _Arrival:
    """The FetchListener of one request."""

    def __init__(self, loop: DecodeLoop, request: DecodeRequest) -> None:
        self._loop = loop
        self._request = request

    def reserve(self) -> int | Busy:
        return self._loop.reserve_for_fetch(self._request)

    def first_token(self, first: FirstToken, stats: FetchStats) -> None:
        self._loop.first_token_arrived(self._request, first, stats)

    def sealed(self, stats: FetchStats) -> None:
        self._loop.all_arrived(self._request, stats)


def _timings(request: DecodeRequest, stats: FetchStats) -> RequestTimings:
    return replace(
        request.timings,
        cached_prompt_tokens_prefill=stats.cached_tokens_at_source,
        queue_s=stats.queue_s,
        prefill_s=stats.prefill_s,
        transfer_s=stats.transfer_s,
        transfer_bytes=stats.transfer_bytes,
        transport=stats.transport,
    )
