"""What every stream does, whatever carries it: two bounded windows and the rules of End."""

import asyncio
import logging
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Generic, TypeVar, get_args

from pdserve.contract.errors import ErrorCode, ErrorInfo, PdserveError, StreamBroken
from pdserve.contract.messages import (
    End,
    Message,
    PrefillDown,
    PrefillUp,
    SessionDown,
    SessionUp,
    WatchDown,
    WatchUp,
)
from pdserve.contract.ports import Call, Handler, Refusal
from pdserve.rpc.window import Window
from pdserve.tasks import outlast

Out = TypeVar("Out")


class Direction(StrEnum):
    UP = "up"
    """From whoever opened the stream."""
    DOWN = "down"


MESSAGE_KINDS: dict[tuple[Call, Direction], tuple[type, ...]] = {
    (Call.SESSION, Direction.UP): get_args(SessionUp),
    (Call.SESSION, Direction.DOWN): get_args(SessionDown),
    (Call.WATCH, Direction.UP): get_args(WatchUp),
    (Call.WATCH, Direction.DOWN): get_args(WatchDown),
    (Call.PREFILL, Direction.UP): get_args(PrefillUp),
    (Call.PREFILL, Direction.DOWN): get_args(PrefillDown),
    (Call.KV, Direction.UP): (bytes, End),
    (Call.KV, Direction.DOWN): (bytes, End),
}
"""What may travel where."""

logger = logging.getLogger(__name__)


REFUSALS = frozenset(
    {
        ErrorCode.UNAUTHENTICATED,
        ErrorCode.PROTOCOL,
        ErrorCode.STALE_INCARNATION,
        ErrorCode.FINGERPRINT_MISMATCH,
        ErrorCode.NOT_FOUND,
        ErrorCode.INVALID_REQUEST,
    }
)
"""With these errors a call is refused because of what its peer is or sent."""


class BufferedStream(ABC, Generic[Out]):
    """One side of a stream: a MessageStream over an inbox that a carrier fills and an outbox, in the
    carrier's own form, that it empties.

    A cancelled `send` has sent nothing and a cancelled `receive` has taken nothing, so both may stand
    under a timeout.
    """

    def __init__(self, peer: str, call: Call, sends: Direction, inbox: Window[Message], outbox: Window[Out]):
        self._peer = peer
        self._call = call
        self._sends = sends
        self._inbox = inbox
        self._outbox = outbox
        self._end_sent = False
        self._end_arrived = False
        self._end_received = False
        self._broken = False
        self._handler: asyncio.Task[None] | None = None

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def broken(self) -> bool:
        """The stream stopped before both sides had said End."""
        return self._broken

    @property
    def end_sent(self) -> bool:
        return self._end_sent

    @property
    def end_arrived(self) -> bool:
        """The other side's End is here, received or not."""
        return self._end_arrived

    @property
    def finished(self) -> bool:
        """Both sides have said End."""
        return self._end_sent and self._end_arrived

    async def send(self, message: Message) -> None:
        """See MessageStream. To a peer that has said End itself, a last End is sent in vain without error.
        Raises TypeError for a message that does not belong here and RuntimeError after End."""
        self._check(message)
        is_end = isinstance(message, End)
        try:
            await self._put(message)
        except StreamBroken:
            if not (is_end and self._end_arrived):
                raise
        self._end_sent = is_end

    async def receive(self) -> Message:
        if self._end_received:
            raise RuntimeError(f"receive from {self._peer} after its End")
        message = await self._inbox.get()
        self._end_received = isinstance(message, End)
        return message

    def cancel(self) -> None:
        if not self.finished and not self._broken:
            self.break_off("the stream was cancelled on this side", drop=True)
            self._on_cancel()

    def arrive(self, message: Message) -> None:
        """The carrier brings a message for which the inbox has reserved room."""
        self._end_arrived = self._end_arrived or isinstance(message, End)
        self._inbox.arrive(message)

    def break_off(self, reason: str | StreamBroken, *, drop: bool = False) -> None:
        """The carrier says that nothing more will come or go. What has arrived can still be received,
        unless `drop`. A handler that waits in this stream gets StreamBroken there; else it is cancelled."""
        if self.finished or self._broken:
            return
        self._broken = True
        broken = reason if isinstance(reason, StreamBroken) else StreamBroken(reason)
        told = self._outbox.break_entry(broken) | self._inbox.break_exit(broken, drop=drop)
        if self._handler is not None and self._handler not in told | {asyncio.current_task()}:
            self._handler.cancel()

    def serve_with(self, handler: "asyncio.Task[None]") -> None:
        """The task to cancel when the stream breaks."""
        self._handler = handler
        if self._broken:
            handler.cancel()

    def _check(self, message: Message) -> None:
        kind = type(message)
        if kind not in MESSAGE_KINDS[self._call, self._sends]:
            raise TypeError(f"{kind.__name__} does not travel {self._sends} a {self._call} stream")
        if message == b"":
            raise ValueError("a Kv stream carries no empty payloads")
        if self._end_sent:
            raise RuntimeError(f"{kind.__name__} sent to {self._peer} after End")

    @abstractmethod
    async def _put(self, message: Message) -> None:
        """Hand a message to the carrier, waiting for room. Raises StreamBroken."""

    @abstractmethod
    def _on_cancel(self) -> None:
        """Let the carrier tell the other side."""


