"""The engine: a model of transformers, its paged KV pool, and one forward pass at a time."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pdserve.contract.errors import ConfigError
from pdserve.contract.messages import PROTOCOL_VERSION
from pdserve.contract.model_work import DevicePeak, ModelWork, Roofline
from pdserve.contract.ports import LayersDone
from pdserve.contract.work import ModelInfo, SampledToken, SequenceStep, StepBatch, StepCost, StepResult
from pdserve.engine.attention import ATTENTION_NAME, PagedAttention
from pdserve.engine.attention_plan import AttentionPlan
from pdserve.engine.attention_probe import AttentionShape, probe_attention
from pdserve.engine.calibration import calibrate
from pdserve.engine.checkpoint import Checkpoint, find_checkpoint
from pdserve.engine.device_peak import find_peak
from pdserve.engine.host import find_device
from pdserve.engine.kv_pool import KvLayout, KvPool, plan_num_blocks, require_room
from pdserve.engine.lean_decoder import LeanDecoder
from pdserve.engine.model_loader import LoadedModel, load_model
from pdserve.engine.model_shape import model_work
from pdserve.engine.packed_experts import pack_experts
from pdserve.engine.packed_linear import MIN_ROWS, pack_linears
from pdserve.engine.ragged_batch import flatten
from pdserve.engine.sampler import sample
from pdserve.engine.self_check import CheckResult, Reference, check, make_reference, require_equal
from pdserve.engine.settings import EngineSettings

Progress = Callable[[str], None]


class ModelEngine:
    """Implements `pdserve.contract.ports.Engine`. Make one with `load`."""

    def __init__(
        self, loaded: LoadedModel, shape: AttentionShape, pool: KvPool, info: ModelInfo, work: ModelWork
    ) -> None:
        self._loaded = loaded
        self._model = loaded.model
        self._pool = pool
        self._info = info
        self._device = pool.tensor.device
        self._threads = torch.get_num_threads()
        self._attention = PagedAttention(pool)
        self._attention.attach(loaded.model)
        self._model.set_attn_implementation(ATTENTION_NAME)
        self._lean = LeanDecoder.find(loaded.model, shape, self._attention)
        self._cost = StepCost(0.0, 0.0, 0.0)
        self._roofline = Roofline(work, DevicePeak(0.0, 0.0))

    @classmethod
    def load(cls, settings: EngineSettings, progress: Progress | None = None) -> "ModelEngine":
        """Find, load and check a model, make its KV pool and measure its steps.

        `progress` is told in a few words what is being done. Raises NotFound, ModelUnsupported or
        ConfigError, each naming the cause and the fix.
        """
        tell = progress or _say_nothing
        device = find_device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        tell(f"finding {settings.model}")
        checkpoint = find_checkpoint(settings.model, settings.revision)
        tell(f"loading {checkpoint.weight_bytes / 2**20:.0f} MiB of weights")
        require_room(checkpoint.loaded_bytes(settings.dtype), settings, device)
        loaded = load_model(checkpoint, settings, device)
        shape = probe_attention(settings.model, loaded.model, loaded.config)
        work = model_work(loaded.model, loaded.config, shape)
        reference = make_reference(loaded.model, int(loaded.config.vocab_size), loaded.max_model_len)
        if device.type == "cpu":
            tell("laying out weights")
            pack_experts(loaded.model, loaded.dtype)
            pack_linears(loaded.model, loaded.dtype)
        layout = KvLayout(
            shape.num_layers, settings.block_size, shape.num_kv_heads, shape.head_dim, loaded.dtype
        )
        num_blocks = plan_num_blocks(layout, settings, device)
        info = _model_info(settings, checkpoint, loaded, layout, num_blocks)
        engine = cls(loaded, shape, KvPool(layout, num_blocks, device), info, work)
        tell("checking against the model's own forward pass")
        engine._accept(settings, engine._check(settings, reference))
        tell("measuring steps")
        engine._cost = calibrate(engine.logits, info)
        peak = find_peak(device, loaded.dtype, settings.peak_tflops, settings.peak_gb_per_s)
        engine._roofline = Roofline(work, peak)
        return engine

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def blocks(self) -> KvPool:
        return self._pool

    @property
    def cost(self) -> StepCost:
        return self._cost

    @property
    def roofline(self) -> Roofline:
        return self._roofline

    def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """Run one forward pass and sample where asked. Raises ValueError for a malformed batch."""
        started = time.perf_counter()
        wanted = [index for index, sequence in enumerate(batch.sequences) if sequence.sample is not None]
        with self._attention.notices.given_to(layers_done):
            logits = self.logits(batch, wanted)
            sampled = self._sample(batch.sequences, wanted, logits)
            self._wait_for_kernels()
        return StepResult(sampled, time.perf_counter() - started)

    @torch.inference_mode()
    def logits(self, batch: StepBatch, wanted: Sequence[int]) -> Tensor:
        """Run one forward pass; the logits [len(wanted), vocab] after the last token of those sequences."""
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # the number belongs to the calling thread
        ragged = flatten(batch, self._info.block_size, MIN_ROWS)
        if ragged.fresh_blocks:
            self._pool.clear(ragged.fresh_blocks)
        self._attention.plan = AttentionPlan(ragged, self._pool.layout, self._device)
        logits = self._forward(
            torch.from_numpy(ragged.token_ids).to(self._device),
            torch.from_numpy(ragged.positions).to(self._device),
            torch.from_numpy(ragged.last_rows[list(wanted)]).to(self._device),
        )
        self._attention.plan = None
        return logits

    def _wait_for_kernels(self) -> None:
        """A step has ended when its kernels have: then other streams and other processes read its KV."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _forward(self, token_ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        if self._lean is not None:
            return self._lean.logits(token_ids, positions, keep)
        output = self._model(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=keep,
        )
        logits: Tensor = output.logits[0]
        return logits

    def _check(self, settings: EngineSettings, reference: Reference) -> CheckResult:
        result = check(reference, self.logits, self._info.block_size)
        require_equal(settings.model, self._loaded.config.model_type, self._loaded.dtype, result)
        return result

    def _accept(self, settings: EngineSettings, result: CheckResult) -> None:
        """Say whether results depend on how work is cut: as promised on a CPU, never promised on a GPU."""
        can_promise = result.invariant and self._device.type == "cpu"
        if settings.deterministic and not can_promise:
            raise ConfigError(
                f"deterministic is set, but on this {self._device.type} results depend on how a batch is put "
                "together: leave deterministic unset, or use the CPU",
                param="deterministic",
            )
        wanted = settings.deterministic is not False
        self._info = replace(self._info, deterministic=wanted and can_promise)

    def _sample(
        self, sequences: Sequence[SequenceStep], wanted: Sequence[int], logits: Tensor
    ) -> list[SampledToken | None]:
        sampled: list[SampledToken | None] = [None] * len(sequences)
        requests = [request for index in wanted if (request := sequences[index].sample) is not None]
        if requests:
            tokens = sample(logits.float(), requests, self._info.eos_token_ids)
            for index, token in zip(wanted, tokens, strict=True):
                sampled[index] = token
        return sampled


