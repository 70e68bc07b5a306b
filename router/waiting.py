"""Requests that no worker has, counted while they wait."""

from pdserve.metrics import RouterMetrics


class Waiting:
    """Counts one of them, as a context."""

    def __init__(self, metrics: RouterMetrics, num: int) -> None:
        self._metrics = metrics
        self._num = num

    def __enter__(self) -> None:
        self._metrics.waiting_requests.inc()
        self._metrics.waiting_tokens.inc(self._num)

    def __exit__(self, *exc_info: object) -> None:
        self._metrics.waiting_requests.dec()
        self._metrics.waiting_tokens.dec(self._num)
