"""Train the demo model that comes with pdserve, from nothing: words, tokenizer, texts, weights.

    python tools/train_demo_model.py --output pdserve/demo_model

The texts tell numbers of names between sentences that do not matter, and ask for them
(`tools/demo_texts.py`). They grow from 64 to 2,304 tokens, to the next length when the last one is recalled;
at the end the learning rate goes down to zero. Every step is a function of the seed and of the step before. A
run that was stopped goes on where it was, from `--state`.
"""

import argparse
import functools
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import demo_texts
import torch
from demo_texts import ANSWER_DIGITS, END, PAD, SPECIAL_TOKENS, WORDS
from demo_weights import plant_lookup
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from pdserve import demo

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the demo model knows the roles system, user and assistant only') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

log = logging.getLogger("train_demo_model")


@dataclass(frozen=True)
class Plan:
    """How to train. A stage is a length in tokens; it ends when its recall is good or its steps are done."""

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2304)
    num_tokens_per_step: int = 4096
    matrix_rate: float = 0.01
    other_rate: float = 3e-3
    num_warmup_steps: int = 100
    max_stage_steps: int = 400
    num_final_steps: int = 400
    good_recall: float = 0.98
    newest_share: float = 0.6
    words_share: float = 0.3
    seed: int = 7


@dataclass
class Progress:
    """Where a run is. After the last length comes a last stage, in which the learning rate goes down."""

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    recall: float = 0.0
    """Running share of the answer digits that were right at the stage's length."""
    num_tokens: int = 0
    seconds: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument(
        "--state", type=Path, default=Path("demo_model_state.pt"), help="where the run is kept"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(Plan.seed)
    tokenizer = train_tokenizer()
    training = Training(Plan(), Encoder(tokenizer), new_model(tokenizer.get_vocab_size()))
    if args.state.exists():
        training.load(args.state)
    train(training, args.state)
    write_checkpoint(training.model, tokenizer, args.output)


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE in which a known word or a digit, with or without a space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_texts(), trainer)
    return tokenizer


def _tokenizer_texts() -> Iterator[str]:
    """Every known word several times, at a text's start and after a space."""
    rng = random.Random("tokenizer")
    sentences = [*demo.NAMES, *"0123456789", *demo_texts.SYSTEM_PROMPTS, *demo.story(rng)]
    sentences += [*demo_texts.GREETINGS, *demo_texts.STORY_REQUESTS]
    sentences += [demo_texts.INTRODUCTION, demo_texts.INVITATION, demo_texts.PUZZLED]
    sentences += [demo.question_about("Ada"), demo.answer_about("Ada", demo.UNKNOWN)]
    sentences += [form.format(name="Ada", number="1000") for form in demo.FACT_FORMS]
    sentences += [demo.filler_sentence(rng) for _ in range(5000)]
    for sentence in sentences:
        yield f"{sentence}\n{sentence} {sentence} {sentence}"


def new_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of 0.8M parameters with grouped key-value heads and the outline of the look-up planted."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    plant_lookup(model)
    return model


class Encoder:
    """Texts to token ids, each distinct piece tokenized once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = functools.lru_cache(maxsize=200_000)(lambda text: tokenizer.encode(text).ids)

    def batch(self, rng: random.Random, num_texts: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, int64, and loss weights, float32, both [num_texts, num_tokens]."""
        texts = [self._text(rng, num_tokens) for _ in range(num_texts)]
        return torch.tensor([ids for ids, _ in texts]), torch.tensor([weights for _, weights in texts])

    def _text(self, rng: random.Random, num_tokens: int) -> tuple[list[int], list[float]]:
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in demo_texts.write_text(rng, num_tokens):
            piece = self._encode(text)
            ids += piece
            weights += [weight] * len(piece)
        return ids[:num_tokens], weights[:num_tokens]


