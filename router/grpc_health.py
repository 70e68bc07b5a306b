"""The standard services beside ours: health checking (grpc.health.v1) and reflection."""

from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from pdserve.contract.ports import Clock
from router.requests import Desk

WATCH_PERIOD_S = 1.0
"""How soon a watcher learns of a change. Readiness is derived from many facts, so it is looked at."""

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def add_health_and_reflection(server: grpc.aio.Server, desk: Desk, clock: Clock, service: str) -> None:
    """`service` (and "", the whole server) are SERVING exactly while the desk is ready."""
    health_pb2_grpc.add_HealthServicer_to_server(_Health(desk, clock, service), server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    def __init__(self, desk: Desk, clock: Clock, service: str):
        self._desk = desk
        self._clock = clock
        self._services = ("", service)

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802  # the protocol's name
        status = self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service '{request.service}' here")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802  # the protocol's name
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                told = status
                await context.write(health_pb2.HealthCheckResponse(status=status))
            await self._clock.sleep(WATCH_PERIOD_S)

    def _status(self, service: str) -> int:
        if service not in self._services:
            return int(_UNKNOWN)
        return int(_SERVING if self._desk.readiness().ready else _NOT_SERVING)
