"""Generate docs/metrics.md from the metrics that pdserve/metrics.py registers.

python tools/make_metrics_docs.py            write it
python tools/make_metrics_docs.py --check    fail when the committed page is not what would be written
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric

from pdserve.contract.errors import ErrorCode
from pdserve.contract.messages import Submit, TokenEvent
from pdserve.contract.model_work import DevicePeak, ModelWork, Roofline
from pdserve.contract.work import BlockCounts, StepBatch
from pdserve.engine_metrics import export_price
from pdserve.metrics import ControllerMetrics, FaultMetrics, RouterMetrics, WorkerMetrics

PAGE = Path(__file__).resolve().parent.parent / "docs" / "metrics.md"

HEAD = """\
# Metrics

Every router, every worker and the controller serve a page of their own in the Prometheus text format.
Prometheus finds them all by service discovery at the controller (`network.discovery_port`), which follows
the pools; [deploy/prometheus](../deploy/prometheus) has a configuration with rules and alerts, and
[deploy/grafana](../deploy/grafana) has dashboards. Times are seconds, sizes bytes. Which process a sample
comes from is in the scrape target's labels (`instance`, `system`); the labels below are bounded: never a
request, a tenant or a worker.

A histogram is exported as `_bucket`, `_sum` and `_count`. Whoever asks for the OpenMetrics format, as
Prometheus does, also gets exemplars: the routers' histograms of times name a request of each bucket, whose
[report](api.md#reports-for-operators) says where its time went (`GET /admin/requests/{id}`). Prometheus keeps
them with `--enable-feature=exemplar-storage`.

This page is generated from [`pdserve/metrics.py`](../pdserve/metrics.py) and what it is put together from by
`tools/make_metrics_docs.py`; do not edit it.

## What follows from them

The recording rules in [deploy/prometheus/rules.yml](../deploy/prometheus/rules.yml) derive what dashboards
and alerts are about:

- **Goodput**: requests per second with `result="good"` of `pdserve_slo_requests_total`, that is, answered to
  the end within every objective of [`slo`](configuration.md#slo). [`Objectives`](../router/objectives.py)
  judges as `pdserve bench` does, but from a request's admission to the arrival of its tokens at the router.
- **Error budget burn**: the share of bad requests over (1 - `slo.target`). At 1 as many are bad as may be.
- **Utilisation**: `pdserve_engine_flops_total` and `pdserve_engine_memory_bytes_total` per second over the
  peak of the device. [`ModelWork`](../pdserve/contract/model_work.py) has the formula: what the model's
  shapes ask for, not what was executed.
- **Peak of a device**: `engine.peak_tflops` and `engine.peak_gb_per_s`, else the data sheet of a known GPU,
  else measured at load with the worker's own threads ([`find_peak`](../pdserve/engine/device_peak.py)).
  Workers that share a machine's memory cannot all reach it at once.
- **Cost**: the prices of the processes that Prometheus reaches over what the routers delivered in the last
  five minutes. Idle time is paid for; processes that still load are not in it.
"""

TABLE_HEAD = "| name | type | labels | meaning |\n|---|---|---|---|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    page = make_page()
    if not check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        print("docs/metrics.md is not what tools/make_metrics_docs.py writes: run it", file=sys.stderr)
        return 1
    return 0


def make_page() -> str:
    """The whole page as Markdown."""
    return "\n".join(
        [
            HEAD,
            _section("Workers", _worker_metrics()),
            _section("Routers", _router_metrics()),
            _section("Controller", _controller_metrics()),
            _section("Routers and workers, with --allow-faults", _fault_metrics()),
        ]
    )


def _worker_metrics() -> Iterable[Metric]:
    """All families of a worker, each with a sample, which alone says what its labels are."""
    roofline = Roofline(ModelWork(0, 0, 0, 0, 0, 0, ()), DevicePeak(0.0, 0.0))
    metrics = WorkerMetrics("decode", CollectorRegistry(), roofline)
    metrics.engine.observe_step(StepBatch([]), 0.0)
    export_price("decode", metrics.registry, 0.0)
    metrics.count_transfer("grpc", "verified")
    metrics.observe_segment("grpc", num_bytes=0, seconds=0.0, verified=True)
    metrics.observe_overlap("grpc", hidden_s=0.0, exposed_s=0.0, share_ahead=0.0)
    metrics.follow_blocks(lambda: BlockCounts(free=0, cached=0, reserved=0, active=0))
    metrics.count_end("stop")
    metrics.count_stale(Submit)
    metrics.count_prefill_call("sealed")
    metrics.count_refused_call(ErrorCode.UNAUTHENTICATED)
    return metrics.registry.collect()


def _router_metrics() -> Iterable[Metric]:
    metrics = RouterMetrics(CollectorRegistry())
    export_price("router", metrics.registry, 0.0)
    metrics.count_end("stop")
    metrics.slo.set_objectives({"ttft": 2.0}, 0.99)
    metrics.stages.observe("prefill", 0.0, "r-1")
    metrics.stages.count_cached("prefill", 0)
    metrics.stages.count_recomputed("worker_lost", 0)
    metrics.count_refusal("max_requests")
    metrics.on_tokenised("chat", 0.0)
    metrics.on_first_event("chat", 0.0)
    metrics.follow_oldest_waiting(lambda: 0)
    metrics.count_recovery(ErrorCode.WORKER_LOST)
    metrics.observe_prediction("first", "split", actual_s=0.1, predicted_s=0.1)
    metrics.count_stale(TokenEvent)
    metrics.on_request_start("chat")
    metrics.on_request_end("chat", "ok", 200)
    metrics.follow_index_mismatches(lambda: 0)
    metrics.follow_degraded(lambda: False)
    metrics.follow_workers(lambda: 0)
    return metrics.registry.collect()


def _controller_metrics() -> Iterable[Metric]:
    metrics = ControllerMetrics(CollectorRegistry())
    metrics.set_pool("decode", 1, 1, {"ready": 1})
    metrics.set_head_up(True)
    return metrics.registry.collect()


def _fault_metrics() -> Iterable[Metric]:
    metrics = FaultMetrics(CollectorRegistry())
    metrics.count("kill")
    return metrics.registry.collect()


def _section(title: str, families: Iterable[Metric]) -> str:
    rows = sorted(_row(family) for family in families)
    return "\n".join([f"## {title}", "", TABLE_HEAD, *rows, ""])


def _row(family: Metric) -> str:
    if not family.samples:
        raise ValueError(f"{family.name} has labels and no sample: use it once in the functions above")
    name = f"{family.name}_total" if family.type == "counter" else family.name
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}
    shown = ", ".join(f"`{label}`" for label in sorted(labels))
    return f"| `{name}` | {family.type} | {shown} | {family.documentation} |"


if __name__ == "__main__":
    sys.exit(main())
