"""The ports of the APIs of a local system, held by its launcher while the system lives.

A socket that is bound and does not listen keeps its port from everybody who asks for any free one, be it to
listen or for an outgoing connection. A router, which asks for this very port and may reuse the address, can
still listen there. So what was free at the start is free when the router has loaded, and again when another
takes its place.
"""

import contextlib
import socket

from pdserve.config import DeployConfig
from pdserve.contract.errors import ConfigError
from router.listen import bind, why_not

HTTP_SETTING = "HTTP port (--port)"
GRPC_SETTING = "gRPC port (--grpc-port)"
ADMIN_SETTING = "admin port (router.admin.port)"


def hold_api_ports(config: DeployConfig, held: contextlib.ExitStack) -> DeployConfig:
    """The configuration with a port wherever a single router may take any; `held` lets go of all of them.
    Raises ConfigError for the first that is taken."""
    router = config.router

    def hold(host: str, first: int | None, setting: str) -> int | None:
        return None if first is None else _hold(host, first, router.replicas, setting, held)

    ports = {
        "http_port": hold(router.host, router.http_port, HTTP_SETTING),
        "grpc_port": hold(router.host, router.grpc_port, GRPC_SETTING),
        "admin": router.admin.model_copy(
            update={"port": hold(router.admin.host, router.admin.port, ADMIN_SETTING)}
        ),
    }
    return config.model_copy(update={"router": router.model_copy(update=ports)})


def _hold(host: str, first: int, num_routers: int, setting: str, held: contextlib.ExitStack) -> int:
    """The port of the first router. Several that may take any take theirs themselves, and it stays 0."""
    if first == 0 and num_routers > 1:
        return 0
    ports = [_hold_one(host, first + index, setting, held) for index in range(num_routers)]
    return ports[0]


def _hold_one(host: str, port: int, setting: str, held: contextlib.ExitStack) -> int:
    with bind(host, port, setting) as tried:
        port = tried.getsockname()[1]
        family = tried.family
    holder = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((host, port))
    except OSError as error:
        raise ConfigError(why_not(host, port, setting, error)) from error
    return port
