"""What an engine is asked to be: one frozen value, checked where it is made."""

from dataclasses import dataclass

from pdserve.contract.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How to load a model and how to run it. Raises ConfigError naming the key that is wrong."""

    model: str
    """A folder with config.json and safetensors files, or a hub id."""
    served_name: str = ""
    """Under which name the model is offered; empty means `model`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: str = "auto"
    """auto is the checkpoint's own dtype."""
    device: str = "auto"
    """auto is cuda where there is a GPU, else cpu."""
    threads: int | None = None
    """Threads of one operator on the CPU; None leaves torch's own choice."""
    block_size: int = 16
    """Tokens per KV block."""
    kv_memory_bytes: int | None = None
    """Size of the KV pool; None takes `kv_memory_fraction`."""
    kv_memory_fraction: float = 0.5
    """Share of the memory that is free after loading the model."""
    max_model_len: int | None = None
    """Most tokens of prompt and output; None is what the model was made for."""
    deterministic: bool | None = None
    """Results of a sequence do not depend on what runs beside it nor on how it was split. None: on the
    CPU yes, on a GPU no."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint."""
    chunk_tokens: int = 512
    """Prefill chunks end at multiples of this, counted from token 0."""
    peak_tflops: float | None = None
    peak_gb_per_s: float | None = None
    """What the device gives at most, 10**12 operations and 10**9 bytes a second. None: looked up or
    measured."""

    def __post_init__(self) -> None:
        _require(bool(self.model), "model", "give a folder or a hub id")
        _require(self.dtype in DTYPES, "dtype", f"choose one of {', '.join(DTYPES)}")
        _require(self.device in DEVICES, "device", f"choose one of {', '.join(DEVICES)}")
        _require(self.threads is None or self.threads >= 1, "threads", "give at least 1")
        _require(self.block_size >= 1, "block_size", "give at least 1")
        _require(
            self.kv_memory_bytes is None or self.kv_memory_bytes > 0, "kv_memory_bytes", "give more than 0"
        )
        _require(0 < self.kv_memory_fraction <= 0.95, "kv_memory_fraction", "give a value in (0, 0.95]")
        _require(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", "give at least 2")
        _require(
            self.chunk_tokens >= self.block_size and self.chunk_tokens % self.block_size == 0,
            "chunk_tokens",
            f"give a multiple of block_size ({self.block_size})",
        )

    @property
    def name(self) -> str:
        """The name the model is served under."""
        return self.served_name or self.model


def _require(condition: bool, key: str, fix: str) -> None:
    if not condition:
        raise ConfigError(f"engine setting {key} is not valid: {fix}", param=key)
