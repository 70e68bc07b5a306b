"""Rpc over gRPC, with one HTTP/2 connection per (address, Call).

Every call carries the deployment's token, and a server looks at it before it reads anything else. With TLS
both ends also check the other's certificate; without it nothing is opened or served outside private networks.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio

from pdserve.contract.errors import ConfigError, ErrorCode
from pdserve.contract.ports import Call, Handler, Refusal
from pdserve.rpc.addresses import require_private, split_address
from pdserve.rpc.channel import CHANNEL_OPTIONS, FAREWELL_S, SERVER_OPTIONS
from pdserve.rpc.convert import SERVICE
from pdserve.rpc.credentials import Credentials, DeploymentToken
from pdserve.rpc.grpc_stream import ClientStream, ServerStream

Register = Callable[[grpc.aio.Server], None]
"""Adds further services, such as health checks or reflection, to a gRPC server before it starts."""

TOKEN_KEY = "pdserve-deployment-token"
"""The metadata that carries the deployment's token."""


class GrpcRpc:
    """Opens and serves streams over gRPC. Belongs to the event loop in which it is first used."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._metadata = ((TOKEN_KEY, credentials.token.secret),)
        self._channels: dict[tuple[str, Call], grpc.aio.Channel] = {}
        self._streams: set[ClientStream] = set()

    async def open(self, address: str, call: Call) -> ClientStream:
        """Raises ConfigError for what is no host:port, and UnprotectedAddress for one that may only be called
        with TLS."""
        if (address, call) not in self._channels:
            await self._require_callable(address)
        stream = ClientStream(address, call, self._channel(address, call), self._metadata)
        self._streams.add(stream)
        stream.when_over(lambda: self._streams.discard(stream))
        return stream

    async def serve(
        self,
        address: str,
        handlers: Mapping[Call, Handler],
        on_refusal: Refusal | None = None,
        register: Register | None = None,
    ) -> "GrpcServer":
        """Raises ConfigError when the address cannot be bound, or not without TLS."""
        await self._require_callable(address)
        server = GrpcServer(handlers, self._credentials, on_refusal)
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

    async def _require_callable(self, address: str) -> None:
        host, _ = split_address(address)
        if self._credentials.tls is None:
            await require_private(host)

    def _channel(self, address: str, call: Call) -> grpc.aio.Channel:
        key = (address, call)
        if key not in self._channels:
            self._channels[key] = _connect(address, self._credentials)
        return self._channels[key]


class GrpcServer:
    """Serves streams at one address."""

    def __init__(
        self, handlers: Mapping[Call, Handler], credentials: Credentials, on_refusal: Refusal | None
    ):
        doorkeeper = _Doorkeeper(credentials.token, on_refusal)
        self.grpc_server = grpc.aio.server(interceptors=(doorkeeper,), options=SERVER_OPTIONS)
        self._credentials = credentials
        self._on_refusal = on_refusal
        self.grpc_server.add_generic_rpc_handlers((self._service(handlers),))
        self._serving: set[asyncio.Task[object]] = set()
        self._stopping = False
        self._address = ""

    @property
    def address(self) -> str:
        return self._address

    async def start(self, address: str) -> None:
        try:
            port = _listen(self.grpc_server, address, self._credentials)
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
            await ServerStream(call, context, self._on_refusal).serve(handler)

        return serve


class _Doorkeeper(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # only for its stubs
    """Refuses every call, of whatever service and method, that does not carry the deployment's token."""

    def __init__(self, token: DeploymentToken, on_refusal: Refusal | None) -> None:
        self._token = token
        self._on_refusal = on_refusal

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if not self._knows(details.invocation_metadata):
            self._count(ErrorCode.UNAUTHENTICATED)
            return _REFUSED
        handler = await continuation(details)
        if handler is None:
            self._count(ErrorCode.NOT_FOUND)
        return handler

    def _knows(self, metadata: Any) -> bool:
        presented = [value for key, value in metadata or () if key == TOKEN_KEY]
        return len(presented) == 1 and self._token.matches(presented[0])

    def _count(self, code: ErrorCode) -> None:
        if self._on_refusal is not None:
            self._on_refusal(code)


async def _refuse(requests: object, context: "grpc.aio.ServicerContext[bytes, bytes]") -> NoReturn:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the call does not carry the token of this deployment: it comes from another one, or from outside",
    )


_REFUSED = grpc.stream_stream_rpc_method_handler(_refuse)


def _connect(address: str, credentials: Credentials) -> grpc.aio.Channel:
    tls = credentials.tls
    if tls is None:
        return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
    secure = grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)
    options = (*CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", tls.name))
    return grpc.aio.secure_channel(address, secure, options=options)


def _listen(server: grpc.aio.Server, address: str, credentials: Credentials) -> int:
    """The real port. Raises RuntimeError."""
    tls = credentials.tls
    if tls is None:
        return server.add_insecure_port(address)
    secure = grpc.ssl_server_credentials(
        [(tls.key, tls.certificate)], tls.authority, require_client_auth=True
    )
    return server.add_secure_port(address, secure)
