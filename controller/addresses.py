"""Under which address a process listens, and under which the others find it."""

import socket

import ray

from controller.plan import Deployment

_ANYWHERE = ("0.0.0.0", "::")


def node_name() -> str:
    return socket.gethostname()


def advertised_host(deployment: Deployment) -> str:
    """Where the others find this process."""
    wanted = deployment.config.network.address
    if wanted != "auto":
        return wanted
    return "127.0.0.1" if deployment.is_local else str(ray.util.get_node_ip_address())


def bind_host(deployment: Deployment) -> str:
    """Where a worker's streams listen."""
    wanted = deployment.config.network.bind
    return advertised_host(deployment) if wanted == "auto" else wanted


def join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def reachable(host: str, port: int, deployment: Deployment) -> str:
    """host:port by which a listener on `host` is found: never "all interfaces"."""
    return join(advertised_host(deployment) if host in _ANYWHERE else host, port)
