"""One request from admission to its last token. Read this first.

    admit -> place -> submit -> stream ... -> finished
               ^                   |
               +---- attempt lost -+   (the same request with a longer known output)

Each output token is passed on exactly once, in order: events carry the index of their first token, and an
attempt is told which tokens the client already has. Closing the generator cancels the attempt, and with it
everything that hangs below it in the call tree.
"""

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from pdserve.contract.block_names import ChainRoot, max_shared_blocks, name_blocks
from pdserve.contract.errors import (
    DeadlineExceeded,
    ErrorCode,
    ErrorInfo,
    PdserveError,
    Poisonous,
    Stalled,
    Unavailable,
    error_from_info,
)
from pdserve.contract.ids import RequestId, SubmitNumber, WorkerId
from pdserve.contract.messages import (
    CancelReason,
    PrefillSource,
    Submit,
    TokenEvent,
)
from pdserve.contract.ports import Clock, Rng
from pdserve.contract.tokens import num_tokens, slice_tokens
from pdserve.contract.tracing import Attributes, Span, SpanKind, Tracer
from pdserve.metrics import RouterMetrics
from router.admission import Admission, Refused
from router.booking import Booking
from router.bounds import check_length
from router.fleet import Fate, Fleet, Identity
from router.links import Links, Submission, SubmissionEnd, SubmissionTokens
from router.objectives import Objectives, Verdict
from router.output_lengths import OutputLengths
from router.placement.policies import DEFAULT_POLICY, make_policy
from router.placement.policy import Placement, PlacementRequest
from router.progress import Attempt, Progress
from router.recent_times import RecentLatencies
from router.report_json import span_attributes
from router.request_log import log_end
from router.request_reports import Origin, RequestReports, refused_report
from router.requests import Closing, GenerateRequest, OutputDelta
from router.stage_times import tell_stages
from router.waiting import Waiting

log = logging.getLogger(__name__)


DEATHS_OF_A_SUSPECT = 2
"""A request that was at so many workers when they died runs alone from then on."""


NOT_HELD_AGAINST = (ErrorCode.PREEMPTED, ErrorCode.DRAINING)
"""However often a request makes room for older ones, or its workers are stopped on purpose."""


@dataclass(frozen=True, slots=True)
class JourneySettings:
    queue_timeout_s: float = 60.0
    """How long a request may wait for a worker that can take it."""
    max_fruitless_attempts: int = 8
    """Attempts in a row without a new token after which the last error is the client's."""
    refusal_pause_s: float = 0.05
    """Before placing again what a worker has refused."""
    objectives: Objectives = field(default_factory=Objectives)
    """What requests have to keep to be counted as good."""
    policy: str = DEFAULT_POLICY
    """The name of a placement policy (`router.placement.policies`)."""


