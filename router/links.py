"""The router's streams to one worker: Watch, and for workers that decode the Session.

Both live and die together: when either breaks, the worker is lost, every submission it had fails with
WORKER_LOST, and the link tries again as long as the worker is a member. A worker says something every second
on both; silence is death. What it says it holds (`Holding`) is compared with what was submitted, so that
nobody waits for what was lost on the way.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.errors import (
    ConfigError,
    ErrorInfo,
    PdserveError,
    ProtocolViolation,
    Stalled,
    Unauthenticated,
    WorkerLost,
    error_from_info,
)
from pdserve.contract.ids import Incarnation, RouterId, SubmitNumber, WorkerId
from pdserve.contract.messages import (
    SILENCE_S,
    Alone,
    Cancel,
    CancelReason,
    End,
    Failed,
    Frame,
    Hello,
    Holding,
    Members,
    Refused,
    Report,
    RequestTimings,
    Role,
    SessionOpen,
    SessionReady,
    SessionUp,
    Submit,
    TokenEvent,
    WatchOpen,
)
from pdserve.contract.ports import Call, Clock, MessageStream, Rpc
from pdserve.contract.tokens import num_tokens
from pdserve.metrics import RouterMetrics
from pdserve.tasks import TaskScope, cancel_and_wait, task_scope
from router.fleet import Fleet, WorkerView

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0

_NEVER_HEALS = (ProtocolViolation, Unauthenticated, ConfigError)
"""Errors that an operator must hear of, because trying again will not help."""

SUBMIT_TIMEOUT_S = 10.0
"""How long a worker may take to say that it has taken a Submit."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """When an attempt is given up although its worker says that it has it."""

    first_token_timeout_s: float = 600.0
    """Without its first token for so long. It may well wait in queues, so this is long."""
    stall_timeout_s: float = 60.0
    """Without its next token for so long."""


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    router_id: RouterId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class SubmissionEnd:
    """An attempt ended without finishing."""

    error: ErrorInfo
    lost_source: bool = False
    lost_worker: bool = False
    """The decode worker's streams have broken; it may be dead."""


@dataclass(frozen=True, slots=True)
class SubmissionTokens:
    event: TokenEvent
    timings: RequestTimings | None
    arrived_at: float


class Submission:
    """One attempt of a request at one decode worker."""

    def __init__(
        self, number: SubmitNumber, now: float, cancel: "Callable[[Submission, CancelReason], None]"
    ) -> None:
        self.number = number
        self.submitted_at = now
        self.last_token_at: float | None = None
        self.alone = False
        """It runs beside nothing else, as it was to."""
        # Whoever reads this never waits for a client (see `router.choices`), so it stays short.
        self.events: asyncio.Queue[SubmissionTokens | SubmissionEnd] = asyncio.Queue()
        self._cancel = cancel

    def cancel(self, reason: CancelReason) -> None:
        """Stop it at the worker. Idempotent; harmless when it has ended."""
        self._cancel(self, reason)


