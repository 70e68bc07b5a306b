"""The Grafana dashboards: which panels there are, and what a person reads from them."""

from tools.panels import (
    SYSTEM,
    Dashboard,
    Panel,
    quantile,
    quantiles,
    rate,
    ratio,
    total,
)
from tools.service_boards import EFFICIENCY, SLO


def _pool(pool: str) -> tuple[Panel, ...]:
    """What both pools show."""
    return (
        Panel(
            "Backlog",
            "short",
            (("{{instance}}", total("pdserve_backlog_tokens", "instance", pool=pool)),),
            "Prompt tokens still to be computed, by worker. The signal on which the prefill pool scales.",
        ),
        Panel(
            "Active sequences",
            "short",
            (("{{instance}}", total("pdserve_active_sequences", "instance", pool=pool)),),
            "Sequences in the running batch, by worker. The signal on which the decode pool scales.",
        ),
        Panel(
            "Waiting requests",
            "short",
            (("{{instance}}", total("pdserve_waiting_requests", "instance", pool=pool)),),
            "Requests that wait for their turn, for blocks or for their KV.",
        ),
        Panel(
            "Longest wait",
            "s",
            (("{{instance}}", total("pdserve_oldest_waiting_seconds", "instance", pool=pool)),),
            "For how long the oldest of the waiting requests has been there.",
        ),
        Panel(
            "KV blocks",
            "short",
            (("{{state}}", total("pdserve_kv_blocks", "state", pool=pool)),),
            "Reserved and active blocks belong to live requests; cached ones can be evicted.",
        ),
        Panel(
            "Engine step",
            "s",
            quantiles("pdserve_engine_step_seconds", "kind", pool=pool),
            "How long one forward pass takes, by what it computes.",
        ),
        Panel(
            "Tokens per step",
            "short",
            quantiles("pdserve_engine_batch_tokens", pool=pool),
            "New tokens that one forward pass computes.",
        ),
        Panel(
            "Batch",
            "short",
            quantiles("pdserve_engine_batch_sequences", pool=pool),
            "Sequences that share one forward pass.",
        ),
        Panel(
            "Tokens computed",
            "short",
            (
                ("prompt", rate("pdserve_prompt_tokens_total", pool=pool)),
                ("output", rate("pdserve_generated_tokens_total", pool=pool)),
            ),
            "Tokens per second that the pool's engines compute.",
        ),
        Panel(
            "Prefix cache",
            "percentunit",
            (
                (
                    "hit",
                    ratio(
                        rate("pdserve_prefix_hit_tokens_total", pool=pool),
                        rate("pdserve_prefix_query_tokens_total", pool=pool),
                    ),
                ),
            ),
            "Share of the prompt tokens looked up here that were in the cache.",
        ),
        Panel(
            "Ends",
            "reqps",
            (("{{outcome}}", rate("pdserve_worker_requests_total", "outcome", pool=pool)),)
            if pool == "decode"
            else (("{{outcome}}", rate("pdserve_prefill_calls_total", "outcome", pool=pool)),),
            "How the requests of this pool ended, per second.",
        ),
    )


