"""Every metric of pdserve, defined once.

Times are seconds, sizes bytes. Labels are bounded: pools, states, transports, error codes and HTTP codes,
never request ids or tenants. Worker and router ids come from the scrape target's own labels.
"""

from collections.abc import Callable, Mapping
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from pdserve.contract.errors import ErrorCode
from pdserve.contract.model_work import Roofline
from pdserve.contract.work import BlockCounts
from pdserve.engine_metrics import EngineMetrics
from pdserve.request_metrics import SloMetrics, StageMetrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_REQUEST_S = (*_LATENCY_S, 120, 300, 600)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 5)
_TRANSFER_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_PREDICTION_RATIOS = (0.25, 0.5, 0.67, 0.8, 0.9, 1.1, 1.25, 1.5, 2, 4)
_SHARES = (0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1)


class WorkerMetrics:
    """What one worker counts. `pool` is its role."""

    def __init__(self, pool: str, registry: CollectorRegistry, roofline: Roofline) -> None:
        self.registry = registry
        self.engine = EngineMetrics(pool, registry, roofline)
        self._labels = {"pool": pool}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"pdserve_{name}", text, ["pool"], registry=registry).labels(**self._labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"pdserve_{name}", text, ["pool"], registry=registry).labels(**self._labels)

        self.waiting_requests = gauge(
            "waiting_requests",
            "Requests not in the running batch yet: they wait for their turn, for blocks or for their KV.",
        )
        self.backlog_tokens = gauge("backlog_tokens", "Prompt tokens still to be computed here.")
        self.active_sequences = gauge("active_sequences", "Sequences in the running batch.")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens computed here.")
        self.generated_tokens = counter("generated_tokens", "Output tokens sampled here.")
        self.prefix_hit_tokens = counter("prefix_hit_tokens", "Prompt tokens found in the prefix cache.")
        self.prefix_query_tokens = counter(
            "prefix_query_tokens", "Prompt tokens looked up in the prefix cache."
        )
        self.preemptions = counter("preemptions", "Requests sent back because blocks ran out.")
        self.segments_resent = counter("segments_resent", "Segments sent again after a digest mismatch.")
        self.oldest_waiting_seconds = gauge(
            "oldest_waiting_seconds",
            "For how long the oldest of the waiting requests has been here.",
        )
        self._kv_blocks = Gauge(
            "pdserve_kv_blocks", "KV blocks by state.", ["pool", "state"], registry=registry
        )
        self._requests = Counter(
            "pdserve_worker_requests",
            "Requests that ended here, by outcome: a finish reason, an error code, or why their router "
            "cancelled them (cancelled: the client left, or the router is gone; stop: a stop string; "
            "unknown: a Cancel was lost).",
            ["pool", "outcome"],
            registry=registry,
        )
        self._stale = Counter(
            "pdserve_stale_messages",
            "Messages that came twice, too late or out of order and changed nothing, by kind.",
            ["pool", "kind"],
            registry=registry,
        )
        self._prefill_calls = Counter(
            "pdserve_prefill_calls",
            "Prefill calls answered, by outcome.",
            ["pool", "outcome"],
            registry=registry,
        )
        self._transfers = Counter(
            "pdserve_kv_transfers",
            "Transfers of a prompt's KV to this worker that were begun, by transport and outcome.",
            ["pool", "transport", "outcome"],
            registry=registry,
        )
        self._refused_calls = Counter(
            "pdserve_refused_calls",
            "Incoming calls refused because of what their peer is or sent, by error code.",
            ["pool", "reason"],
            registry=registry,
        )
        self._transfer_bytes = Counter(
            "pdserve_kv_transfer_bytes",
            "KV bytes received and verified.",
            ["pool", "transport"],
            registry=registry,
        )
        self._transfer_seconds = Histogram(
            "pdserve_kv_segment_seconds",
            "From a segment's announcement to its verified copy.",
            ["pool", "transport"],
            buckets=_TRANSFER_S,
            registry=registry,
        )
        self._hidden_seconds = Histogram(
            "pdserve_kv_transfer_hidden_seconds",
            "Of a prompt's KV transfer, the time before the prompt's last forward pass had ended.",
            ["pool", "transport"],
            buckets=_TRANSFER_S,
            registry=registry,
        )
        self._exposed_seconds = Histogram(
            "pdserve_kv_transfer_exposed_seconds",
            "From the end of a prompt's last forward pass until all its KV was verified here.",
            ["pool", "transport"],
            buckets=_TRANSFER_S,
            registry=registry,
        )
        self._share_ahead = Histogram(
            "pdserve_kv_transfer_ahead_ratio",
            "Share of a prompt's KV bytes that were verified here when its last forward pass ended.",
            ["pool", "transport"],
            buckets=_SHARES,
            registry=registry,
        )
        self._segments = Counter(
            "pdserve_kv_segments",
            "KV segments received, by result; repeated: it was verified already, and nothing was copied.",
            ["pool", "transport", "result"],
            registry=registry,
        )

    def count_transfer(self, transport: str, outcome: str) -> None:
        """`outcome` is ``verified`` or an error code."""
        self._transfers.labels(self._labels["pool"], transport, outcome).inc()

    def observe_segment(self, transport: str, num_bytes: int, seconds: float, verified: bool) -> None:
        pool = self._labels["pool"]
        self._segments.labels(pool, transport, "verified" if verified else "corrupt").inc()
        self._transfer_seconds.labels(pool, transport).observe(seconds)
        if verified:
            self._transfer_bytes.labels(pool, transport).inc(num_bytes)

    def observe_overlap(self, transport: str, hidden_s: float, exposed_s: float, share_ahead: float) -> None:
        """How one prompt's transfer lay beside its computation; see `pdserve.handoff.transfer_times`."""
        pool = self._labels["pool"]
        self._hidden_seconds.labels(pool, transport).observe(hidden_s)
        self._exposed_seconds.labels(pool, transport).observe(exposed_s)
        self._share_ahead.labels(pool, transport).observe(share_ahead)

    def count_repeated_segment(self, transport: str) -> None:
        self._segments.labels(self._labels["pool"], transport, "repeated").inc()

    def follow_blocks(self, counts: Callable[[], BlockCounts]) -> None:
        """Export the blocks by state, read at scrape time."""
        for state in ("free", "cached", "reserved", "active"):
            gauge = self._kv_blocks.labels(self._labels["pool"], state)
            gauge.set_function(partial(_read_count, counts, state))

    def count_end(self, outcome: str) -> None:
        """`outcome` is a finish reason or an error code."""
        self._requests.labels(self._labels["pool"], outcome).inc()

    def count_refused_call(self, reason: ErrorCode) -> None:
        self._refused_calls.labels(self._labels["pool"], reason.value).inc()

    def count_stale(self, kind: type) -> None:
        """A message of that kind was dropped."""
        self._stale.labels(self._labels["pool"], kind.__name__).inc()

    def count_prefill_call(self, outcome: str) -> None:
        """`outcome` is ``sealed`` or an error code."""
        self._prefill_calls.labels(self._labels["pool"], outcome).inc()


