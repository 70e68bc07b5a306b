"""What routers count about whole requests: whether they were good."""

from collections.abc import Collection, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge


class SloMetrics:
    """Requests by whether they kept what `slo` asks for. Each series is there from the start, at 0, so that
    the first request is already part of a rate."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "pdserve_slo_requests",
            "Requests that ended, by result; good: answered to the end within all objectives of slo; bad: "
            "the others, failed and refused ones included. Not counted are those that asked for what cannot "
            "be, and those whose clients left before anything was too slow.",
            ["result"],
            registry=registry,
        )
        self._objectives = Counter(
            "pdserve_slo_objectives",
            "The same requests, by each objective of slo and whether they kept it.",
            ["objective", "result"],
            registry=registry,
        )
        self._limits = Gauge(
            "pdserve_slo_limit_seconds",
            "What slo asks for, by objective; ttft: time to first token; tpot: mean time per output token "
            "after the first; itl: longest wait between two tokens; e2e: from admission to the last token.",
            ["objective"],
            registry=registry,
        )
        self._target = Gauge(
            "pdserve_slo_target_ratio",
            "The share of requests that is to be good (slo.target).",
            registry=registry,
        )

    def set_objectives(self, limits_s: Mapping[str, float], target: float) -> None:
        """`limits_s`: what is asked for, by objective."""
        self._target.set(target)
        for result in ("good", "bad"):
            self._requests.labels(result)
        for objective, limit_s in limits_s.items():
            self._limits.labels(objective).set(limit_s)
            for result in ("kept", "missed"):
                self._objectives.labels(objective, result)

    def count(self, good: bool, kept: Collection[str], missed: Collection[str]) -> None:
        """One request has ended."""
        self._requests.labels("good" if good else "bad").inc()
        for objective in kept:
            self._objectives.labels(objective, "kept").inc()
        for objective in missed:
            self._objectives.labels(objective, "missed").inc()