class WorkerLink:
    """Keeps the streams to one worker open. `run` lasts as long as the worker is a member."""

    def __init__(
        self,
        router: RouterIdentity,
        view: WorkerView,
        fleet: Fleet,
        rpc: Rpc,
        clock: Clock,
        metrics: RouterMetrics,
        settings: LinkSettings,
    ) -> None:
        self._router = router
        self._view = view
        self._fleet = fleet
        self._rpc = rpc
        self._clock = clock
        self._num_sessions = 0
        self._metrics = metrics
        self._settings = settings
        self._num_submitted = 0
        self._submissions: dict[SubmitNumber, Submission] = {}
        self._outgoing: asyncio.Queue[SessionUp] = asyncio.Queue()

    def submit(self, make: Callable[[SubmitNumber], Submit]) -> Submission:
        """Send a submission, numbered by this link. Raises WorkerLost when the worker is not connected."""
        if not self._view.connected:
            raise WorkerLost(f"{self._view.member.worker_id} is not connected")
        self._num_submitted += 1
        number = SubmitNumber(self._num_submitted)
        submission = self._submissions[number] = Submission(number, self._clock.now(), self._cancel)
        self._outgoing.put_nowait(make(number))
        return submission

    @property
    def num_live(self) -> int:
        """Submissions that have neither ended nor been cancelled."""
        return len(self._submissions)

    async def run(self) -> None:
        """Until cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                async with task_scope() as tasks:
                    tasks.create_task(self._connect(tasks))
            except PdserveError as error:
                if self._view.is_leaving:
                    log.info("%s has left: %s", self._view.member.worker_id, error)
                elif self._view.connected or isinstance(error, _NEVER_HEALS):
                    log.warning("%s is lost: %s", self._view.member.worker_id, error)
                    retry_s = FIRST_RETRY_S
            except Exception:  # whatever is wrong with what it said must not cost us this worker for ever
                log.exception("talking to %s", self._view.member.worker_id)
            finally:
                self._lose()
            await self._clock.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _connect(self, tasks: TaskScope) -> None:
        greeted = asyncio.Event()
        tasks.create_task(self._watch(greeted))
        await greeted.wait()
        if self._view.member.role is Role.PREFILL:
            self._fleet.connected(self._view)
        else:
            await self._hold_session()

    async def _watch(self, greeted: asyncio.Event) -> None:
        """Follow the worker's reports; when the index has lost count of its names, from a snapshot on."""
        while True:
            async with self._stream(Call.WATCH) as stream:
                await stream.send(WatchOpen(str(self._router.router_id), self._router.incarnation))
                self._take_hello(await self._next(stream))
                while self._take_report(await self._next(stream)):
                    greeted.set()
            log.warning("the prefix index lost count of %s; starting anew", self._view.member.worker_id)
            await self._clock.sleep(FIRST_RETRY_S)

    def _take_hello(self, message: object) -> None:
        if not isinstance(message, Hello):
            raise _unexpected(message)
        self._check(message)
        self._warn_of_strangers(message)
        self._fleet.hello(self._view, message)

    def _take_report(self, message: object) -> bool:
        """False when the index does not agree with the worker any more."""
        match message:
            case Hello():
                self._metrics.count_stale(Hello)
            case Report(incarnation) if incarnation != self._view.member.incarnation:
                self._metrics.count_stale(Report)
            case Report() as report:
                agrees = self._fleet.report(self._view, report, self._clock.now())
                if self._view.hangs and self._submissions:
                    raise WorkerLost(f"the engine of {self._view.member.worker_id} hangs")
                return agrees
            case other:
                raise _unexpected(other)
        return True

    async def _next(self, stream: MessageStream) -> object:
        """The next message. Raises WorkerLost when none comes for too long."""
        try:
            async with self._clock.timeout(SILENCE_S):
                return await stream.receive()
        except TimeoutError:
            raise WorkerLost(f"{self._view.member.worker_id} said nothing for {SILENCE_S:g} s") from None

    def _check(self, hello: Hello) -> None:
        if hello.incarnation != self._view.member.incarnation:
            raise self._restarted()
        if hello.root_digest != ChainRoot(hello.model.fingerprint).digest:
            raise ProtocolViolation(
                f"{hello.worker_id} names blocks in another way than this router: "
                "run the same version of pdserve everywhere"
            )

    def _warn_of_strangers(self, hello: Hello) -> None:
        """Placement pairs only workers whose KV means the same."""
        for other in self._fleet.strangers(hello):
            log.warning(
                "%s (%s, blocks of %d tokens) and %s (%s, blocks of %d tokens) cannot be paired: "
                "their model, revision, dtype, block size or version of pdserve differs",
                *(hello.worker_id, hello.model.name, hello.model.block_size),
                *(other.worker_id, other.model.name, other.model.block_size),
            )

    async def _hold_session(self) -> None:
        async with self._stream(Call.SESSION) as stream:
            member = self._view.member
            self._num_sessions += 1
            router = self._router
            await stream.send(
                SessionOpen(router.router_id, router.incarnation, member.incarnation, self._num_sessions)
            )
            await self._await_ready(stream)
            self._num_submitted = 0
            self._fleet.connected(self._view)
            async with task_scope() as tasks:
                tasks.create_task(self._write(stream))
                await self._read(stream)

    async def _await_ready(self, stream: MessageStream) -> None:
        answer = await self._next(stream)
        if not isinstance(answer, SessionReady):
            raise _unexpected(answer)
        if answer.worker_incarnation != self._view.member.incarnation:
            raise self._restarted()

    def _restarted(self) -> WorkerLost:
        return WorkerLost(f"{self._view.member.worker_id} was restarted; waiting for the controller's word")

    async def _write(self, stream: MessageStream) -> None:
        while True:
            await stream.send(await self._outgoing.get())

    async def _read(self, stream: MessageStream) -> None:
        while True:
            match await self._next(stream):
                case Frame(_, events, timings):
                    self._deliver(events, dict(timings))
                case Refused(number, error):
                    self._finish(number, SubmissionEnd(error))
                case Failed(number, error, lost_source):
                    self._finish(number, SubmissionEnd(error, lost_source))
                case Alone(number, alone):
                    if number in self._submissions:
                        self._submissions[number].alone = alone
                case Holding(last_submit, numbers):
                    self._compare(last_submit, set(numbers))
                case SessionReady():
                    self._metrics.count_stale(SessionReady)
                case other:
                    raise _unexpected(other)

    def _deliver(self, events: tuple[TokenEvent, ...], timings: dict[SubmitNumber, RequestTimings]) -> None:
        now = self._clock.now()
        for event in events:
            self._view.num_output_tokens += num_tokens(event.tokens)
            tokens = SubmissionTokens(event, timings.get(event.number), now)
            if event.finish is not None:
                self._finish(event.number, tokens)
            elif event.number in self._submissions:  # else it was cancelled a moment ago
                submission = self._submissions[event.number]
                submission.last_token_at = now
                submission.events.put_nowait(tokens)

    def _finish(self, number: SubmitNumber, last: SubmissionTokens | SubmissionEnd) -> None:
        submission = self._submissions.pop(number, None)
        if submission is not None:
            submission.events.put_nowait(last)

    def _compare(self, last_submit: SubmitNumber, held: set[SubmitNumber]) -> None:
        """Let nobody wait for what the worker does not have, nor the worker work on what nobody wants."""
        for number in sorted(held - self._submissions.keys()):
            self._outgoing.put_nowait(Cancel(number, CancelReason.UNKNOWN_HERE))
        for submission in list(self._submissions.values()):
            why = self._why_lost(submission, last_submit, held)
            if why:
                self._give_up(submission, why)

    def _why_lost(
        self, submission: Submission, last_submit: SubmitNumber, held: set[SubmitNumber]
    ) -> str | None:
        """Why nothing more is to be expected of a submission."""
        now, settings = self._clock.now(), self._settings
        waited_s = now - submission.submitted_at
        if submission.number not in held:
            if submission.number <= last_submit:
                return "does not have the submission any more"
            return "has not taken the submission" if waited_s >= SUBMIT_TIMEOUT_S else None
        if submission.last_token_at is None:
            late = waited_s >= settings.first_token_timeout_s
            return f"has brought no token for {waited_s:.0f} s" if late else None
        silent_s = now - submission.last_token_at
        return f"has brought no token for {silent_s:.0f} s" if silent_s >= settings.stall_timeout_s else None

    def _give_up(self, submission: Submission, why: str) -> None:
        self._cancel(submission, CancelReason.STALLED)
        error = Stalled(f"{self._view.member.worker_id} {why}")
        submission.events.put_nowait(SubmissionEnd(error.info))

    def _cancel(self, submission: Submission, reason: CancelReason) -> None:
        # Numbers start again with each Session: only what this very submission still has is cancelled.
        if self._submissions.get(submission.number) is submission:
            del self._submissions[submission.number]
            self._outgoing.put_nowait(Cancel(submission.number, reason))

    def _lose(self) -> None:
        self._fleet.lost(self._view)
        error = WorkerLost(f"{self._view.member.worker_id} was lost").info
        for number in list(self._submissions):
            self._finish(number, SubmissionEnd(error, lost_worker=True))
        self._outgoing = asyncio.Queue()

    @contextlib.asynccontextmanager
    async def _stream(self, call: Call) -> AsyncIterator[MessageStream]:
        stream = await self._rpc.open(self._view.member.address, call)
        try:
            yield stream
        finally:
            stream.cancel()