def _read_count(counts: Callable[[], BlockCounts], state: str) -> float:
    return float(getattr(counts(), state))


class RouterMetrics:
    """What one router counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.slo = SloMetrics(registry)
        self.stages = StageMetrics(registry)
        self.running_requests = Gauge(
            "pdserve_router_running_requests", "Requests admitted and not ended.", registry=registry
        )
        self.waiting_requests = Gauge(
            "pdserve_router_waiting_requests", "Admitted requests that no worker has yet.", registry=registry
        )
        self.waiting_tokens = Gauge(
            "pdserve_router_waiting_tokens",
            "Prompt tokens of admitted requests that no worker has yet.",
            registry=registry,
        )
        self.suspects = Counter(
            "pdserve_router_suspects",
            "Requests that were at two workers when they died and ran alone from then on; those that killed "
            "one then ended as poisonous.",
            registry=registry,
        )
        self.attempts = Counter(
            "pdserve_router_attempts", "Submissions to decode workers.", registry=registry
        )
        self.prompt_tokens = Counter(
            "pdserve_router_prompt_tokens", "Prompt tokens admitted.", registry=registry
        )
        self.output_tokens = Counter(
            "pdserve_router_output_tokens", "Output tokens delivered.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "pdserve_time_to_first_token_seconds",
            "From admission to the arrival of the first output token at the router.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.time_to_second_token = Histogram(
            "pdserve_time_to_second_token_seconds",
            "From admission to the arrival of the second output token, the first that waits for the KV.",
            buckets=_LATENCY_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "pdserve_inter_token_seconds",
            "Between the arrival of two output tokens of one request at the router.",
            buckets=_INTER_TOKEN_S,
            registry=registry,
        )
        self.end_to_end = Histogram(
            "pdserve_request_seconds",
            "From admission to the last token.",
            buckets=_REQUEST_S,
            registry=registry,
        )
        self._requests = Counter(
            "pdserve_router_requests",
            "Requests that ended, by outcome: a finish reason or an error code; cancelled: the client left.",
            ["outcome"],
            registry=registry,
        )
        self._recoveries = Counter(
            "pdserve_router_recoveries",
            "Requests placed again after an attempt failed, by cause.",
            ["cause"],
            registry=registry,
        )
        self._refusals = Counter(
            "pdserve_router_refusals",
            "Requests refused at once because the router has enough to do, by the limit of router.admission.",
            ["limit"],
            registry=registry,
        )
        self._tokenise = Histogram(
            "pdserve_api_tokenise_seconds",
            "From a request's body to its checked tokens: parsing, chat template and tokeniser, and the wait "
            "for a thread where the body is long.",
            ["api"],
            buckets=_TRANSFER_S,
            registry=registry,
        )
        self._first_event = Histogram(
            "pdserve_api_first_event_seconds",
            "Of streamed answers: from the request's arrival to the first tokens written to its client.",
            ["api"],
            buckets=_LATENCY_S,
            registry=registry,
        )
        self._stale = Counter(
            "pdserve_router_stale_messages",
            "Messages of workers and the controller that came twice, too late or out of order and changed "
            "nothing, by kind.",
            ["kind"],
            registry=registry,
        )
        self._prediction_ratio = Histogram(
            "pdserve_router_prediction_ratio",
            "How long an attempt's first or second token took from its submission, divided by what was "
            "predicted of its placement, whatever the policy; by token and by who computed the prompt: a "
            "prefill worker (split), or the decode worker itself (local).",
            ["token", "placement"],
            buckets=_PREDICTION_RATIOS,
            registry=registry,
        )
        self._open_requests = Gauge(
            "pdserve_api_open_requests", "Client requests being answered.", ["api"], registry=registry
        )
        self._responses = Counter(
            "pdserve_api_responses",
            "Client requests answered, by API, error code (or ok) and HTTP status.",
            ["api", "code", "status"],
            registry=registry,
        )

    def observe_inter_token(
        self, seconds: float, num_tokens: int, exemplar: dict[str, str] | None = None
    ) -> None:
        """`num_tokens` have come together `seconds` after the one before them: each took its part of that."""
        for _ in range(num_tokens):
            self.inter_token.observe(seconds / num_tokens, exemplar)

    def count_refusal(self, limit: str) -> None:
        """`limit` is a field of `router.admission.AdmissionLimits`."""
        self._refusals.labels(limit).inc()

    def observe_prediction(self, token: str, placement: str, actual_s: float, predicted_s: float) -> None:
        """`token` is ``first`` or ``second``, `placement` ``split`` or ``local``."""
        self._prediction_ratio.labels(token, placement).observe(actual_s / max(predicted_s, 1e-9))

    def count_end(self, outcome: str) -> None:
        """`outcome` is a finish reason or an error code."""
        self._requests.labels(outcome).inc()

    def count_recovery(self, cause: ErrorCode) -> None:
        self._recoveries.labels(cause.value).inc()

    def count_stale(self, kind: type) -> None:
        """A message of that kind was dropped."""
        self._stale.labels(kind.__name__).inc()

    def on_request_start(self, api: str) -> None:
        """Part of `router.api_settings.RequestObserver`."""
        self._open_requests.labels(api).inc()

    def on_tokenised(self, api: str, seconds: float) -> None:
        """Part of `router.api_settings.RequestObserver`."""
        self._tokenise.labels(api).observe(seconds)

    def on_first_event(self, api: str, seconds: float) -> None:
        """Part of `router.api_settings.RequestObserver`."""
        self._first_event.labels(api).observe(seconds)

    def on_request_end(self, api: str, code: str, status: int) -> None:
        """Part of `router.api_settings.RequestObserver`."""
        self._open_requests.labels(api).dec()
        self._responses.labels(api, code, str(status)).inc()

    def follow_index_mismatches(self, count: Callable[[], float]) -> None:
        """Export how often the prefix index disagreed with a worker and was rebuilt, read at scrape time."""
        Gauge(
            "pdserve_router_index_mismatches",
            "How often the prefix index disagreed with a worker's report and was rebuilt.",
            registry=self.registry,
        ).set_function(count)

    def follow_oldest_waiting(self, seconds: Callable[[], float]) -> None:
        """Export for how long a request has been without a worker, read at scrape time."""
        Gauge(
            "pdserve_router_oldest_waiting_seconds",
            "For how long the request has waited that has been without a worker for the longest time.",
            registry=self.registry,
        ).set_function(seconds)

    def follow_degraded(self, is_degraded: Callable[[], bool]) -> None:
        """Export whether a whole pool is missing, read at scrape time."""
        Gauge(
            "pdserve_router_degraded",
            "1 while a whole pool is missing: nobody decodes, or decode workers compute the prompts, too.",
            registry=self.registry,
        ).set_function(is_degraded)

    def follow_workers(self, count: Callable[[], float]) -> None:
        """Export how many workers this router can use, read at scrape time."""
        Gauge(
            "pdserve_router_ready_workers", "Workers this router can use.", registry=self.registry
        ).set_function(count)


class FaultMetrics:
    """What a router or worker counts where faults are allowed; elsewhere it does not exist."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._faults = Counter(
            "pdserve_faults",
            "Faults that happened here on purpose, by action.",
            ["action"],
            registry=registry,
        )

    def count(self, action: str) -> None:
        """`action` is the `do` of a fault."""
        self._faults.labels(action).inc()


