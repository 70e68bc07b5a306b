"""Both sides of a stream over gRPC: one gRPC call per stream.

Two pumps per side move messages between gRPC and the stream's windows: gRPC cancels a call whose read or
write is cancelled, but a `receive` under a timeout must lose nothing.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, cast

import grpc
import grpc.aio

from pdserve.contract.errors import ProtocolViolation, StreamBroken, Unauthenticated
from pdserve.contract.messages import End, Message
from pdserve.contract.ports import Call, Handler, Refusal
from pdserve.rpc.channel import FAREWELL_S, MAX_MESSAGE_BYTES
from pdserve.rpc.convert import SERVICE, codec_for
from pdserve.rpc.stream import BufferedStream, Direction, serve_stream
from pdserve.rpc.window import Window

_WINDOW_MESSAGES = {Call.SESSION: 16, Call.WATCH: 16, Call.PREFILL: 16, Call.KV: 2}
"""Messages between a pump and its stream; what gRPC itself has under way comes on top. KV is megabytes."""

# What grpc.aio raises from reads and writes of a call that is over.
_CALL_IS_OVER = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)


Metadata = tuple[tuple[str, str], ...]
"""What a call carries beside its messages."""

_EOF = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in its stubs


class Packed(NamedTuple):
    """One message as it is written to gRPC."""

    parts: tuple[bytes, ...]
    is_end: bool


class GrpcStream(BufferedStream[Packed]):
    """What both sides have in common: packing, and the two pumps."""

    def __init__(self, peer: str, call: Call, sends: Direction, receives: Direction):
        capacity = _WINDOW_MESSAGES[call]
        super().__init__(peer, call, sends, inbox=Window(capacity), outbox=Window(capacity))
        self._encoder = codec_for(call, sends)
        self._decoder = codec_for(call, receives)
        self._num_unwritten = 0  # messages that were sent here and are not with gRPC
        self._all_written = asyncio.Event()

    async def _put(self, message: Message) -> None:
        parts = self._encoder.encode(message)
        num_bytes = max(map(len, parts))
        if num_bytes > MAX_MESSAGE_BYTES:
            raise ValueError(f"a {type(message).__name__} of {num_bytes} bytes exceeds {MAX_MESSAGE_BYTES}")
        await self._outbox.put(Packed(parts, isinstance(message, End)))
        self._num_unwritten += 1
        self._all_written.clear()

    async def _fill_inbox(self, read: Callable[[], Awaitable[Any]]) -> None:
        """Until the other side has closed its direction. Raises ProtocolViolation for what must not come."""
        while (raw := await read()) is not _EOF:
            if len(raw) > MAX_MESSAGE_BYTES:
                raise ProtocolViolation(f"a message of {len(raw)} bytes exceeds {MAX_MESSAGE_BYTES}")
            if (message := self._decoder.decode(raw)) is not None:
                await self._inbox.reserve()
                self.arrive(message)

    async def _empty_outbox(self, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Until End is written."""
        is_end = False
        while not is_end:
            parts, is_end = await self._outbox.get()
            for part in parts:
                await write(part)
            self._num_unwritten -= 1
            if not self._num_unwritten:
                self._all_written.set()


