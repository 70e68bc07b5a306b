"""The numbers of a loaded model that its arithmetic follows from."""

from collections import Counter
from typing import Any

from torch import nn

from pdserve.contract.model_work import Experts, ModelWork
from pdserve.engine.attention_probe import AttentionShape


def model_work(model: Any, config: Any, attention: AttentionShape) -> ModelWork:
    """Count the weights of a transformers model, before anything is packed. A parameter [experts, ...] holds
    the experts of a layer; a head that is tied to the embedding counts as the head."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings()
    head_id = None if head is None else id(head.weight)
    num_experts = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0)
    num_weights = num_expert_weights = 0
    for parameter in model.parameters():
        if parameter.dim() < 2 or id(parameter) in embeddings or id(parameter) == head_id:
            continue
        if num_experts and parameter.dim() == 3 and parameter.shape[0] == num_experts:
            num_expert_weights += parameter.numel()
        else:
            num_weights += parameter.numel()
    per_token = int(config.num_experts_per_tok) if num_experts else 0
    return ModelWork(
        num_weights=num_weights,
        num_head_weights=0 if head is None else head.weight.numel(),
        weight_bytes=model.dtype.itemsize,
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        windows=tuple(Counter(attention.windows).items()),
        experts=Experts(num_experts, per_token, num_expert_weights),
    )
