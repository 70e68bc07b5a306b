"""Panels about what the service is worth: whether it keeps its objectives, how well it uses its devices, and
what that costs."""

from tools.panels import SYSTEM, Panel, highest, kept_share, quantiles, rate, ratio, total

FIRING = 'sum by (alertname, pool, instance) (ALERTS{alertstate="firing"}) or vector(0)'

SLO = (
    Panel(
        "Goodput",
        "reqps",
        (("{{result}}", rate("pdserve_slo_requests_total", "result")),),
        "Requests per second that were answered to the end within every objective of slo, and those that "
        "were not.",
    ),
    Panel(
        "Good requests",
        "percentunit",
        (
            ("good", f"1 - pdserve:slo_bad:ratio_5m{{{SYSTEM}}}"),
            ("target", highest("pdserve_slo_target_ratio")),
        ),
        "Share of the last five minutes' requests, beside slo.target.",
    ),
    Panel(
        "Objectives kept",
        "percentunit",
        (("{{objective}}", kept_share("pdserve_slo_objectives_total", "objective")),),
        "Share of the last five minutes' requests that kept each objective.",
    ),
    Panel(
        "Error budget burn",
        "short",
        (
            ("in 5 minutes and an hour", f"pdserve:slo_burn:fast{{{SYSTEM}}}"),
            ("in 30 minutes and 6 hours", f"pdserve:slo_burn:slow{{{SYSTEM}}}"),
        ),
        "How many times as fast as slo.target allows requests are bad. Nothing to see below 20 requests.",
    ),
    Panel(
        "Time to first token",
        "s",
        (
            *quantiles("pdserve_time_to_first_token_seconds"),
            ("objective", highest("pdserve_slo_limit_seconds", objective="ttft")),
        ),
        "From admission to the first token, beside what slo.ttft_ms asks for.",
    ),
    Panel(
        "Time to second token",
        "s",
        quantiles("pdserve_time_to_second_token_seconds"),
        "The first token that waits for the KV transfer.",
    ),
    Panel(
        "Failed requests",
        "percentunit",
        (("share", f"pdserve:requests_failed:ratio{{{SYSTEM}}}"),),
        "Cancelled and invalid requests do not count.",
    ),
    Panel(
        "Alerts",
        "short",
        (
            (
                "{{alertname}} {{pool}}{{instance}}",
                FIRING,
            ),
        ),
        "What docs/runbook.md has a paragraph for.",
    ),
    Panel(
        "Targets",
        "short",
        (("{{instance}}", f'sum by (instance) (up{{job="pdserve", {SYSTEM}}})'),),
        "1: Prometheus reaches the process.",
    ),
)

EFFICIENCY = (
    Panel(
        "Busy",
        "percentunit",
        (("{{instance}}", f"pdserve:engine_busy:ratio{{{SYSTEM}}}"),),
        "Share of the time in which each worker's engine computed.",
    ),
    Panel(
        "Model FLOPs utilisation",
        "percentunit",
        (("{{instance}}", f"pdserve:model_flops:ratio{{{SYSTEM}}}"),),
        "Operations that the steps could not do without, over the most that the device gives. Prefill is "
        "bound by it.",
    ),
    Panel(
        "Memory bandwidth utilisation",
        "percentunit",
        (("{{instance}}", f"pdserve:memory_bandwidth:ratio{{{SYSTEM}}}"),),
        "Bytes of weights and KV that the steps had to move, over the most that the device gives. Decode "
        "is bound by it.",
    ),
    Panel(
        "Model FLOPs while busy",
        "percentunit",
        (
            (
                "{{pool}}",
                ratio(
                    rate("pdserve_engine_flops_total", "pool"),
                    rate("pdserve_engine_step_seconds_sum", "pool"),
                )
                + f" / avg by (pool) (pdserve_device_peak_flops_per_second{{{SYSTEM}}})",
            ),
        ),
        "The same only over the time in which engines computed: how good their steps are.",
    ),
    Panel(
        "Memory bandwidth while busy",
        "percentunit",
        (
            (
                "{{pool}}",
                ratio(
                    rate("pdserve_engine_memory_bytes_total", "pool"),
                    rate("pdserve_engine_step_seconds_sum", "pool"),
                )
                + f" / avg by (pool) (pdserve_device_peak_bytes_per_second{{{SYSTEM}}})",
            ),
        ),
        "The same only over the time in which engines computed.",
    ),
    Panel(
        "Where engines spend their time",
        "percentunit",
        (("{{pool}} {{kind}}", rate("pdserve_engine_step_seconds_sum", "pool, kind")),),
        "Seconds of steps per second, by pool and kind of step.",
    ),
    Panel(
        "Cost per million tokens",
        "short",
        (
            ("output tokens", f"pdserve:cost_per_million_output_tokens:rate5m{{{SYSTEM}}}"),
            ("all tokens", f"pdserve:cost_per_million_tokens:rate5m{{{SYSTEM}}}"),
        ),
        "What runs now, for what it delivered in the last five minutes; needs price_per_hour in the "
        "configuration.",
    ),
    Panel(
        "Cost per thousand good requests",
        "short",
        (("cost", f"pdserve:cost_per_thousand_good_requests:rate5m{{{SYSTEM}}}"),),
        "The same for requests that kept what slo asks for.",
    ),
    Panel(
        "Price per hour",
        "short",
        (("{{pool}}", total("pdserve_price_per_hour", "pool")),),
        "Of all processes that Prometheus reaches.",
    ),
)
