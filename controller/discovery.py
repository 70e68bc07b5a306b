"""Where Prometheus finds the system: service discovery over HTTP that follows the pools, and the controller's
own metrics, at one port that stays the same.

    GET /targets   Prometheus HTTP SD: one group per router and worker, and one for the controller
    GET /metrics   the controller's metrics
"""

import json
import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from controller.addresses import reachable
from controller.plan import Deployment
from controller.status import SystemStatus
from pdserve.metrics import ControllerMetrics

log = logging.getLogger(__name__)

_Page = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]  # a WSGI application

_METRICS_PATH = "/metrics"


class DiscoveryPage:
    """Serves what the last `update` told, from a thread of its own."""

    def __init__(self, deployment: Deployment) -> None:
        self.registry = CollectorRegistry()
        self._metrics = ControllerMetrics(self.registry)
        self._deployment = deployment
        self._content = b"[]"  # replaced as a whole, so that the thread needs no lock
        self._metrics_page: _Page = make_wsgi_app(self.registry)
        self._server: WSGIServer | None = None
        self._address = ""

    @property
    def url(self) -> str:
        """For `http_sd_configs`; empty where it is not served."""
        return f"http://{self._address}/targets" if self._address else ""

    def serve(self) -> None:
        """At network.discovery_port, or at a free port where another process has that one."""
        network = self._deployment.config.network
        host = network.metrics_host
        for port in (network.discovery_port, 0):
            try:
                self._server = make_server(host, port, self._answer, handler_class=_QuietHandler)
            except OSError as error:
                log.warning("no service discovery at %s:%d: %s", host, port, error.strerror or error)
            else:
                self._address = reachable(host, self._server.server_port, self._deployment)
                threading.Thread(target=self._server.serve_forever, name="discovery", daemon=True).start()
                return

    def update(self, status: SystemStatus) -> None:
        """The system has changed."""
        groups = [*_groups(status), _group(self._address, status.name, "controller")]
        self._content = json.dumps([group for group in groups if group["targets"] != [""]]).encode()
        for pool in status.pools:
            self._metrics.set_pool(pool.name, pool.desired, pool.ready, _count_states(status, pool.name))
        self._metrics.set_head_up(status.has_head)
        self._metrics.set_restarts(sum(process.num_restarts for process in status.processes))

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ.get("PATH_INFO") == _METRICS_PATH:
            return self._metrics_page(environ, start_response)
        if environ.get("PATH_INFO") != "/targets":
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"here are /targets and /metrics\n"]
        start_response("200 OK", [("Content-Type", "application/json")])
        return [self._content]


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the library's name
        """A scrape is no news."""


def _groups(status: SystemStatus) -> list[dict[str, Any]]:
    """Of every process that serves metrics."""
    found = []
    for process in status.processes:
        url = process.report.metrics_url if process.report else ""
        address = url.removeprefix("http://").removesuffix(_METRICS_PATH)
        found.append(_group(address, status.name, process.id))
    return found


def _group(address: str, system: str, process: str) -> dict[str, Any]:
    """`instance` is the process' id: a replaced worker goes on in the same series, whatever its port is."""
    return {"targets": [address], "labels": {"instance": process, "system": system}}


def _count_states(status: SystemStatus, pool: str) -> dict[str, int]:
    """State -> how many processes of the pool are in it."""
    counts: dict[str, int] = {}
    for process in status.processes:
        if process.pool == pool:
            counts[process.state.value] = counts.get(process.state.value, 0) + 1
    return counts
