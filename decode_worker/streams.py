"""The routers' Session streams: submissions in, one frame per engine step out.

Once a second a Session says what the worker holds of its router (`Holding`). So both notice within seconds
when a message was lost: a Submit that never came, a Cancel, a Failed or the last Frame.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from decode_worker.request import TokenSink
from pdserve.contract.errors import ProtocolViolation, Replayed, StaleIncarnation
from pdserve.contract.ids import Incarnation, RouterId, SubmitNumber
from pdserve.contract.messages import (
    SIGN_OF_LIFE_S,
    Alone,
    Cancel,
    CancelReason,
    End,
    Failed,
    Frame,
    Holding,
    Refused,
    RequestTimings,
    SessionDown,
    SessionOpen,
    SessionReady,
    Submit,
    TokenEvent,
)
from pdserve.contract.ports import Clock, MessageStream
from pdserve.metrics import WorkerMetrics
from pdserve.tasks import task_scope

log = logging.getLogger(__name__)

MAX_QUEUED_FRAMES = 4096
"""A router that lets more than this pile up has stopped reading; its Session is broken then."""


class Submissions(Protocol):
    """What a Session needs of the worker's loop."""

    def submit(self, sink: TokenSink, submit: Submit) -> None: ...
    def cancel(self, sink: TokenSink, number: SubmitNumber, reason: CancelReason) -> None: ...
    def drop(self, sink: TokenSink) -> None: ...
    def held(self, sink: TokenSink) -> tuple[SubmitNumber, ...]: ...


class RouterSession:
    """One router's stream, as the loop writes to it. Nothing here waits for the router."""

    def __init__(self, router_id: RouterId, give_up: Callable[[], None]) -> None:
        self.router_id = router_id
        self.last_submit = SubmitNumber(0)
        self.outgoing: asyncio.Queue[SessionDown] = asyncio.Queue(MAX_QUEUED_FRAMES)
        self._give_up = give_up
        self._events: list[TokenEvent] = []
        self._timings: list[tuple[SubmitNumber, RequestTimings]] = []

    def emit(self, event: TokenEvent, timings: RequestTimings | None = None) -> None:
        self._events.append(event)
        if timings is not None:
            self._timings.append((event.number, timings))

    def flush(self, step: int) -> None:
        if self._events:
            frame = Frame(step, tuple(self._events), tuple(self._timings))
            self._events, self._timings = [], []
            self._put(frame)

    def answer(self, message: Refused | Failed | Alone) -> None:
        self._put(message)

    def cut(self) -> None:
        """Break the stream: a newer Session of the same router has come."""
        self._give_up()

    def say_holding(self, numbers: tuple[SubmitNumber, ...]) -> None:
        self._put(Holding(self.last_submit, numbers))

    def _put(self, message: SessionDown) -> None:
        try:
            self.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("%s does not read its Session; breaking it", self.router_id)
            self._give_up()


class SessionServer:
    """Serves the Session streams of one decode worker."""

    def __init__(
        self, incarnation: Incarnation, submissions: Submissions, clock: Clock, metrics: WorkerMetrics
    ) -> None:
        self._incarnation = incarnation
        self._submissions = submissions
        self._clock = clock
        self._metrics = metrics
        self._sessions: dict[Incarnation, RouterSession] = {}  # router incarnation -> its open Session
        self._numbers: dict[Incarnation, int] = {}  # router incarnation -> number of its newest Session

    def last_submit(self, router: Incarnation) -> SubmitNumber:
        """The newest Submit taken from that router's open Session; 0 before the first."""
        session = self._sessions.get(router)
        return session.last_submit if session is not None else SubmitNumber(0)

    async def flushed(self) -> None:
        """Wait until all that the open Sessions have to say has been sent."""
        for session in list(self._sessions.values()):
            await session.outgoing.join()

    async def serve(self, stream: MessageStream) -> None:
        """Handler of `Call.SESSION`."""
        opened = await stream.receive()
        if not isinstance(opened, SessionOpen):
            raise ProtocolViolation(f"a Session starts with SessionOpen, not {type(opened).__name__}")
        session = RouterSession(opened.router_id, stream.cancel)
        self._enter(opened, session)
        try:
            await stream.send(SessionReady(self._incarnation))
            async with task_scope() as tasks:
                writer = tasks.create_task(self._write(stream, session))
                teller = tasks.create_task(self._tell_holdings(session))
                await self._read(stream, session)
                writer.cancel()
                teller.cancel()
            await stream.send(End())
        finally:
            self._leave(opened.router_incarnation, session)

    def _enter(self, opened: SessionOpen, session: RouterSession) -> None:
        """Let the router's newest Session take the place of the one before it, which may be broken without
        our knowing. Raises StaleIncarnation, and Replayed for what is not the newest."""
        if opened.worker_incarnation != self._incarnation:
            raise StaleIncarnation("this worker was restarted since the router learned of it")
        router = opened.router_incarnation
        if opened.number <= self._numbers.get(router, 0):
            raise Replayed(
                f"Session {opened.number} of {opened.router_id} comes after Session {self._numbers[router]}"
            )
        self._numbers[router] = opened.number
        former = self._sessions.get(router)
        if former is not None:
            self._leave(router, former)
            former.cut()
        self._sessions[router] = session

    def _leave(self, router: Incarnation, session: RouterSession) -> None:
        self._submissions.drop(session)
        if self._sessions.get(router) is session:
            del self._sessions[router]

    async def _read(self, stream: MessageStream, session: RouterSession) -> None:
        while True:
            match await stream.receive():
                case Submit() as submit:
                    self._take(session, submit)
                case Cancel(number, reason):
                    self._submissions.cancel(session, number, reason)
                case SessionOpen():
                    self._metrics.count_stale(SessionOpen)
                case End():
                    return
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} does not belong on a Session")

    def _take(self, session: RouterSession, submit: Submit) -> None:
        """A number counts once. One that comes late, after a higher one, may have been given up already."""
        if submit.number <= session.last_submit:
            self._metrics.count_stale(Submit)
        else:
            session.last_submit = submit.number
            self._submissions.submit(session, submit)

    async def _tell_holdings(self, session: RouterSession) -> None:
        while True:
            await self._clock.sleep(SIGN_OF_LIFE_S)
            session.say_holding(self._submissions.held(session))

    @staticmethod
    async def _write(stream: MessageStream, session: RouterSession) -> None:
        while True:
            await stream.send(await session.outgoing.get())
            session.outgoing.task_done()
