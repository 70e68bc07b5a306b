"""What transformers itself generates: the independent source of expected tokens."""

import copy
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

MIN_GAP = 1e-3


def greedy_reference(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """`generate()` with eager attention, float32, without sampling."""
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def assert_unambiguous(model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]) -> None:
    """In float64 the best token leads by more than MIN_GAP at every step, so rounding cannot change it."""
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        logits = exact(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    gap = (best[:, 0] - best[:, 1]).min().item()
    assert logits.argmax(-1).tolist() == list(output), "float32 and float64 disagree; choose another seed"
    assert gap > MIN_GAP, f"the best two tokens are {gap:.1e} apart; choose another seed"