class Journey:
    """Serves requests on the workers of a fleet."""

    def __init__(
        self,
        fleet: Fleet,
        links: Links,
        admission: Admission,
        clock: Clock,
        rng: Rng,
        metrics: RouterMetrics,
        reports: RequestReports,
        recent: RecentLatencies,
        settings: JourneySettings,
        tracer: Tracer,
    ) -> None:
        self._fleet = fleet
        self._links = links
        self._admission = admission
        self._clock = clock
        self._rng = rng
        self._metrics = metrics
        self._reports = reports
        self._recent = recent
        self._settings = settings
        self._policy = make_policy(settings.policy, rng)
        self._tracer = tracer
        self._output_lengths = OutputLengths()
        self._live: set[Progress] = set()
        asked = settings.objectives
        metrics.slo.set_objectives({each.value: s for each, s in asked.limits_s.items()}, asked.target)

    async def generate(
        self, request_id: RequestId, request: GenerateRequest, closing: Closing | None = None
    ) -> AsyncGenerator[OutputDelta, None]:
        """Serve one request. Closing the generator cancels it everywhere; `closing` says why. Raises
        PdserveError subclasses."""
        try:
            self._admission.enter(num_tokens(request.prompt_tokens))
        except Refused as error:
            self._metrics.count_refusal(error.limit)
            self._count_verdict(self._settings.objectives.failed)
            self.refuse(request_id, request.origin, error.info, 0.0, num_tokens(request.prompt_tokens))
            raise
        progress = self._begin(request_id, request, closing or Closing())
        outcome: str | None = None
        try:
            async with aclosing(self._attempts(progress)) as deltas:
                async for delta in deltas:
                    if delta.finish is not None:
                        outcome = delta.finish.value
                    yield delta
        except PdserveError as error:
            outcome, progress.error = error.info.code.value, error.info
            raise
        except Exception:
            outcome = ErrorCode.INTERNAL.value
            raise
        finally:
            self._leave(progress, outcome or progress.closing.reason.value)

    def refuse(
        self, request_id: RequestId, origin: Origin, error: ErrorInfo, waited_s: float, num: int | None
    ) -> None:
        """Tell of a request that is not admitted: `num` prompt tokens, `waited_s` seconds after it came."""
        now = self._clock.unix_time()
        report = refused_report(request_id, origin, error, now, waited_s, num)
        self._reports.refuse(report)
        log_end(report)

    def _begin(self, request_id: RequestId, request: GenerateRequest, closing: Closing) -> Progress:
        self._metrics.running_requests.inc()
        self._metrics.prompt_tokens.inc(num_tokens(request.prompt_tokens))
        now = self._clock.now()
        progress = Progress(
            request_id=request_id,
            request=request,
            seed=self._rng.random_bits(63) if request.seed is None else request.seed,
            arrived_at=self._clock.unix_time(),
            admitted_at=now,
            deadline_at=None if request.deadline_s is None else now + request.deadline_s,
            closing=closing,
            span=self._tracer.begin("request", SpanKind.INTERNAL, request.origin.trace),
        )
        self._live.add(progress)
        self._reports.begin(progress)
        return progress

    def _leave(self, progress: Progress, outcome: str) -> None:
        progress.outcome, progress.ended_at = outcome, self._clock.now()
        self._live.discard(progress)
        self._admission.leave(progress.num_prompt)
        self._metrics.running_requests.dec()
        self._metrics.end_to_end.observe(progress.ended_at - progress.admitted_at, progress.exemplar)
        self._recent.end_to_end.add(progress.ended_at - progress.admitted_at)
        self._metrics.count_end(outcome)
        self._count_verdict(self._settings.objectives.judge(progress.pace(progress.ended_at), outcome))
        self._output_lengths.note(progress.num_output)
        report = progress.report()
        self._reports.end(report)
        log_end(report)
        if progress.span.context is not None:
            progress.span.end(outcome, span_attributes(report))
        tell_stages(self._metrics, progress, report)

    def oldest_waiting_s(self) -> float:
        """For how long a request has been without a worker, the longest of all; 0 when each has one. May be
        asked from another thread."""
        now, live = self._clock.now(), list(self._live)
        return now - min((at for progress in live if (at := progress.waiting_since) is not None), default=now)

    def _count_verdict(self, verdict: Verdict | None) -> None:
        if verdict is not None:
            self._metrics.slo.count(verdict.good, verdict.kept, verdict.missed)
            self._recent.good.add(verdict.good)

    def check_integrity(self) -> None:
        """Raises AssertionError unless admission and the workers' books add up to the live requests."""
        num_tokens_inside = sum(progress.num_prompt for progress in self._live)
        inside = (self._admission.num_requests, self._admission.num_prompt_tokens)
        assert inside == (len(self._live), num_tokens_inside), (
            f"admission counts {inside[0]} requests of {inside[1]} tokens, {len(self._live)} of "
            f"{num_tokens_inside} are live"
        )
        for view in self._fleet.workers.values():
            view.booked.check_integrity()
        num_booked = len({booking for view in self._fleet.workers.values() for booking in view.booked})
        assert num_booked <= len(self._live), (
            f"{num_booked} attempts of {len(self._live)} requests are booked"
        )

    async def _attempts(self, progress: Progress) -> AsyncGenerator[OutputDelta, None]:
        """Place and try until the output is finished."""
        while True:
            waiting_since = self._clock.now()
            placement = await self._place(progress)
            progress.span.add_stage("router queue", waiting_since, self._clock.now())
            attempt = progress.next_attempt(
                placement, self._clock.now(), self._begin_span(progress, placement)
            )
            try:
                async with aclosing(self._attempt(progress, attempt)) as deltas:
                    async for delta in deltas:
                        progress.fruitless_attempts = 0
                        yield delta
                        if delta.finish is not None:
                            return
            except PdserveError as error:
                attempt.ended(error.info.code.value, self._clock.now(), error.info.message)
                await self._recover(progress, error.info)
            finally:
                attempt.ended(progress.closing.reason.value, self._clock.now())

    def _begin_span(self, progress: Progress, placement: Placement) -> Span:
        attributes: Attributes = {
            "pdserve.attempt": progress.num_attempts + 1,
            "pdserve.decode_worker": placement.decode,
            "pdserve.prefill_worker": placement.prefill or "",
        }
        return self._tracer.begin("attempt", SpanKind.CLIENT, progress.span.context, attributes)

    async def _recover(self, progress: Progress, error: ErrorInfo) -> None:
        """Return if the request may be placed again; raise what the client is to see otherwise."""
        progress.fruitless_attempts += error.code not in NOT_HELD_AGAINST
        if not error.retryable or progress.fruitless_attempts >= self._settings.max_fruitless_attempts:
            raise error_from_info(error)
        self._metrics.count_recovery(error.code)
        progress.recoveries[error.code.value] += 1
        log.info(
            "%s attempt %d: %s; placing it again", progress.request_id, progress.num_attempts, error.message
        )
        if error.code in (ErrorCode.OVERLOADED, ErrorCode.UNAVAILABLE, ErrorCode.PREEMPTED):
            await self._clock.sleep(self._settings.refusal_pause_s)

    async def _place(self, progress: Progress) -> Placement:
        """A placement, as soon as there is a worker. Raises Unavailable, DeadlineExceeded, RequestTooLong."""
        until = self._clock.now() + self._settings.queue_timeout_s
        while True:
            self._fleet.changed.clear()
            placement = None if self._awaits_verdict(progress) else self._choose(progress)
            if placement is not None:
                return placement
            with Waiting(self._metrics, progress.num_prompt):
                await self._fleet_change(progress, until)

    def _awaits_verdict(self, progress: Progress) -> bool:
        """Whether it is not known yet what became of the worker that had nothing but this request. Raises
        Poisonous when it died."""
        who = progress.lost_alone
        fate = Fate.ALIVE if who is None else self._fleet.fate(who)
        if who is not None and fate is Fate.DEAD:
            raise Poisonous(
                f"the request killed {DEATHS_OF_A_SUSPECT} workers or was there when they died, and then "
                f"{who.worker_id}, which served nothing else; do not send it again"
            )
        if fate is not Fate.UNKNOWN:
            progress.lost_alone = None
        return fate is Fate.UNKNOWN

    def _judge(self, progress: Progress) -> None:
        """Make it a suspect when it was there at too many deaths."""
        deaths = [who for who in progress.lost if self._fleet.fate(who) in (Fate.DEAD, Fate.UNKNOWN)]
        if len(deaths) >= DEATHS_OF_A_SUSPECT and not progress.is_suspect:
            progress.is_suspect = True
            self._metrics.suspects.inc()
            log.warning("%s was at %d workers that died; it runs alone now", progress.request_id, len(deaths))

    def _choose(self, progress: Progress) -> Placement | None:
        info = self._fleet.model_info(progress.fingerprint)
        if info is None:
            return None
        self._require_same_model(progress)
        check_length(progress.most_tokens, info, f"{progress.most_tokens} tokens were asked for")
        if progress.named_for != info.fingerprint:
            root = ChainRoot(info.fingerprint, progress.request.cache_salt)
            names = name_blocks(progress.request.prompt_tokens, info.block_size, root.seed)
            progress.names = names[: max_shared_blocks(progress.num_prompt, info.block_size)]
            progress.named_for = info.fingerprint
        self._judge(progress)
        request = PlacementRequest(
            progress.num_known,
            progress.most_tokens,
            self._output_lengths.expected(progress.most_tokens - progress.num_known),
            progress.is_suspect,
        )
        now = self._clock.now()
        fleet = self._fleet.view(progress.names, info.block_size, now, progress.fingerprint)
        return self._policy.choose(request, fleet)

    def _require_same_model(self, progress: Progress) -> None:
        """Raises Unavailable when the rest of an answer would have to come from another model or revision."""
        if progress.fingerprint is not None and self._fleet.has_moved_on(progress.fingerprint):
            raise Unavailable(
                "the workers serve another model or revision by now than the one that began this answer; "
                "send the request again"
            )

    async def _attempt(self, progress: Progress, attempt: Attempt) -> AsyncGenerator[OutputDelta, None]:
        """One attempt: yields new tokens; raises the error that ended it before the output was finished."""
        placement = attempt.placement
        self._metrics.attempts.inc()
        log.debug("%s attempt %d: %s", progress.request_id, attempt.number, placement.reason)
        submission = self._links[placement.decode].submit(
            lambda number: self._submit(number, progress, attempt)
        )
        booking = self._book(progress, placement, submission.number)
        decode, prefill = self._identity(placement.decode), self._identity(placement.prefill)
        fingerprint = self._fleet.fingerprint(placement.decode)
        failed: CancelReason | None = None
        try:
            while True:
                event = await self._next_event(progress, submission)
                if isinstance(event, SubmissionEnd):
                    self._note_failure(placement, event, decode, prefill)
                    _note_loss(progress, submission, event, decode, prefill)
                    raise error_from_info(event.error)
                booking.prefill_is_done()
                if event.timings is not None:
                    booking.kv_has_come(event.timings)
                new = self._unseen(progress, event.event)
                if new is not None:
                    self._observe(progress, attempt, event)
                    progress.output += new.tokens
                    progress.fingerprint = fingerprint
                    yield OutputDelta(new.tokens, new.logprobs, new.finish, event.timings)
                    if new.finish is not None:
                        return
        except PdserveError as error:
            failed = CancelReason.DEADLINE if isinstance(error, DeadlineExceeded) else CancelReason.STALLED
            raise
        finally:
            submission.cancel(failed or progress.closing.reason)
            booking.clear()

    def _submit(self, number: SubmitNumber, progress: Progress, attempt: Attempt) -> Submit:
        request = progress.request
        return Submit(
            number=number,
            request_id=progress.request_id,
            attempt=attempt.number,
            prompt_tokens=request.prompt_tokens,
            known_output_tokens=bytes(progress.output),
            sampling=request.sampling,
            seed=progress.seed,
            prefill=self._source(attempt.placement.prefill),
            cache_salt=request.cache_salt,
            priority=request.priority,
            deadline_ms=self._remaining_ms(progress),
            alone=progress.is_suspect,
            trace=attempt.span.context,
        )

    def _identity(self, worker_id: WorkerId | None) -> Identity | None:
        return None if worker_id is None else self._fleet.workers[worker_id].identity

    def _source(self, worker_id: WorkerId | None) -> PrefillSource | None:
        if worker_id is None:
            return None
        member = self._fleet.workers[worker_id].member
        return PrefillSource(worker_id, member.address, member.incarnation)

    async def _next_event(
        self, progress: Progress, submission: Submission
    ) -> SubmissionTokens | SubmissionEnd:
        remaining_s = self._remaining_s(progress)
        if remaining_s == 0:  # whatever waits here: whoever reads so late is too late
            raise _deadline_error()
        if not submission.events.empty():  # the next needs no timer
            return submission.events.get_nowait()
        try:
            async with self._clock.timeout(remaining_s):
                return await submission.events.get()
        except TimeoutError:
            raise _deadline_error() from None

    async def _fleet_change(self, progress: Progress, until: float) -> None:
        remaining_s = self._remaining_s(progress)
        waiting_s = until - self._clock.now()
        try:
            async with self._clock.timeout(waiting_s if remaining_s is None else min(waiting_s, remaining_s)):
                await self._fleet.changed.wait()
        except TimeoutError:
            if remaining_s is not None and remaining_s <= waiting_s:
                raise _deadline_error() from None
            raise Unavailable(
                f"no decode worker became ready within {self._settings.queue_timeout_s:g} s; "
                "see what they are doing with pdserve status",
                retry_after_s=1.0,
            ) from None

    def _unseen(self, progress: Progress, event: TokenEvent) -> TokenEvent | None:
        """What of an event the client does not have yet; None when it came twice. Raises Stalled when tokens
        before it never came."""
        num_seen = progress.num_output - event.first_index
        num = num_tokens(event.tokens)
        if num_seen < 0:
            raise Stalled(f"output token {event.first_index} came where {progress.num_output} was due")
        if num_seen == 0:
            return event
        self._metrics.count_stale(TokenEvent)
        if num_seen >= num:
            return None
        new = slice_tokens(event.tokens, num_seen, num)
        return event._replace(first_index=progress.num_output, tokens=new, logprobs=event.logprobs[num_seen:])

    def _note_failure(
        self, placement: Placement, event: SubmissionEnd, decode: Identity | None, prefill: Identity | None
    ) -> None:
        who = prefill if event.lost_source else decode
        if event.error.code is ErrorCode.DRAINING and who is not None:
            self._fleet.leaves(who)
            return
        if not event.lost_source or placement.prefill is None:
            return
        if event.error.code is ErrorCode.FINGERPRINT_MISMATCH:
            log.warning("%s is not paired any more: %s", placement.prefill, event.error.message)
            self._fleet.pair_refused(placement.prefill, placement.decode)
        else:
            self._fleet.pair_failed(placement.prefill, placement.decode, self._clock.now())

    def _observe(self, progress: Progress, attempt: Attempt, tokens: SubmissionTokens) -> None:
        """Times are those of arrival here: how fast the client reads does not count."""
        num, exemplar = num_tokens(tokens.event.tokens), progress.exemplar
        if progress.last_token_at is None:
            progress.first_token_at = tokens.arrived_at
            self._metrics.time_to_first_token.observe(tokens.arrived_at - progress.admitted_at, exemplar)
            self._recent.time_to_first_token.add(tokens.arrived_at - progress.admitted_at)
        else:
            gap_s = tokens.arrived_at - progress.last_token_at
            is_longest = progress.note_gap(gap_s)
            self._metrics.observe_inter_token(gap_s, num, exemplar if is_longest else None)
            self._recent.add_tokens(gap_s, num)
        if num_tokens(progress.output) < 2 <= num_tokens(progress.output) + num:
            progress.second_token_at = tokens.arrived_at
            self._metrics.time_to_second_token.observe(tokens.arrived_at - progress.admitted_at, exemplar)
        progress.last_token_at = tokens.arrived_at
        self._note(attempt, tokens)
        self._metrics.output_tokens.inc(num)

    def _note(self, attempt: Attempt, tokens: SubmissionTokens) -> None:
        """What an attempt has brought, and how that compares with what was predicted of it."""
        had_first, had_second = attempt.first_token_at is not None, attempt.second_token_at is not None
        attempt.note(tokens)
        predicted = attempt.placement.predicted
        if predicted is None:
            return
        way = "local" if attempt.placement.prefill is None else "split"
        took_s = tokens.arrived_at - attempt.submitted_at
        if not had_first:
            self._metrics.observe_prediction("first", way, took_s, predicted.first_token_s)
        if not had_second and attempt.second_token_at is not None:
            self._metrics.observe_prediction("second", way, took_s, predicted.second_token_s)

    def _book(self, progress: Progress, placement: Placement, number: SubmitNumber) -> Booking:
        return Booking(self._fleet, placement, progress.num_known, number, progress.names)

    def _remaining_s(self, progress: Progress) -> float | None:
        return None if progress.deadline_at is None else max(0.0, progress.deadline_at - self._clock.now())

    def _remaining_ms(self, progress: Progress) -> int | None:
        remaining_s = self._remaining_s(progress)
        return None if remaining_s is None else int(remaining_s * 1000)


def _note_loss(
    progress: Progress,
    submission: Submission,
    end: SubmissionEnd,
    decode: Identity | None,
    prefill: Identity | None,
) -> None:
    """Remember who was lost with the request."""
    progress.lost_alone = decode if end.lost_worker and submission.alone else None
    who = decode if end.lost_worker else prefill if end.lost_source else None
    if who is not None:
        progress.lost.add(who)


def _deadline_error() -> PdserveError:
    return DeadlineExceeded("the request's deadline has passed")
