"""Measure what a demo model recalls, with transformers alone, as a Markdown table.

    python tools/measure_demo_model.py pdserve/demo_model

Each prompt is held out: training never told its fact. An answer is right if greedy generation in float32
writes it to the letter and ends. The gap is the difference of the two best logits, the smallest of all tokens
of all right answers.
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pdserve import demo


@dataclass(frozen=True)
class Outcome:
    right: bool
    depth: float
    smallest_gap: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--prompts", type=int, default=200, help="per length")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    print("| tokens | prompts | right | in the 1st / 2nd / 3rd / last quarter of the prompt | smallest gap |")
    print("|---|---|---|---|---|")
    for length in args.lengths:
        print(
            _row(length, [_ask(model, tokenizer, seed, length) for seed in range(args.prompts)]), flush=True
        )


def _ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, length: int) -> Outcome:
    recall = demo.recall_prompt(seed, length)
    messages = [{"role": "user", "content": recall.prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(
        **inputs, max_new_tokens=32, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    text = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :])
    best = torch.cat(output.logits).topk(2).values
    return Outcome(
        text == recall.answer + tokenizer.eos_token, recall.depth, (best[:, 0] - best[:, 1]).min().item()
    )


def _row(length: int, outcomes: list[Outcome]) -> str:
    quarters = [[o for o in outcomes if int(4 * o.depth) == quarter] for quarter in range(4)]
    gap = min((o.smallest_gap for o in outcomes if o.right), default=0.0)
    by_depth = " / ".join(_percent(quarter) for quarter in quarters)
    return f"| {length} | {len(outcomes)} | {_percent(outcomes)} | {by_depth} | {gap:.2f} |"


def _percent(outcomes: Iterable[Outcome]) -> str:
    rights = [o.right for o in outcomes]
    return f"{100 * sum(rights) / len(rights):.1f} %" if rights else "-"


if __name__ == "__main__":
    main()
