"""Rpc over gRPC, with one HTTP/2 connection per (address, Call)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import grpc
import grpc.aio

from pdserve.contract.errors import ConfigError
from pdserve.contract.ports import Call, Handler
from pdserve.rpc.channel import CHANNEL_OPTIONS, FAREWELL_S, SERVER_OPTIONS
from pdserve.rpc.convert import SERVICE
from pdserve.rpc.grpc_stream import ClientStream, ServerStream

Register = Callable[[grpc.aio.Server], None]
"""Adds further services, such as health checks or reflection, to a gRPC server before it starts."""


class GrpcRpc:
    """Opens and serves streams over gRPC. Belongs to the event loop in which it is first used."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, Call], grpc.aio.Channel] = {}
        self._streams: set[ClientStream] = set()

    async def open(self, address: str, call: Call) -> ClientStream:
        stream = ClientStream(address, call, self._channel(address, call))
        self._streams.add(stream)
        stream.when_over(lambda: self._streams.discard(stream))
        return stream

    async def serve(
        self, address: str, handlers: Mapping[Call, Handler], register: Register | None = None
    ) -> "GrpcServer":
        """Raises ConfigError when the address cannot be bound."""
        server = GrpcServer(handlers)
        if register is not None:
            register(server.grpc_server)
        await server.start(address)
        return server

    async def close(self) -> None:
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*[stream.leave(FAREWELL_S) for stream in streams])
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*[channel.close(None) for channel in channels])

    def _channel(self, address: str, call: Call) -> grpc.aio.Channel:
        key = (address, call)
        if key not in self._channels:
            self._channels[key] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        return self._channels[key]


class GrpcServer:
    """Serves streams at one address."""

    def __init__(self, handlers: Mapping[Call, Handler]):
        self.grpc_server = grpc.aio.server(options=SERVER_OPTIONS)
        self.grpc_server.add_generic_rpc_handlers((self._service(handlers),))
        self._serving: set[asyncio.Task[object]] = set()
        self._stopping = False
        self._address = ""

    @property
    def address(self) -> str:
        return self._address

    async def start(self, address: str) -> None:
        try:
            port = self.grpc_server.add_insecure_port(address)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen at {address} ({error}): the port is in use or the host is not this one; "
                "choose another port, or 0 for a free one"
            ) from error
        self._address = f"{address.rpartition(':')[0]}:{port}"
        await self.grpc_server.start()

    async def stop(self, grace_s: float) -> None:
        self._stopping = True
        if self._serving:
            await asyncio.wait(self._serving, timeout=grace_s)
        still_open = set(self._serving)
        for task in still_open:
            task.cancel()
        if still_open:
            await asyncio.wait(still_open, timeout=FAREWELL_S)
        await self.grpc_server.stop(FAREWELL_S)

    def _service(self, handlers: Mapping[Call, Handler]) -> "grpc.GenericRpcHandler[bytes, bytes]":
        methods = {
            call.value: grpc.stream_stream_rpc_method_handler(self._method(call, handler))
            for call, handler in handlers.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _method(self, call: Call, handler: Handler) -> Callable[..., Awaitable[None]]:
        async def serve(requests: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> None:
            if self._stopping:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping")
            task = asyncio.current_task()
            assert task is not None
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)
            await ServerStream(call, context).serve(handler)

        return serve