def _model_info(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    loaded: LoadedModel,
    layout: KvLayout,
    num_blocks: int,
) -> ModelInfo:
    dtype = str(loaded.dtype).removeprefix("torch.")
    return ModelInfo(
        name=settings.name,
        architecture=loaded.architecture,
        revision=checkpoint.revision,
        dtype=dtype,
        vocab_size=int(loaded.config.vocab_size),
        max_model_len=loaded.max_model_len,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        num_blocks=num_blocks,
        block_bytes=layout.block_bytes,
        eos_token_ids=loaded.eos_token_ids,
        fingerprint=_fingerprint(checkpoint, dtype, layout.block_size, loaded.config),
        chunk_tokens=settings.chunk_tokens,
        deterministic=False,
    )


def _fingerprint(checkpoint: Checkpoint, dtype: str, block_size: int, config: Any) -> str:
    """Over everything that changes what a KV byte means: files (rope is in config.json), dtype, block size
    and protocol."""
    rope = getattr(config, "rope_parameters", None)
    content = json.dumps(
        [checkpoint.digest, dtype, block_size, rope, PROTOCOL_VERSION], sort_keys=True, default=str
    )
    return hashlib.sha256(content.encode()).hexdigest()


def _say_nothing(message: str) -> None:
    """Nobody wants to know."""
