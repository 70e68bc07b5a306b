"""The engine loop of a decode worker: admit, schedule, run, publish."""

import asyncio
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field

from decode_worker.arrivals import Arrivals
from decode_worker.isolation import Isolation
from decode_worker.request import DecodeRequest, Phase, TokenSink
from decode_worker.request_trace import RequestTrace
from decode_worker.room import LiveRequests, Room, RoomSettings
from decode_worker.scheduler import PrefillQuota, plan_chunks
from pdserve.contract.block_names import ChainRoot
from pdserve.contract.errors import (
    DeadlineExceeded,
    Draining,
    ErrorCode,
    ErrorInfo,
    InvalidRequest,
    PdserveError,
    Preempted,
    Replayed,
    RequestTooLong,
)
from pdserve.contract.ids import SubmitNumber, WorkerId
from pdserve.contract.messages import CancelReason, Failed, PairTransport, Refused, Submit, TokenEvent
from pdserve.contract.ports import Clock, EngineExecutor, Rpc
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.tracing import Tracer
from pdserve.contract.work import (
    ModelInfo,
    SampledToken,
    SequenceStep,
    StepBatch,
    StepCost,
    StepResult,
    TokenLogprobs,
)
from pdserve.engine.chunking import PromptProgress, chunk_tokens_within
from pdserve.engine.step_pace import StepPace
from pdserve.handoff.bounds import check_submit
from pdserve.handoff.ledger import BlockHold, BlockLedger
from pdserve.handoff.prefill_job import JobState, PrefillJob
from pdserve.handoff.sending import PrefillSource as PrefillCalls
from pdserve.handoff.transports.negotiation import Transports
from pdserve.metrics import WorkerMetrics


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    step_budget_s: float = 0.2
    """What one step should take at most when prompts are computed beside the running batch."""
    room: RoomSettings = field(default_factory=RoomSettings)
    local_prefill_share: float = 0.5
    """Most of its time that a decode worker spends on prompts of its own while sequences run. Unsplit workers
    have no such limit."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes."""

    decoding: list[DecodeRequest]
    prefilling: list[tuple[DecodeRequest, int]]  # (request, stop of its chunk)
    jobs: list[tuple[PrefillJob, int]]  # prompts of other workers, (job, stop of its chunk)
    sinks: dict[TokenSink, None] = field(default_factory=dict)  # whom the results concern, in order

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
        tracer: Tracer,
    ) -> None:
        """`calls` are the Prefill calls of other workers; `work` is set by whoever brings or changes work."""
        self.num_steps = 0
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0
        self.pace = StepPace(cost)
        self.draining = False
        """Whoever submits is refused."""
        self._worker_id = worker_id
        self._info = info
        self._cost = cost
        self._executor = executor
        self._ledger = ledger
        self._calls = calls
        self._clock = clock
        self._metrics = metrics
        self._tracer = tracer
        self._work = work
        self._step_budget_s = settings.step_budget_s
        self._chunk_tokens = chunk_tokens_within(settings.step_budget_s, cost, info.chunk_tokens)
        self._requests = LiveRequests()
        self._room = Room(
            self._requests,
            ledger,
            info.block_size,
            clock,
            metrics,
            self._preempt,
            self._computes_for_others,
            settings.room,
        )
        self._arrivals = Arrivals(
            worker_id, info, self._room, self, transports, rpc, clock, metrics, work.set
        )

        self._quota = PrefillQuota(settings.local_prefill_share)
        self._isolation = Isolation(
            self._requests, self._room, clock, self._preempt, self._computes_for_others
        )

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
            self._arrivals.start(request, submit.prefill)
        self._work.set()

    def cancel(self, sink: TokenSink, number: SubmitNumber, reason: CancelReason) -> None:
        """The router does not want a submission any more. It may have ended already."""
        request = self._requests.get(sink, number)
        if request is not None:
            self._end(request, reason.value)

    def drop(self, sink: TokenSink) -> None:
        """A Session has broken: cancel all that came through it."""
        for request in self._requests:
            if request.sink is sink:
                self._end(request, ErrorCode.CANCELLED.value)

    def held(self, sink: TokenSink) -> tuple[SubmitNumber, ...]:
        """What came through a Session and has not ended."""
        return tuple(request.number for request in self._requests if request.sink is sink)

    def give_back(self) -> None:
        """Send every request back to its router, which places it elsewhere."""
        for request in self._requests:
            self._fail(request, Draining(f"{self._worker_id} ends before the request does").info)

    async def emptied(self) -> None:
        """Wait until no request is left."""
        await self._requests.emptied()

    # What the worker tells.

    def in_phase(self, phase: Phase) -> list[DecodeRequest]:
        """The requests in `phase`, oldest first."""
        return self._requests.in_phase(phase)

    @property
    def running_sequences(self) -> int:
        return len(self.in_phase(Phase.DECODING))

    @property
    def running_context_tokens(self) -> int:
        return sum(request.num_computed for request in self.in_phase(Phase.DECODING))

    @property
    def waiting_requests(self) -> int:
        """Those that are not in the running batch yet, and other workers' prompts whose turn has not come."""
        return len(self._requests) - self.running_sequences + self._calls.num_waiting_requests

    @property
    def waiting_since(self) -> list[float]:
        """When each of them came."""
        own = [request.arrived_at for request in self._requests if request.phase is not Phase.DECODING]
        return own + self._calls.waiting_since

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that this worker itself is still to compute."""
        unfinished = (request for request in self._requests if request.phase is not Phase.DECODING)
        return sum(r.num_to_prefill - r.num_computed for r in unfinished if r.submit.prefill is None)

    @property
    def transports_in_use(self) -> list[PairTransport]:
        """How KV came from each prefill worker the last time, by its id."""
        return sorted(self._arrivals.pairs.values(), key=lambda pair: pair.source)

    def check_integrity(self) -> None:
        """Raises AssertionError when a live request has ended or holds nothing any more."""
        for request in self._requests:
            name = f"{request.submit.request_id}/{request.submit.attempt}"
            assert not request.ended, f"{name} has ended and is still in the table of live requests"
            assert not request.hold.released, f"{name} is {request.phase} with a hold that is released"

    @property
    def holds(self) -> list[BlockHold]:
        """Of all live requests."""
        return [request.hold for request in self._requests]

    # The loop.

    async def run(self) -> None:
        """Until cancelled; then every request is ended. What they have begun is left to `over`."""
        try:
            while True:
                self._work.clear()
                self._end_overdue()
                self._isolation.advance()
                self._admit()
                plan = self._schedule()
                if plan:
                    self._publish(plan, await self._step(plan))
                else:
                    await self._until_work()
        finally:
            for request in self._requests:
                self._end(request, ErrorCode.UNAVAILABLE.value)

    async def over(self) -> None:
        """Wait until nothing that `run` has begun is left, however late: copies are waited for."""
        await self._arrivals.over()

    def _end_overdue(self) -> None:
        """End the requests whose deadline has passed, in whatever phase, also when their router is silent."""
        now = self._clock.now()
        for request in self._requests:
            if request.deadline_at is not None and request.deadline_at <= now:
                self._fail(request, DeadlineExceeded("the request's deadline has passed").info)

    async def _until_work(self) -> None:
        """Until somebody brings work, or a time comes at which there is something to do."""
        times = [self._isolation.next_at, *(request.deadline_at for request in self._requests)]
        wait_s = min((at for at in times if at is not None), default=None)
        if wait_s is not None:
            wait_s -= self._clock.now()
        with suppress(TimeoutError):
            async with self._clock.timeout(wait_s):
                await self._work.wait()

    def _admit(self) -> None:
        """Reserve for the oldest local prompts, and for the next prompt of another worker. A local prompt
        waits while one is computed here that begins like it, and then finds that beginning in the cache."""
        if self._isolation.suspect is not None:
            return
        computing = self.in_phase(Phase.PREFILLING)
        for request in self.in_phase(Phase.WAITING):
            if request.submit.alone:
                break
            if request.submit.prefill is None and not any(map(request.needs_next_block_of, computing)):
                if not self._room.reserve(request):
                    break
                request.start_prefill(self._clock.now())
                computing.append(request)
        if not self._calls.num_tokens_in_line:
            self._calls.start_next(self._ledger)

    def _schedule(self) -> StepPlan:
        decoding = self._room.grow_running()
        prefilling = self.in_phase(Phase.PREFILLING) if self._quota.allows(len(decoding)) else []
        jobs = self._calls.in_state(JobState.READY)
        progress = [PromptProgress(r.num_computed, r.num_to_prefill) for r in prefilling]
        progress += [PromptProgress(job.num_computed, job.num_prompt) for job in jobs]
        stops = plan_chunks(
            progress,
            self._chunk_tokens,
            self._cost,
            self._step_budget_s,
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
        ending = [job for job, stop in plan.jobs if stop == job.num_prompt]
        holds = [request.hold for request in plan.decoding]
        holds += [request.hold for request, _ in plan.prefilling]
        holds += [job.hold for job, _ in plan.jobs]
        with ExitStack() as in_use:
            for hold in holds:
                in_use.enter_context(hold.in_use())
            result = await self._executor.step(batch, self._calls.follow_layers(ending))
        self.num_steps += 1
        self.pace.note(batch, result.seconds)
        if not plan.decoding:
            self.prefill_tokens_per_s = batch.num_new_tokens / max(result.seconds, 1e-9)
        elif not (plan.prefilling or plan.jobs):
            self.decode_step_s = result.seconds
        num_own_tokens = sum(stop - request.num_computed for request, stop in plan.prefilling)
        own_s = min(result.seconds, num_own_tokens * self._cost.per_prefill_token_s)
        self._quota.note_step(len(plan.decoding), own_s, result.seconds)
        self._metrics.engine.observe_step(batch, result.seconds)
        return result

    def _publish(self, plan: StepPlan, result: StepResult) -> None:
        sampled = iter(result.sampled)
        for request in plan.decoding:
            self._advance(plan, request, request.decode_stop, next(sampled))
        for request, stop in plan.prefilling:
            self._metrics.prompt_tokens.inc(stop - request.num_computed)
            self._advance(plan, request, stop, next(sampled))
        for job, stop in plan.jobs:
            self._metrics.prompt_tokens.inc(stop - job.num_computed)
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
            request.end_prefill(self._clock.now())
        if sampled is not None:
            self._metrics.generated_tokens.inc()
            self._emit(request, sampled)
            plan.sinks[request.sink] = None

    def _advance_job(self, job: PrefillJob, stop: int, sampled: SampledToken | None) -> None:
        if job not in self._calls.jobs:  # its call ended during the step
            return
        job.advance(stop, sampled, self._info.eos_token_ids, self._clock.now())
        self._metrics.generated_tokens.inc(sampled is not None)

    # The life of one request.

    def _refusal(self, submit: Submit) -> PdserveError | None:
        if self.draining:
            return Draining(f"{self._worker_id} is draining")
        if self._requests.has_attempt(submit.request_id, submit.attempt):
            return Replayed(f"attempt {submit.attempt} of {submit.request_id} is being served here already")
        try:
            check_submit(submit, self._info)
        except (InvalidRequest, RequestTooLong) as error:
            return error
        return None

    def _enrol(self, sink: TokenSink, submit: Submit) -> DecodeRequest:
        root = ChainRoot(self._info.fingerprint, submit.cache_salt)
        hold = self._ledger.open(f"decode {submit.request_id}/{submit.attempt}")
        request = DecodeRequest(
            sink,
            submit,
            root,
            hold,
            self._info.block_size,
            self._info.deterministic,
            self._clock.now(),
            RequestTrace(submit, self._tracer, self._clock),
        )
        self._room.pin(request)
        self._requests.add(request)
        return request

    def _emit(self, request: DecodeRequest, sampled: SampledToken) -> None:
        index = request.num_output
        request.append(sampled, self._info.eos_token_ids)
        logprobs: tuple[TokenLogprobs, ...] = (sampled.logprobs,) if sampled.logprobs else ()
        event = TokenEvent(request.number, index, pack_tokens((sampled.token,)), logprobs, request.finish)
        request.sink.emit(event, request.news() or (request.timings if request.finish else None))
        if request.finish is not None:
            self._end(request, request.finish.value)

    def _fail(self, request: DecodeRequest, error: ErrorInfo, lost_source: bool = False) -> None:
        request.sink.answer(Failed(request.number, error, lost_source))
        self._end(request, error.code.value)

    def _end(self, request: DecodeRequest, outcome: str) -> None:
        self._requests.remove(request)
        self._metrics.count_end(outcome)
        request.move(Phase.ENDED)
        request.trace.end(outcome, request.timings)
        request.hold.release()
        # A fetch whose request has finished says goodbye to its source by itself; any other is stopped.
        if request.fetch is not None and request.finish is None:
            request.fetch.cancel()
        self._work.set()

    def _preempt(self, request: DecodeRequest) -> None:
        self._metrics.preemptions.inc()
        self._fail(request, Preempted(f"{self._worker_id} needed the blocks for older requests").info)

    def _computes_for_others(self) -> bool:
        return any(job.state is not JobState.QUEUED for job in self._calls.jobs)

    # What Arrivals tells.

    def first_token(self, request: DecodeRequest, sampled: SampledToken) -> None:
        """Pass it on at once; it does not wait for the next step."""
        self._emit(request, sampled)
        request.sink.flush(self.num_steps)

    def source_failed(self, request: DecodeRequest, error: ErrorInfo) -> None:
        """The prefill worker did not deliver."""
        self._fail(request, error, lost_source=True)