class Links:
    """One link per member, started and stopped as the membership changes."""

    def __init__(
        self,
        router: RouterIdentity,
        fleet: Fleet,
        rpc: Rpc,
        clock: Clock,
        metrics: RouterMetrics,
        settings: LinkSettings,
    ) -> None:
        self._router = router
        self._fleet = fleet
        self._rpc = rpc
        self._clock = clock
        self._metrics = metrics
        self._settings = settings
        self._links: dict[WorkerId, tuple[WorkerView, WorkerLink, asyncio.Task[None]]] = {}

    def __getitem__(self, worker_id: WorkerId) -> WorkerLink:
        return self._links[worker_id][1]

    def set_members(self, members: Members) -> None:
        if members.epoch < self._fleet.epoch:
            self._metrics.count_stale(Members)
            return
        self._fleet.set_members(members)
        for worker_id, (view, _, task) in list(self._links.items()):
            if self._fleet.workers.get(worker_id) is not view:
                task.cancel()
                del self._links[worker_id]
        for worker_id, view in self._fleet.workers.items():
            if worker_id not in self._links:
                link = self._link_to(view)
                self._links[worker_id] = (view, link, asyncio.create_task(link.run()))

    def _link_to(self, view: WorkerView) -> WorkerLink:
        return WorkerLink(
            self._router, view, self._fleet, self._rpc, self._clock, self._metrics, self._settings
        )

    def check_integrity(self) -> None:
        """Raises AssertionError when a link that is down still has submissions."""
        for worker_id, (view, link, _) in self._links.items():
            assert view.connected or not link.num_live, (
                f"{worker_id} is not connected and has {link.num_live} submissions"
            )

    async def close(self) -> None:
        await cancel_and_wait(*(task for _, _, task in self._links.values()))
        self._links.clear()


def _unexpected(message: object) -> PdserveError:
    if isinstance(message, End) and message.error is not None:
        return error_from_info(message.error)
    return ProtocolViolation(f"{type(message).__name__} does not belong here")
