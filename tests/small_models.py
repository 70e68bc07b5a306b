"""Small random models of every served architecture, saved as a user would have them: config.json and
safetensors in a folder.

The weights are scaled up from their initial values so that the best token stands clear of the second
best, and sizes are chosen so that every feature shows: windows shorter than the prompts, groups of heads,
biases, partial rotary, soft caps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=24, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=20),
    "gemma2": lambda: Gemma2Config(
        **_GROUPED,
        head_dim=16,
        sliding_window=20,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=5.0,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED,
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**_GROUPED, sliding_window=None),
    "gpt_oss": lambda: GptOssConfig(
        **_GROUPED, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=20
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON, rotary_pct=0.25),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=64, n_layer=3, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": lambda: MixtralConfig(
        **_GROUPED, num_local_experts=4, num_experts_per_tok=2, sliding_window=None
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_GROUPED,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        norm_topk_prob=True,
    ),
}


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A saved model and the transformers model it was saved from (float32, eager attention)."""

    folder: Path
    reference: PreTrainedModel


def make_model(
    architecture: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> SmallModel:
    """Make, save and return a random model; `overrides` change its configuration."""
    config = CONFIGS[architecture]()
    for key, value in overrides.items():
        setattr(config, key, value)
    config._attn_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _spread(model)
    model = model.to(dtype).eval()
    # Tests compare whole continuations, so the reference never stops early.
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder, safe_serialization=True)
    return SmallModel(folder, model)


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    """Redraw all weights wide enough that layers, positions and single tokens matter to the next token."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            embedding = "embed" in name or "wte" in name or "wpe" in name or "lm_head" in name
            parameter.normal_(0.0, 1.0 if embedding else 2.0 * parameter.shape[-1] ** -0.5)
        elif "norm" in name or "ln_" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.normal_(0.0, 0.1)
