"""The routers' Session streams: submissions in, one frame per engine step out."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from decode_worker.request import TokenSink
from pdserve.contract.errors import ProtocolViolation, StaleIncarnation
from pdserve.contract.ids import Incarnation, RouterId, SubmitNumber
from pdserve.contract.messages import (
    Cancel,
    End,
    Failed,
    Frame,
    Refused,
    RequestTimings,
    SessionDown,
    SessionOpen,
    SessionReady,
    Submit,
    TokenEvent,
)
from pdserve.contract.ports import MessageStream
from pdserve.tasks import task_scope

log = logging.getLogger(__name__)

MAX_QUEUED_FRAMES = 4096
"""A router that lets more than this pile up has stopped reading; its Session is broken then."""


class Submissions(Protocol):
    """What a Session needs of the worker's loop."""

    def submit(self, sink: TokenSink, submit: Submit) -> None: ...
    def cancel(self, sink: TokenSink, number: SubmitNumber) -> None: ...
    def drop(self, sink: TokenSink) -> None: ...


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

    def answer(self, message: Refused | Failed) -> None:
        self._put(message)

    def _put(self, message: SessionDown) -> None:
        try:
            self.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            log.warning("%s does not read its Session; breaking it", self.router_id)
            self._give_up()


class SessionServer:
    """Serves the Session streams of one decode worker."""

    def __init__(self, incarnation: Incarnation, submissions: Submissions) -> None:
        self._incarnation = incarnation
        self._submissions = submissions
        self._last_submits: dict[Incarnation, SubmitNumber] = {}  # router incarnation -> newest Submit

    def last_submit(self, router: Incarnation) -> SubmitNumber:
        """The newest Submit taken from that router; 0 before the first."""
        return self._last_submits.get(router, SubmitNumber(0))

    async def serve(self, stream: MessageStream) -> None:
        """Handler of `Call.SESSION`."""
        opened = await stream.receive()
        if not isinstance(opened, SessionOpen):
            raise ProtocolViolation(f"a Session starts with SessionOpen, not {type(opened).__name__}")
        if opened.worker_incarnation != self._incarnation:
            raise StaleIncarnation("this worker was restarted since the router learned of it")
        await stream.send(SessionReady(self._incarnation))
        session = RouterSession(opened.router_id, stream.cancel)
        self._last_submits[opened.router_incarnation] = SubmitNumber(0)
        try:
            async with task_scope() as tasks:
                writer = tasks.create_task(self._write(stream, session))
                await self._read(stream, session, opened.router_incarnation)
                writer.cancel()
            await stream.send(End())
        finally:
            self._submissions.drop(session)
            self._last_submits.pop(opened.router_incarnation, None)

    async def _read(self, stream: MessageStream, session: RouterSession, router: Incarnation) -> None:
        while True:
            match await stream.receive():
                case Submit() as submit:
                    self._last_submits[router] = submit.number
                    self._submissions.submit(session, submit)
                case Cancel(number):
                    self._submissions.cancel(session, number)
                case End():
                    return
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} does not belong on a Session")

    @staticmethod
    async def _write(stream: MessageStream, session: RouterSession) -> None:
        while True:
            await stream.send(await session.outgoing.get())
