"""What workers count about their engines' steps, and what a process costs."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from pdserve.contract.model_work import Roofline
from pdserve.contract.work import StepBatch

_STEP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 5)
_BATCH_SEQUENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_BATCH_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class EngineMetrics:
    """The steps of one worker's engine."""

    def __init__(self, pool: str, registry: CollectorRegistry, roofline: Roofline) -> None:
        """`pool` is the worker's role."""
        self._pool = pool
        self._work = roofline.work
        self._seconds = Histogram(
            "pdserve_engine_step_seconds",
            "Wall time of one engine step, by kind; prefill: it only computed prompts; decode: it only "
            "generated; mixed: both.",
            ["pool", "kind"],
            buckets=_STEP_S,
            registry=registry,
        )
        self._sequences = Histogram(
            "pdserve_engine_batch_sequences",
            "Sequences in one engine step.",
            ["pool"],
            buckets=_BATCH_SEQUENCES,
            registry=registry,
        ).labels(pool)
        self._tokens = Histogram(
            "pdserve_engine_batch_tokens",
            "New tokens that one engine step computed.",
            ["pool"],
            buckets=_BATCH_TOKENS,
            registry=registry,
        ).labels(pool)
        self._flops = Counter(
            "pdserve_engine_flops",
            "Floating-point operations that the steps could not do without, by the model's shapes.",
            ["pool"],
            registry=registry,
        ).labels(pool)
        self._bytes = Counter(
            "pdserve_engine_memory_bytes",
            "Bytes of weights and KV that the steps could not do without reading or writing, by the model's "
            "shapes.",
            ["pool"],
            registry=registry,
        ).labels(pool)
        peaks = {
            "pdserve_device_peak_flops_per_second": (
                "The most floating-point operations per second that the worker's device gives in the model's "
                "dtype: engine.peak_tflops, or by the device's name, or measured at load.",
                roofline.peak.flops_per_s,
            ),
            "pdserve_device_peak_bytes_per_second": (
                "The most bytes per second that the memory of the worker's device gives: "
                "engine.peak_gb_per_s, or by the device's name, or measured at load.",
                roofline.peak.bytes_per_s,
            ),
        }
        for name, (text, peak) in peaks.items():
            Gauge(name, text, ["pool"], registry=registry).labels(pool).set(peak)

    def observe_step(self, batch: StepBatch, seconds: float) -> None:
        """A step has ended."""
        work = self._work.of(batch)
        self._seconds.labels(self._pool, _kind(batch)).observe(seconds)
        self._sequences.observe(len(batch.sequences))
        self._tokens.observe(work.num_tokens)
        self._flops.inc(work.flops)
        self._bytes.inc(work.num_bytes)


def export_price(pool: str, registry: CollectorRegistry, price_per_hour: float | None) -> None:
    """What this process costs; nothing where no price is configured."""
    if price_per_hour is not None:
        Gauge(
            "pdserve_price_per_hour",
            "What this process costs an hour, in the currency of the configuration (pools.*.price_per_hour, "
            "router.price_per_hour); not there where no price is configured.",
            ["pool"],
            registry=registry,
        ).labels(pool).set(price_per_hour)


def _kind(batch: StepBatch) -> str:
    num_generating = len([None for sequence in batch.sequences if sequence.as_decode])
    if num_generating == 0:
        return "prefill"
    return "decode" if num_generating == len(batch.sequences) else "mixed"