def dashboards() -> tuple[Dashboard, ...]:
    overview = (
        Panel(
            "Requests",
            "reqps",
            (("{{outcome}}", rate("pdserve_router_requests_total", "outcome")),),
            "Requests that ended, per second and outcome.",
        ),
        Panel(
            "Time to first token",
            "s",
            quantiles("pdserve_time_to_first_token_seconds"),
            "From admission to the first token at the router.",
        ),
        Panel(
            "Inter-token time",
            "s",
            quantiles("pdserve_inter_token_seconds"),
            "Between two tokens of one request at the router.",
        ),
        Panel(
            "Tokens",
            "short",
            (
                ("prompt", rate("pdserve_router_prompt_tokens_total")),
                ("output", rate("pdserve_router_output_tokens_total")),
            ),
            "Per second, at the routers.",
        ),
        Panel(
            "Processes",
            "short",
            (
                ("{{pool}} wanted", total("pdserve_desired_workers", "pool")),
                ("{{pool}} serving", total("pdserve_actual_workers", "pool")),
                ("{{pool}} {{state}}", total("pdserve_workers", "pool, state")),
            ),
            "What each pool is to have and what it has.",
        ),
        Panel(
            "KV blocks in use",
            "percentunit",
            (("{{instance}}", f"pdserve:kv_blocks_used:ratio{{{SYSTEM}}}"),),
            "Share of each worker's pool that live requests hold.",
        ),
        Panel(
            "What pools wait for",
            "short",
            (
                ("prefill: backlog tokens", total("pdserve_backlog_tokens", pool="prefill")),
                ("decode: active sequences", total("pdserve_active_sequences", pool="decode")),
                ("routers: waiting tokens", total("pdserve_router_waiting_tokens")),
            ),
            "Each pool's own signal.",
        ),
        Panel(
            "Recoveries",
            "reqps",
            (("{{cause}}", rate("pdserve_router_recoveries_total", "cause") + " or vector(0)"),),
            "Requests placed again after an attempt failed. Clients see a pause at most.",
        ),
        Panel(
            "Restarts",
            "short",
            (("processes", total("pdserve_process_restarts")),),
            "How often processes have been started again.",
        ),
    )
    router = (
        Panel(
            "Running",
            "short",
            (("{{instance}}", total("pdserve_router_running_requests", "instance")),),
            "Requests admitted and not ended, by router.",
        ),
        Panel(
            "Waiting",
            "short",
            (
                ("requests", total("pdserve_router_waiting_requests")),
                ("tokens", total("pdserve_router_waiting_tokens")),
            ),
            "Admitted requests that no worker has yet.",
        ),
        Panel(
            "API responses",
            "reqps",
            (("{{api}} {{status}} {{code}}", rate("pdserve_api_responses_total", "api, status, code")),),
            "What clients were answered.",
        ),
        Panel(
            "Attempts per request",
            "short",
            (
                (
                    "attempts",
                    ratio(
                        rate("pdserve_router_attempts_total"),
                        f"({rate('pdserve_router_attempts_total')} - "
                        f"({rate('pdserve_router_recoveries_total')} or vector(0)))",
                    ),
                ),
            ),
            "Attempts for each first attempt: 1 when nothing has to be placed again.",
        ),
        Panel(
            "End to end",
            "s",
            quantiles("pdserve_request_seconds"),
            "From admission to the last token.",
        ),
        Panel(
            "Workers in reach",
            "short",
            (("{{instance}}", total("pdserve_router_ready_workers", "instance")),),
            "Workers that each router can use.",
        ),
        Panel(
            "Longest wait",
            "s",
            (("{{instance}}", total("pdserve_router_oldest_waiting_seconds", "instance")),),
            "For how long a request has been without a worker.",
        ),
        Panel(
            "Refusals",
            "reqps",
            (("{{limit}}", rate("pdserve_router_refusals_total", "limit") + " or vector(0)"),),
            "Requests refused at once, by the limit of router.admission that says so.",
        ),
        Panel(
            "Stages",
            "s",
            quantile(0.5, "pdserve_request_stage_seconds", "stage"),
            "Where the median request's time goes. docs/metrics.md says what each stage is.",
        ),
        Panel(
            "Stages, p99",
            "s",
            quantile(0.99, "pdserve_request_stage_seconds", "stage"),
            "The same for the slowest of a hundred.",
        ),
        Panel(
            "Tokenise",
            "s",
            quantiles("pdserve_api_tokenise_seconds"),
            "From a request's body to its checked tokens.",
        ),
        Panel(
            "First event",
            "s",
            quantiles("pdserve_api_first_event_seconds"),
            "From a request's arrival to the first tokens of its stream written to the client.",
        ),
        Panel(
            "Cached and recomputed tokens",
            "short",
            (
                ("cached {{pool}}", rate("pdserve_router_cached_tokens_total", "pool")),
                (
                    "recomputed {{cause}}",
                    rate("pdserve_router_recomputed_tokens_total", "cause") + " or vector(0)",
                ),
            ),
            "Prompt tokens per second that a prefix cache had, and what was computed again after a loss.",
        ),
        Panel(
            "Prefix index",
            "short",
            (("{{instance}}", total("pdserve_router_index_mismatches", "instance")),),
            "How often a router's index disagreed with a worker. Never, unless something is wrong.",
        ),
        Panel(
            "Actual over predicted time",
            "short",
            quantiles("pdserve_router_prediction_ratio", "placement"),
            "Of first and second tokens, where the placement policy predicts them; 1 is exact.",
        ),
        Panel(
            "Degraded",
            "short",
            (("{{instance}}", total("pdserve_router_degraded", "instance")),),
            "1 while a whole pool is missing: nobody decodes, or decode workers compute the prompts, too.",
        ),
        Panel(
            "Suspects",
            "reqps",
            (("suspects", rate("pdserve_router_suspects_total")),),
            "Requests that were at two workers when they died, and ran alone from then on.",
        ),
        Panel(
            "Open client connections",
            "short",
            (("{{api}}", total("pdserve_api_open_requests", "api")),),
            "Client requests being answered.",
        ),
    )
    transfer = (
        Panel(
            "Payload",
            "Bps",
            (("{{transport}}", rate("pdserve_kv_transfer_bytes_total", "transport")),),
            "KV bytes received and verified, per second.",
        ),
        Panel(
            "Transfers",
            "reqps",
            (("{{transport}} {{outcome}}", rate("pdserve_kv_transfers_total", "transport, outcome")),),
            "Transfers of a prompt's KV, by how they ended.",
        ),
        Panel(
            "Exposed time",
            "s",
            quantiles("pdserve_kv_transfer_exposed_seconds", "transport"),
            "From the end of a prompt's last forward pass to all its KV verified: the second token waits.",
        ),
        Panel(
            "Hidden time",
            "s",
            quantiles("pdserve_kv_transfer_hidden_seconds", "transport"),
            "Transfer time behind computing.",
        ),
        Panel(
            "Ahead",
            "percentunit",
            quantiles("pdserve_kv_transfer_ahead_ratio", "transport"),
            "Share of a prompt's KV that was verified when its last forward pass ended.",
        ),
        Panel(
            "Segments",
            "reqps",
            (
                ("{{transport}} {{result}}", rate("pdserve_kv_segments_total", "transport, result")),
                ("sent again", rate("pdserve_segments_resent_total")),
            ),
            "corrupt: a digest did not match, and the segment was sent again.",
        ),
        Panel(
            "Segment time",
            "s",
            quantiles("pdserve_kv_segment_seconds", "transport"),
            "From a segment's announcement to its verified copy.",
        ),
        Panel(
            "Prefill calls",
            "reqps",
            (("{{outcome}}", rate("pdserve_prefill_calls_total", "outcome")),),
            "How the source's side of the hand-offs ended.",
        ),
        Panel(
            "Stale messages",
            "reqps",
            (
                ("workers {{kind}}", rate("pdserve_stale_messages_total", "kind") + " or vector(0)"),
                ("routers {{kind}}", rate("pdserve_router_stale_messages_total", "kind") + " or vector(0)"),
            ),
            "Messages that came twice, too late or out of order and changed nothing.",
        ),
        Panel(
            "Refused calls",
            "reqps",
            (("{{reason}}", rate("pdserve_refused_calls_total", "reason") + " or vector(0)"),),
            "Calls refused because of who called or what was sent: another deployment, bad input.",
        ),
    )
    return (
        Dashboard("pdserve-overview", "pdserve: overview", overview),
        Dashboard("pdserve-prefill", "pdserve: prefill pool", _pool("prefill")),
        Dashboard("pdserve-decode", "pdserve: decode pool", _pool("decode")),
        Dashboard("pdserve-router", "pdserve: routers", router),
        Dashboard("pdserve-transfer", "pdserve: KV transfer", transfer),
        Dashboard("pdserve-efficiency", "pdserve: utilisation and cost", EFFICIENCY),
        Dashboard("pdserve-slo", "pdserve: objectives and alerts", SLO),
    )
