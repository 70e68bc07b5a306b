"""What routers count about whole requests: where their time went, what of them was cached, and whether they
were good."""

from collections.abc import Collection, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_STAGE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class StageMetrics:
    """Where the time of requests went, and how much of their tokens did not have to be computed."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._stages = Histogram(
            "pdserve_request_stage_seconds",
            "Time of one stage of a request, for every attempt that went through it, told when the request "
            "ends; router_queue: until it is submitted to a worker; prefill_queue: there, until its prompt's "
            "turn; prefill: computing the prompt; prompt: both, where an attempt ended before any was told; "
            "first_token: from sampling the first token to its arrival at the router, and the way of the "
            "submission; transfer_hidden and transfer_exposed: of the KV, before and after the prompt's last "
            "forward pass had ended; decode: from the first token to the end.",
            ["stage"],
            buckets=_STAGE_S,
            registry=registry,
        )
        self._cached = Counter(
            "pdserve_router_cached_tokens",
            "Prompt tokens of requests that prefix caches had, by pool; prefill: they were not computed; "
            "decode: they did not travel, or, where the decode worker computed the prompt itself, were not "
            "computed.",
            ["pool"],
            registry=registry,
        )
        self._recomputed = Counter(
            "pdserve_router_recomputed_tokens",
            "Prompt and output tokens that a further attempt of a request had to compute before it could go "
            "on, by the error that had ended the attempt before.",
            ["cause"],
            registry=registry,
        )

    def observe(self, stage: str, seconds: float, request_id: str) -> None:
        self._stages.labels(stage).observe(seconds, {"request_id": request_id})

    def count_cached(self, pool: str, num_tokens: int) -> None:
        self._cached.labels(pool).inc(num_tokens)

    def count_recomputed(self, cause: str, num_tokens: int) -> None:
        self._recomputed.labels(cause).inc(num_tokens)


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