async def serve_stream(
    handler: Handler, stream: BufferedStream[Out], on_refusal: Refusal | None = None
) -> None:
    """Run `handler` to its end; it is told when the stream breaks, and the peer always gets an End or a
    broken stream. When cancelled, breaks the stream and still waits for the handler's own clean-up."""
    serving = asyncio.ensure_future(_run(handler, stream))
    stream.serve_with(serving)
    try:
        await _outlast(serving, stream)
    finally:
        error = _outcome(serving, stream)
        has_failed = not serving.cancelled() and serving.exception() is not None
        if has_failed and error.code in REFUSALS and on_refusal is not None:
            on_refusal(error.code)
        if not stream.broken and not stream.end_sent:
            await _say_end(stream, error)


async def _run(handler: Handler, stream: BufferedStream[Out]) -> None:
    await handler(stream)


async def _outlast(serving: "asyncio.Task[None]", stream: BufferedStream[Out]) -> None:
    try:
        await asyncio.wait([serving])
    except asyncio.CancelledError:
        stream.break_off("the peer is gone or the server stops")
        await outlast(serving)
        raise


def _outcome(serving: "asyncio.Task[None]", stream: BufferedStream[Out]) -> ErrorInfo:
    """The error to tell the peer of a handler that has ended without saying End."""
    if serving.cancelled():
        return ErrorInfo(ErrorCode.CANCELLED, "the call was cancelled by the server")
    failure = serving.exception()
    if failure is None:
        return ErrorInfo(ErrorCode.PROTOCOL, "the server's handler returned without an End message")
    expected = _expected_error(failure)
    if expected is not None:
        return expected.info
    logger.error("a handler for %s failed", stream.peer, exc_info=failure)
    return ErrorInfo(ErrorCode.INTERNAL, f"{type(failure).__name__} in the server; see its log")


def _expected_error(failure: BaseException) -> PdserveError | None:
    """The typed error in what a handler raised, also out of a task group; None when there is another one."""
    if isinstance(failure, PdserveError):
        return failure
    if not isinstance(failure, BaseExceptionGroup):
        return None
    found = [_expected_error(inner) for inner in failure.exceptions]
    if None in found:
        return None
    return next((error for error in found if not isinstance(error, StreamBroken)), found[0])


async def _say_end(stream: BufferedStream[Out], error: ErrorInfo) -> None:
    try:
        await stream.send(End(error))
    except StreamBroken as broken:
        logger.debug("no End for %s: %s", stream.peer, broken)
