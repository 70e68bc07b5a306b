"""What transformers itself generates: the independent source of expected tokens."""

import copy
from collections.abc import Callable, Sequence
from random import Random

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


def assert_unambiguous(exact: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]) -> None:
    """In float64 (`exact`) the best token leads by more than MIN_GAP at every step, so rounding cannot change
    it."""
    with torch.inference_mode():
        logits = exact(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    gap = (best[:, 0] - best[:, 1]).min().item()
    assert logits.argmax(-1).tolist() == list(output), "float32 and float64 disagree; choose another seed"
    assert gap > MIN_GAP, f"the best two tokens are {gap:.1e} apart; choose another seed"


def exact_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in float64."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # the grouped product knows no float64
    return exact


def adjusted_reference(
    exact: PreTrainedModel, prompt: Sequence[int], num_tokens: int, **options: object
) -> list[int]:
    """At most `num_tokens` of greedy `generate()` in float64 with options: penalties, biases, ends. At every
    step the best of the adjusted logits leads by more than MIN_GAP."""
    with torch.inference_mode():
        output = exact.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
    best = torch.cat(output.scores).topk(2).values
    gap = (best[:, 0] - best[:, 1]).min().item()
    assert gap > MIN_GAP, f"the best two tokens are {gap:.1e} apart; choose another seed"
    tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
    return tokens


def tokens_chosen_by(
    choose: Callable[[list[int], torch.Tensor], int],
    exact: PreTrainedModel,
    prompt: Sequence[int],
    num_tokens: int,
) -> list[int]:
    """One forward pass over everything per token; `choose` picks it from (tokens so far, logits [vocab])."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = exact(torch.tensor([tokens])).logits[0, -1]
        tokens.append(choose(tokens, logits))
    return tokens[len(prompt) :]


def mixed_prompts(num: int, block: int, chunk: int, vocab_size: int, seed: int = 5) -> list[tuple[int, ...]]:
    """Prompts shorter than, equal to and longer than a block, a chunk and several chunks; the last ones share
    a prefix of two chunks."""
    random = Random(seed)
    lengths = (1, 7, block, block + 1, chunk - 1, chunk, chunk + 1, 3 * chunk, 4 * chunk + 5)
    prompts = [tuple(random.randrange(3, vocab_size) for _ in range(length)) for length in lengths]
    shared = prompts[-1][: 2 * chunk]
    while len(prompts) < num:
        prompts.append(shared + tuple(random.randrange(3, vocab_size) for _ in range(9)))
    return prompts


def greedy_references(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], num_tokens: int
) -> dict[tuple[int, ...], list[int]]:
    """Prompt -> its greedy continuation, each checked to be unambiguous."""
    outputs = {prompt: greedy_reference(model, prompt, num_tokens) for prompt in prompts}
    exact = exact_copy(model)
    for prompt, output in outputs.items():
        assert_unambiguous(exact, prompt, output)
    return outputs
