"""How long steps and transfers take: a fit of a worker's own measurements, or roofline figures of a GPU."""

from dataclasses import dataclass

from pdserve.contract.errors import ConfigError
from pdserve.contract.work import StepCost


@dataclass(frozen=True, slots=True)
class Timing:
    """The times of one kind of worker. Seconds, bytes, tokens."""

    name: str
    source: str
    """Where the figures come from, for people."""
    cost: StepCost
    """What the worker's calibration finds, and its scheduler and the router believe."""
    per_attention_pair_s: float
    """Of every pair of a prompt token and one before it, beyond `cost`: what makes long prompts slower."""
    kv_bytes_per_token: int
    link_bytes_per_s: float
    """Of each worker's network, in each direction."""
    pool_tokens: int
    chunk_tokens: int
    step_budget_s: float = 0.2
    message_s: float = 0.0005
    """One way between two processes."""
    tail_share: float = 0.125
    """Of the last chunk's KV, what is still to be sent when its step ends: it leaves by groups of layers."""

    def prefill_s(self, start: int, stop: int) -> float:
        """Of the prompt tokens [`start`, `stop`) in a step, beyond the step's fixed time."""
        num = stop - start
        pairs = num * (start + stop) / 2
        return self.cost.per_prefill_token_s * num + self.per_attention_pair_s * pairs

    def decode_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """Of a step's decode rows, with its fixed time."""
        return self.cost.predict_s(0, num_sequences, num_context_tokens)

    def transfer_s(self, num_tokens: int) -> float:
        return num_tokens * self.kv_bytes_per_token / self.link_bytes_per_s


@dataclass(frozen=True, slots=True)
class Gpus:
    """What one worker computes on."""

    flops: float
    """Dense bf16 operations per second that prefill reaches."""
    bytes_per_s: float
    """Memory bandwidth that decode reaches."""
    memory_bytes: float
    link_bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ModelShape:
    parameters: float
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


_LLAMA_8B = ModelShape(8.0e9, 32, 32, 8, 128)
_LLAMA_70B = ModelShape(70.6e9, 80, 64, 8, 128)
# 55 % of the 989 TFLOP/s and 75 % of the 3.35 TB/s that the data sheet promises; 400 Gbit/s of network per
# GPU, of which 80 % arrive. H200: the same FLOP/s, 4.8 TB/s, 141 GB.
_H100 = Gpus(0.55 * 989e12, 0.75 * 3.35e12, 80e9, 0.8 * 50e9)
_H200 = Gpus(0.55 * 989e12, 0.75 * 4.8e12, 141e9, 0.8 * 50e9)


def _several(gpus: Gpus, count: int, efficiency: float) -> Gpus:
    """Tensor parallel: `efficiency` is what communication leaves."""
    return Gpus(
        gpus.flops * count * efficiency,
        gpus.bytes_per_s * count * efficiency,
        gpus.memory_bytes * count,
        gpus.link_bytes_per_s * count,
    )


def roofline(name: str, shape: ModelShape, gpus: Gpus, chunk_tokens: int = 2048) -> Timing:
    """Times of a dense transformer in bf16: a step reads all weights once, computes 2 operations per
    parameter and token, and reads the KV of its decode rows. The parts add up, none hides behind another."""
    kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    weight_bytes = 2 * shape.parameters
    return Timing(
        name=name,
        source="roofline figures: data sheet times assumed efficiencies, not measured",
        cost=StepCost(
            fixed_s=weight_bytes / gpus.bytes_per_s,
            per_prefill_token_s=2 * shape.parameters / gpus.flops,
            per_decode_sequence_s=2 * shape.parameters / gpus.flops,
            per_context_token_s=kv_bytes / gpus.bytes_per_s,
        ),
        per_attention_pair_s=4 * shape.layers * shape.heads * shape.head_dim / gpus.flops,
        kv_bytes_per_token=kv_bytes,
        link_bytes_per_s=gpus.link_bytes_per_s,
        pool_tokens=int((0.9 * gpus.memory_bytes - weight_bytes) / kv_bytes),
        chunk_tokens=chunk_tokens,
    )


DEVICES: dict[str, Timing] = {
    timing.name: timing
    for timing in (
        roofline("h100-8b", _LLAMA_8B, _H100),
        roofline("h200-8b", _LLAMA_8B, _H200),
        roofline("8xh100-70b", _LLAMA_70B, _several(_H100, 8, 0.8)),
        Timing(
            name="cpu-0.4b",
            source="measured: benchmarks/results/engine-cpu-1-threads.json, one thread of an AMD EPYC",
            cost=StepCost(
                fixed_s=31.8e-3,
                per_prefill_token_s=1.287e-3,
                per_decode_sequence_s=1.11e-3,
                per_context_token_s=1.73e-6,
            ),
            per_attention_pair_s=0.0,
            kv_bytes_per_token=2 * 24 * 2 * 64 * 2,
            link_bytes_per_s=1e9,
            pool_tokens=32768,
            chunk_tokens=512,
        ),
    )
}


def device(name: str) -> Timing:
    """Raises ConfigError for a name that is not known."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name} is not known here: choose one of {', '.join(DEVICES)}")
    return DEVICES[name]