class ClientStream(GrpcStream):
    """The side that opened the stream. Lives until gRPC says how the call ended."""

    def __init__(self, address: str, call: Call, channel: grpc.aio.Channel, metadata: Metadata):
        super().__init__(address, call, sends=Direction.UP, receives=Direction.DOWN)
        method = channel.stream_stream(f"/{SERVICE}/{call}", _unchanged, _unchanged)
        self._grpc_call = method(metadata=metadata)  # type: ignore[call-arg]  # stubs demand requests
        self._carrying = asyncio.ensure_future(self._carry())

    def when_over(self, callback: Callable[[], None]) -> None:
        self._carrying.add_done_callback(lambda _: callback())

    async def leave(self, grace_s: float) -> None:
        """Wait until all is over; a farewell that takes longer than `grace_s` is cut."""
        await asyncio.wait([self._carrying], timeout=grace_s)
        self._on_cancel()
        await asyncio.wait([self._carrying])

    def _on_cancel(self) -> None:
        self._grpc_call.cancel()
        self._carrying.cancel()

    async def _carry(self) -> None:
        broken = StreamBroken(f"{self._call} stream to {self.peer} was given up")
        try:
            async with asyncio.TaskGroup() as pumps:
                reading = pumps.create_task(self._read())
                writing = pumps.create_task(self._write())
                broken = await self._outcome(reading)
                reading.cancel()
                writing.cancel()
        finally:
            self.break_off(broken)
            self._grpc_call.cancel()

    async def _read(self) -> None:
        """By iteration: the call's own `read` loses what is still to come once a write of ours has failed,
        as it does when the server ends the call while we send."""
        responses = cast("AsyncGenerator[bytes, None]", aiter(self._grpc_call))
        try:
            async with aclosing(responses) as messages:
                await self._fill_inbox(lambda: anext(messages, _EOF))
        except ProtocolViolation as violation:
            self.break_off(f"{self._call} stream to {self.peer}: {violation}")
            self._grpc_call.cancel()
        except _CALL_IS_OVER:
            return

    async def _write(self) -> None:
        try:
            await self._empty_outbox(self._grpc_call.write)
            await self._grpc_call.done_writing()
        except _CALL_IS_OVER:
            return

    async def _outcome(self, reading: "asyncio.Task[None]") -> StreamBroken:
        """Wait until the call is over and everything that arrived is in the inbox, and say how it ended."""
        code = await self._grpc_call.code()
        stream = f"{self._call} stream to {self.peer}"
        if code is grpc.StatusCode.OK:
            await asyncio.wait([reading])
            how = "has ended it" if self.end_arrived else "left without an End message"
            return StreamBroken(f"{stream}: the server {how}")
        kind = Unauthenticated if code is grpc.StatusCode.UNAUTHENTICATED else StreamBroken
        broken = kind(f"{stream}: {code.name}, {await self._grpc_call.details()}")
        self._outbox.break_entry(broken)
        await asyncio.wait([reading])
        return broken


class ServerStream(GrpcStream):
    """The side that serves the stream, within the coroutine that gRPC runs for the call."""

    def __init__(
        self,
        call: Call,
        context: "grpc.aio.ServicerContext[bytes, bytes]",
        on_refusal: Refusal | None = None,
    ):
        super().__init__(context.peer(), call, sends=Direction.DOWN, receives=Direction.UP)
        self._context = context
        self._on_refusal = on_refusal

    async def serve(self, handler: Handler) -> None:
        """Run the handler to its end. Raises asyncio.CancelledError when gRPC is to forget the call."""
        try:
            # By itself: else it goes with the first message, and while that is under way no status can be
            # sent, so that a client whose stream is broken here would not hear of it.
            with suppress(*_CALL_IS_OVER):
                await self._context.send_initial_metadata(())
            await self._serve(handler)
        except asyncio.CancelledError:
            if not self.broken:
                raise
        if self.broken:
            await self._abort()

    async def _serve(self, handler: Handler) -> None:
        async with asyncio.TaskGroup() as pumps:
            reading = pumps.create_task(self._read())
            writing = pumps.create_task(self._write())
            try:
                await serve_stream(handler, self, self._on_refusal)
                if not self.broken:
                    await asyncio.wait([writing])
            except asyncio.CancelledError:
                await self._write_the_rest(writing)
                raise
            finally:
                reading.cancel()
                writing.cancel()

    def _on_cancel(self) -> None:
        """`serve` aborts the call when the handler has ended."""

    async def _write_the_rest(self, writing: "asyncio.Task[None]") -> None:
        """The server stops: what the handler has said already is still to come to the peer that reads."""
        if self._num_unwritten:
            written = asyncio.ensure_future(self._all_written.wait())
            try:
                await asyncio.wait(
                    (written, writing), timeout=FAREWELL_S, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                written.cancel()

    async def _read(self) -> None:
        reason = "the client left without an End message"
        try:
            await self._fill_inbox(self._context.read)
        except ProtocolViolation as violation:
            reason = str(violation)
            if self._on_refusal is not None:
                self._on_refusal(violation.code)
        except _CALL_IS_OVER as error:
            reason = str(error)
        # To a grpc.aio server a killed client looks like one that has nothing more to say.
        if not self.end_arrived:
            self.break_off(f"{self._call} stream from {self.peer}: {reason}")

    async def _write(self) -> None:
        try:
            await self._empty_outbox(self._context.write)
        except _CALL_IS_OVER as error:
            self.break_off(f"{self._call} stream from {self.peer}: {error}")

    async def _abort(self) -> None:
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self._context.abort(grpc.StatusCode.ABORTED, "the stream is broken")
        except (TimeoutError, grpc.aio.InternalError):
            # The call is over and nobody is there to be told, or the status waits behind a message that the
            # client does not read; this ends it here without a line in the log.
            raise asyncio.CancelledError from None


def _unchanged(raw: bytes) -> bytes:
    return raw
