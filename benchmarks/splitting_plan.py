"""What `benchmarks.splitting` compares, and by which loads. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.replay import MODEL_NAME, SLOS, Workload

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
"""10M parameters: 512 prompt tokens take as long as a dozen decode steps, 60 requests take some seconds."""
CHUNK_TOKENS = 256
STEP_BUDGET_MS = 60.0
"""Every worker's, so that steps in which an unsplit one computes prompts beside its running streams keep the
SLO "no stall"."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One way to use two cores."""

    text: str
    num_prefill: int
    num_decode: int
    threads: int
    policy: str = "longest_prefix"
    """How routers place requests: by this one, split pools split always."""

    def config(self, name: str, model: Path) -> dict[str, Any]:
        """Of its deployment; all arrangements have the same KV memory in all."""
        kv_bytes = KV_BYTES // (self.num_prefill + self.num_decode)
        return {
            "name": f"bench-{name}",
            "model": {"path": str(model), "served_name": MODEL_NAME},
            "engine": {
                "threads": self.threads,
                "kv_memory": kv_bytes,
                "chunk_tokens": CHUNK_TOKENS,
                "step_budget_ms": STEP_BUDGET_MS,
            },
            "pools": {"prefill": {"replicas": self.num_prefill}, "decode": {"replicas": self.num_decode}},
            "router": {"http_port": 0, "policy": self.policy},
        }


KV_BYTES = 256 << 20
RATES = ("low", "high")
"""At which all arrangements are measured."""
ARRANGEMENTS = {
    "split": Arrangement("one prefill and one decode worker, one thread each", 1, 1, 1),
    "two unsplit": Arrangement("two unsplit workers, one thread each", 0, 2, 1),
    "one unsplit": Arrangement("one unsplit worker with two threads", 0, 1, 2),
    "split or local": Arrangement(
        "as split, but the decode worker computes prompts, too, where that is predicted to be faster",
        1,
        1,
        1,
        "predicted",
    ),
}
USUAL = ("split", "two unsplit", "one unsplit")


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured; a results file belongs to one."""

    num_requests: int = 60
    """Of one run."""
    repetitions: int = 7
    max_sweep_runs: int = 5
    shape: Mapping[str, Any] = field(default_factory=lambda: SHAPE)
    arrangements: tuple[str, ...] = USUAL

    def describe(self, workloads: Sequence[Workload]) -> dict[str, Any]:
        """All that results depend on, as JSON."""
        return {
            "workloads": {workload.name: workload.facts() for workload in workloads},
            "plan": asdict(self),
            "arrangements": {name: asdict(ARRANGEMENTS[name]) for name in self.arrangements},
            "engine": {"dtype": "bfloat16", "chunk_tokens": CHUNK_TOKENS, "step_budget_ms": STEP_BUDGET_MS},
            "kv_bytes": KV_BYTES,
            "slos": {name: asdict(slo) for name, slo in SLOS.items()},
        }

    def words(self, workloads: Sequence[Workload]) -> str:
        """How much there is to measure, and how long it takes, about."""
        num_sweeps = len(workloads) * len(self.arrangements) * self.max_sweep_runs
        num_runs = len(workloads) * len(self.arrangements) * len(RATES) * self.repetitions
        seconds = sum(run_seconds(workload, first_rate(workload)) for workload in workloads) / len(workloads)
        names = ", ".join(f"{workload.name} from {first_rate(workload):g}/s" for workload in workloads)
        return (
            f"{self.num_requests} requests a run; {names}\n"
            f"at most {num_sweeps} runs to find the knees and {num_runs} runs at common rates, in all about "
            f"{(num_sweeps + num_runs) * seconds / 60:.0f} minutes"
        )


def first_rate(workload: Workload) -> float:
    """Where a sweep begins, requests per second: what one core might do, if it computed nothing twice."""
    facts = workload.facts()
    prompt_s = PER_PROMPT_TOKEN_S * facts["mean_prompt_tokens"] * (1 - facts["shared_share"])
    return round(1 / (PER_REQUEST_S + prompt_s + PER_OUTPUT_TOKEN_S * facts["mean_output_tokens"]), 2)


PER_REQUEST_S = 0.01
PER_PROMPT_TOKEN_S = 0.00014
PER_OUTPUT_TOKEN_S = 0.002


def run_seconds(workload: Workload, rate: float) -> float:
    """How long a run takes, about: until the last request is due, and its answer."""
    return len(workload.requests) / rate + 1.0
