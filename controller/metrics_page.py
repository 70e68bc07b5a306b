"""The page from which Prometheus reads a process' metrics."""

from prometheus_client import CollectorRegistry, start_http_server

from controller.addresses import reachable
from controller.plan import Deployment
from pdserve.contract.errors import ConfigError


def serve_metrics(registry: CollectorRegistry, deployment: Deployment) -> str:
    """Serve the page at a free port; its URL. Raises ConfigError when network.metrics_host is none of this
    machine's addresses."""
    host = deployment.config.network.metrics_host
    try:
        server, _ = start_http_server(0, host, registry)
    except OSError as error:
        raise ConfigError(
            f"cannot serve /metrics at {host!r} ({error.strerror or error}): set network.metrics_host to an "
            "address of every machine that runs pdserve, such as 127.0.0.1 or 0.0.0.0",
            param="network.metrics_host",
        ) from error
    return f"http://{reachable(host, server.server_port, deployment)}/metrics"
