"""The router's streams to one worker: Watch, and for workers that decode the Session.

Both live and die together: when either breaks, the worker is lost, every submission it had fails with
WORKER_LOST, and the link tries again as long as the worker is a member.
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
    Unauthenticated,
    WorkerLost,
    error_from_info,
)
from pdserve.contract.ids import Incarnation, RouterId, SubmitNumber, WorkerId
from pdserve.contract.messages import (
    Cancel,
    End,
    Failed,
    Frame,
    Hello,
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
from pdserve.tasks import cancel_and_wait, task_scope
from router.fleet import Fleet, WorkerView

log = logging.getLogger(__name__)

FIRST_RETRY_S = 0.1
LAST_RETRY_S = 2.0

_NEVER_HEALS = (ProtocolViolation, Unauthenticated, ConfigError)
"""Errors that an operator must hear of, because trying again will not help."""


@dataclass(frozen=True, slots=True)
class RouterIdentity:
    router_id: RouterId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class SubmissionEnd:
    """An attempt ended without finishing."""

    error: ErrorInfo
    lost_source: bool = False


@dataclass(frozen=True, slots=True)
class SubmissionTokens:
    event: TokenEvent
    timings: RequestTimings | None
    arrived_at: float


class Submission:
    """One attempt of a request at one decode worker."""

    def __init__(self, number: SubmitNumber, cancel: "Callable[[Submission], None]") -> None:
        self.number = number
        # Whoever reads this never waits for a client (see `router.choices`), so it stays short.
        self.events: asyncio.Queue[SubmissionTokens | SubmissionEnd] = asyncio.Queue()
        self._cancel = cancel

    def cancel(self) -> None:
        """Stop it at the worker. Idempotent; harmless when it has ended."""
        self._cancel(self)


class WorkerLink:
    """Keeps the streams to one worker open. `run` lasts as long as the worker is a member."""

    def __init__(
        self, router: RouterIdentity, view: WorkerView, fleet: Fleet, rpc: Rpc, clock: Clock
    ) -> None:
        self._router = router
        self._view = view
        self._fleet = fleet
        self._rpc = rpc
        self._clock = clock
        self._num_sessions = 0
        self._num_submitted = 0
        self._submissions: dict[SubmitNumber, Submission] = {}
        self._outgoing: asyncio.Queue[SessionUp] = asyncio.Queue()

    def submit(self, make: Callable[[SubmitNumber], Submit]) -> Submission:
        """Send a submission, numbered by this link. Raises WorkerLost when the worker is not connected."""
        if not self._view.connected:
            raise WorkerLost(f"{self._view.member.worker_id} is not connected")
        self._num_submitted += 1
        number = SubmitNumber(self._num_submitted)
        submission = self._submissions[number] = Submission(number, self._cancel)
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
                if self._view.connected or isinstance(error, _NEVER_HEALS):
                    log.warning("%s is lost: %s", self._view.member.worker_id, error)
                    retry_s = FIRST_RETRY_S
            except Exception:  # whatever is wrong with what it said must not cost us this worker for ever
                log.exception("talking to %s", self._view.member.worker_id)
            finally:
                self._lose()
            await self._clock.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _connect(self, tasks: asyncio.TaskGroup) -> None:
        greeted = asyncio.Event()
        tasks.create_task(self._watch(greeted))
        await greeted.wait()
        if self._view.member.role is Role.PREFILL:
            self._fleet.connected(self._view)
        else:
            await self._hold_session()

    async def _watch(self, greeted: asyncio.Event) -> None:
        async with self._stream(Call.WATCH) as stream:
            await stream.send(WatchOpen(str(self._router.router_id), self._router.incarnation))
            while True:
                match await stream.receive():
                    case Hello() as hello:
                        self._check(hello)
                        self._fleet.hello(self._view, hello)
                    case Report() as report:
                        if not self._fleet.report(self._view, report, self._clock.now()):
                            raise ProtocolViolation("the prefix index lost count; starting from a snapshot")
                        greeted.set()
                    case other:
                        raise _unexpected(other)

    def _check(self, hello: Hello) -> None:
        if hello.incarnation != self._view.member.incarnation:
            raise WorkerLost(f"{hello.worker_id} was restarted; waiting for the controller's word")
        if hello.root_digest != ChainRoot(hello.model.fingerprint).digest:
            raise ProtocolViolation(
                f"{hello.worker_id} names blocks in another way than this router: "
                "run the same version of pdserve everywhere"
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

    @staticmethod
    async def _await_ready(stream: MessageStream) -> None:
        answer = await stream.receive()
        if not isinstance(answer, SessionReady):
            raise _unexpected(answer)

    async def _write(self, stream: MessageStream) -> None:
        while True:
            await stream.send(await self._outgoing.get())

    async def _read(self, stream: MessageStream) -> None:
        while True:
            match await stream.receive():
                case Frame(_, events, timings):
                    self._deliver(events, dict(timings))
                case Refused(number, error):
                    self._finish(number, SubmissionEnd(error))
                case Failed(number, error, lost_source):
                    self._finish(number, SubmissionEnd(error, lost_source))
                case other:
                    raise _unexpected(other)

    def _deliver(self, events: tuple[TokenEvent, ...], timings: dict[SubmitNumber, RequestTimings]) -> None:
        now = self._clock.now()
        for event in events:
            tokens = SubmissionTokens(event, timings.get(event.number), now)
            if event.finish is not None:
                self._finish(event.number, tokens)
            elif event.number in self._submissions:  # else it was cancelled a moment ago
                self._submissions[event.number].events.put_nowait(tokens)

    def _finish(self, number: SubmitNumber, last: SubmissionTokens | SubmissionEnd) -> None:
        submission = self._submissions.pop(number, None)
        if submission is not None:
            submission.events.put_nowait(last)

    def _cancel(self, submission: Submission) -> None:
        # Numbers start again with each Session: only what this very submission still has is cancelled.
        if self._submissions.get(submission.number) is submission:
            del self._submissions[submission.number]
            self._outgoing.put_nowait(Cancel(submission.number))

    def _lose(self) -> None:
        self._fleet.lost(self._view)
        error = WorkerLost(f"{self._view.member.worker_id} was lost").info
        for number in list(self._submissions):
            self._finish(number, SubmissionEnd(error))
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

    def __init__(self, router: RouterIdentity, fleet: Fleet, rpc: Rpc, clock: Clock) -> None:
        self._router = router
        self._fleet = fleet
        self._rpc = rpc
        self._clock = clock
        self._links: dict[WorkerId, tuple[WorkerView, WorkerLink, asyncio.Task[None]]] = {}

    def __getitem__(self, worker_id: WorkerId) -> WorkerLink:
        return self._links[worker_id][1]

    def set_members(self, members: Members) -> None:
        self._fleet.set_members(members)
        for worker_id, (view, _, task) in list(self._links.items()):
            if self._fleet.workers.get(worker_id) is not view:
                task.cancel()
                del self._links[worker_id]
        for worker_id, view in self._fleet.workers.items():
            if worker_id not in self._links:
                link = WorkerLink(self._router, view, self._fleet, self._rpc, self._clock)
                self._links[worker_id] = (view, link, asyncio.create_task(link.run()))

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