class ControllerMetrics:
    """What the controller counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self._desired = Gauge(
            "pdserve_desired_workers", "Processes that the pool is to have.", ["pool"], registry=registry
        )
        self._actual = Gauge(
            "pdserve_actual_workers", "Processes of the pool that serve.", ["pool"], registry=registry
        )
        self._by_state = Gauge(
            "pdserve_workers", "Processes of the pool, by state.", ["pool", "state"], registry=registry
        )
        self._restarts = Gauge(
            "pdserve_process_restarts",
            "How often processes of this system have been started again, since its controller started.",
            registry=registry,
        )
        self._head_up = Gauge(
            "pdserve_ray_head_up",
            "1 while Ray's head answers the controller; without it nobody is replaced.",
            registry=registry,
        )
        self._known_states: set[tuple[str, str]] = set()

    def set_head_up(self, is_up: bool) -> None:
        self._head_up.set(is_up)

    def set_pool(self, pool: str, num_desired: int, num_ready: int, num_by_state: Mapping[str, int]) -> None:
        """`num_by_state` names the states that occur; a state that occurred before falls to 0."""
        self._desired.labels(pool).set(num_desired)
        self._actual.labels(pool).set(num_ready)
        states = {state for known, state in self._known_states if known == pool} | set(num_by_state)
        for state in states:
            self._known_states.add((pool, state))
            self._by_state.labels(pool, state).set(num_by_state.get(state, 0))

    def set_restarts(self, count: int) -> None:
        self._restarts.set(count)