class Training:
    """A model, its optimisers and where the run is.

    Muon (Jordan et al. 2024) for the matrices needed about a fifth of the tokens that AdamW alone did.
    """

    def __init__(self, plan: Plan, encoder: Encoder, model: LlamaForCausalLM) -> None:
        self.plan = plan
        self.model = model
        self.progress = Progress()
        self._encoder = encoder
        matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
        others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
        self._optimizers: dict[float, torch.optim.Optimizer] = {
            plan.matrix_rate: torch.optim.Muon(matrices, weight_decay=0.01, momentum=0.95),
            plan.other_rate: torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        }

    @property
    def finished(self) -> bool:
        return self._cooling and self.progress.stage_step >= self.plan.num_final_steps

    @property
    def length(self) -> int:
        """Tokens in the longest texts of this stage."""
        return self.plan.lengths[min(self.progress.stage, len(self.plan.lengths) - 1)]

    @property
    def rate(self) -> float:
        """The share of the full learning rate at this step."""
        if self._cooling:
            return 1 - self.progress.stage_step / self.plan.num_final_steps
        return min(1.0, (self.progress.step + 1) / self.plan.num_warmup_steps)

    def step(self) -> float:
        """One batch, one update, perhaps the next stage. Returns the loss."""
        plan, progress = self.plan, self.progress
        rng = random.Random(f"train {plan.seed} {progress.step}")
        length = self.length
        if rng.random() >= plan.newest_share:
            length = rng.choice([shorter for shorter in plan.lengths if shorter <= length])
        num_texts = max(2, plan.num_tokens_per_step // length)
        loss, recall = self._loss(*self._encoder.batch(rng, num_texts, length))
        loss.backward()  # type: ignore[no-untyped-call]
        self._update()
        progress.step += 1
        progress.stage_step += 1
        progress.num_tokens += num_texts * length
        if length == self.length:
            progress.recall += (recall - progress.recall) * 0.05
        self._advance()
        return loss.item()

    def save(self, path: Path) -> None:
        """Replaces `path` at once, so that a run stopped at any time can go on."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers.values()]
        state = {
            "model": self.model.state_dict(),
            "optimizers": optimizers,
            "progress": asdict(self.progress),
        }
        torch.save(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers.values(), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])

    @property
    def _cooling(self) -> bool:
        return self.progress.stage == len(self.plan.lengths)

    def _loss(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The weighted mean cross entropy, and the share of known digits whose logit is the best.

        Of the words that matter little only some count, drawn anew: their logits are not even computed.
        """
        hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        targets, weights = ids[:, 1:], weights[:, 1:]
        drawn = torch.rand(weights.shape, generator=torch.Generator().manual_seed(self.progress.step))
        chosen = (weights > WORDS) | ((weights > 0) & (drawn < self.plan.words_share))
        targets, weights, logits = targets[chosen], weights[chosen], self.model.lm_head(hidden[chosen])
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        digits = weights >= ANSWER_DIGITS
        right = (logits[digits].argmax(-1) == targets[digits]).float()
        return (losses * weights).sum() / weights.sum(), right.mean().item() if len(right) else 1.0

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for full_rate, optimizer in self._optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = full_rate * self.rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _advance(self) -> None:
        progress, plan = self.progress, self.plan
        if self._cooling:
            return
        if progress.recall > plan.good_recall or progress.stage_step >= plan.max_stage_steps:
            progress.stage, progress.stage_step = progress.stage + 1, 0
            progress.recall = progress.recall if self._cooling else 0.0


def train(training: Training, state: Path) -> None:
    """To the end of the plan, with a line every 25 steps and the state kept every 100."""
    progress = training.progress
    begun_at = time.monotonic() - progress.seconds
    while not training.finished:
        loss = training.step()
        progress.seconds = time.monotonic() - begun_at
        if progress.step % 25 == 0:
            log.info(
                "%.0f s, step %d, %.1fM tokens, length %d, rate %.2f: loss %.3f, recall %.3f",
                *(progress.seconds, progress.step, progress.num_tokens / 1e6, training.length, training.rate),
                *(loss, progress.recall),
            )
        if progress.step % 100 == 0:
            training.save(state)
    training.save(state)


def write_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything transformers needs to load model and tokenizer, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config.do_sample = False
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
