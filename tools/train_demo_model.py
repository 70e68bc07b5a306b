"""Train the demo model that comes with pdserve, from nothing: words, tokenizer, texts, weights.

    python tools/train_demo_model.py --output pdserve/demo_model

The texts tell numbers of names between sentences that do not matter, and ask for them (`pdserve/demo.py`). Every
text asks for many numbers, and most of the loss lies on the digits of the answers, so attention that looks up a
name forms within minutes. Texts grow from 64 to 2,048 tokens, the next length when the last one is recalled.
A run that was stopped goes on where it was, from `--state`.
"""

import argparse
import functools
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from pdserve import demo

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('the demo model knows the roles system, user and assistant only') }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

GREETINGS = ("Hello!", "Hello.", "Hi!", "Good morning!", "Good evening!", "Hello, who are you?", "Who are you?")
INTRODUCTION = "Hello! I remember numbers. Tell me the number of a name and ask me for it."
STORY_REQUESTS = ("Tell me a story.", "Write a story.", "Tell me a story, please.", "Write something.", "Once upon a time")
SYSTEM_PROMPTS = ("You remember numbers.", "You are a helpful assistant.", "Answer the question.")
PUZZLED = "I do not know that. Let me tell you a story."

ANSWER_DIGITS, ANSWER_WORDS, WORDS, NEWS = 1.0, 0.5, 0.1, 0.02
"""Loss weights: digits that stand earlier in the text, words of answers, other words, digits told for the first time."""

log = logging.getLogger("train_demo_model")


# --- Texts: lists of (piece, weight of its tokens in the loss) ------------------------------------------------


Pieces = list[tuple[str, float]]


class Writer:
    """Writes one text: tells numbers, asks for those told, and keeps count of its tokens."""

    def __init__(self, rng: random.Random, num_tokens: int) -> None:
        self.rng = rng
        self.num_tokens = num_tokens
        self.pieces: Pieces = []
        self.told: dict[str, str] = {}
        self._untold = rng.sample(demo.NAMES, len(demo.NAMES))
        self._separator = "\n" if rng.random() < 0.15 else " "
        self._at_start = True
        self._length = 0

    @property
    def share_written(self) -> float:
        return self._length / self.num_tokens

    def mark(self, token: str, weight: float = 0.0) -> None:
        """A special token; the next sentence follows it without a space."""
        self._add(token, weight, length=1)
        self._at_start = True

    def say(self, sentence: str, weight: float = WORDS) -> None:
        self._add(self._gap() + sentence, weight)

    def tell(self) -> None:
        """A new fact, while there are names."""
        if not self._untold:
            return self.say(demo.filler_sentence(self.rng))
        name = self._untold.pop()
        self.told[name] = demo.draw_number(self.rng, name, held_out=False)
        return self._state(name, NEWS, WORDS)

    def repeat(self) -> None:
        """A fact told before, once more."""
        self._state(self.rng.choice(list(self.told)), ANSWER_DIGITS, WORDS)

    def passage(self, until_share: float, fact_share: float) -> None:
        """Facts and fillers, at least one fact."""
        self.tell()
        while self.share_written < until_share:
            if self.rng.random() < fact_share:
                self.tell()
            else:
                self.say(demo.filler_sentence(self.rng))

    def ask(self) -> str:
        name = self.rng.choice(list(self.told))
        self.say(demo.question_about(name))
        return name

    def answer(self, name: str) -> None:
        before, after = demo.answer_about(name, "#").split("#")
        self._number(before, self.told[name], after, ANSWER_DIGITS, ANSWER_WORDS)

    def _state(self, name: str, digits_weight: float, words_weight: float) -> None:
        before, after = demo.fact_sentence(self.rng, name, "#").split("#")
        self._number(before, self.told[name], after, digits_weight, words_weight)

    def _number(self, before: str, number: str, after: str, digits_weight: float, words_weight: float) -> None:
        self._add(self._gap() + before.rstrip(), words_weight)
        self._add(" " + number, digits_weight)
        self._add(after, words_weight)

    def _gap(self) -> str:
        return "" if self._at_start else self._separator

    def _add(self, text: str, weight: float, length: int | None = None) -> None:
        self.pieces.append((text, weight))
        self._length += demo.count_tokens(text) if length is None else length
        self._at_start = False


def write_text(rng: random.Random, num_tokens: int) -> Pieces:
    """One text of at least `num_tokens` tokens."""
    kind = rng.random()
    if kind < 0.06:
        return _small_talk(rng, num_tokens)
    writer = Writer(rng, num_tokens)
    _chat(writer) if kind < 0.6 else _prose(writer)
    return writer.pieces


def _chat(writer: Writer) -> None:
    """A user tells facts and asks; then more questions, now and then with another fact."""
    rng = writer.rng
    if rng.random() < 0.2:
        writer.mark(SYSTEM)
        writer.say(rng.choice(SYSTEM_PROMPTS))
        writer.mark(END)
    writer.mark(USER)
    writer.passage(rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.9))
    while True:
        name = writer.ask()
        writer.mark(END)
        writer.mark(ASSISTANT)
        writer.answer(name)
        writer.mark(END, ANSWER_WORDS)
        if writer.share_written >= 1:
            return
        writer.mark(USER)
        if rng.random() < 0.1:
            writer.tell()


def _prose(writer: Writer) -> None:
    """Facts and fillers; then facts once more, and questions with answers."""
    rng = writer.rng
    fact_share, question_share = rng.uniform(0.2, 0.9), rng.random()
    writer.passage(rng.uniform(0.2, 0.8), fact_share)
    while writer.share_written < 1:
        if rng.random() > max(fact_share, 0.6):
            writer.say(demo.filler_sentence(rng))
        elif rng.random() < question_share:
            writer.answer(writer.ask())
        else:
            writer.repeat()


def _small_talk(rng: random.Random, num_tokens: int) -> Pieces:
    """Greetings, requests for stories and words the model does not know, each with its reply."""
    writer = Writer(rng, num_tokens)
    while writer.share_written < 1:
        writer.mark(USER)
        kind = rng.randrange(3)
        writer.say((rng.choice(GREETINGS), rng.choice(STORY_REQUESTS), _strange_words(rng))[kind])
        writer.mark(END)
        writer.mark(ASSISTANT)
        if kind != 1:
            writer.say((INTRODUCTION, "", PUZZLED)[kind], ANSWER_WORDS)
        if kind != 0:
            for _ in range(rng.randint(2, 4)):
                writer.say(demo.filler_sentence(rng))
        writer.mark(END, ANSWER_WORDS)
    return writer.pieces


def _strange_words(rng: random.Random) -> str:
    words = ("".join(rng.choices("eeaaiioutnshrdlcmfpgwybvk", k=rng.randint(2, 9))) for _ in range(rng.randint(1, 8)))
    return " ".join(words).capitalize() + rng.choice(".?!")


# --- Tokenizer ------------------------------------------------------------------------------------------------


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE in which each known word, with or without a space before it, and each digit is one token."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
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
    sentences = [*demo.NAMES, *"0123456789", *GREETINGS, *STORY_REQUESTS, *SYSTEM_PROMPTS, INTRODUCTION, PUZZLED]
    sentences += [demo.filler_sentence(rng) for _ in range(5000)]
    sentences += [demo.fact_sentence(rng, "Ada", "1000") for _ in range(50)] + [demo.question_about("Ada")]
    for sentence in sentences:
        yield f"{sentence}\n{sentence} {sentence} {sentence}"


class Encoder:
    """Pieces to token ids, each distinct piece tokenized once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = functools.lru_cache(maxsize=200_000)(lambda text: tokenizer.encode(text).ids)

    def encode(self, pieces: Pieces, num_tokens: int) -> tuple[list[int], list[float]]:
        """The first `num_tokens` ids and the loss weight of each."""
        ids: list[int] = []
        weights: list[float] = []
        for text, weight in pieces:
            piece = self._encode(text)
            ids += piece
            weights += [weight] * len(piece)
        return ids[:num_tokens], weights[:num_tokens]

    def batch(self, rng: random.Random, num_texts: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids, int64, and weights, float32, both [num_texts, num_tokens]."""
        texts = [self.encode(write_text(rng, num_tokens), num_tokens) for _ in range(num_texts)]
        return torch.tensor([ids for ids, _ in texts]), torch.tensor([weights for _, weights in texts])


# --- Model and training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to train. A stage is a length in tokens; it lasts until its recall is good, or its time is up."""

    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    tokens_per_step: int = 4096
    learning_rate: float = 2e-3
    num_warmup_steps: int = 200
    good_recall: float = 0.98
    newest_share: float = 0.6
    seed: int = 7


@dataclass
class Progress:
    """Where a run is. `recall` is the running share of answer digits right at the newest length."""

    step: int = 0
    stage: int = 0
    recall: float = 0.0
    num_tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def new_model(vocab_size: int, num_layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL_TOKENS.index(END),
        pad_token_id=SPECIAL_TOKENS.index(PAD),
        attn_implementation="sdpa",
        initializer_range=0.04,
    )
    return LlamaForCausalLM(config)


class Training:
    """A model, its optimiser and where the run is; everything that a checkpoint keeps."""

    def __init__(self, plan: Plan, encoder: Encoder, model: LlamaForCausalLM) -> None:
        self.plan = plan
        self.encoder = encoder
        self.model = model
        self.progress = Progress()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        plain = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.98), fused=True)

    def step(self, rate: float) -> float:
        """One batch at `rate` times the learning rate. Returns the loss."""
        plan, progress = self.plan, self.progress
        rng = random.Random(f"train {plan.seed} {progress.step}")
        newest = plan.lengths[progress.stage]
        length = newest if rng.random() < plan.newest_share else rng.choice(plan.lengths[: progress.stage + 1])
        ids, weights = self.encoder.batch(rng, max(1, plan.tokens_per_step // length), length)
        loss, recall = self._loss(ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate * min(1.0, (progress.step + 1) / plan.num_warmup_steps)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        progress.num_tokens += ids.numel()
        if length == newest:
            progress.recall += (recall - progress.recall) * 0.05
        return loss.item()

    def _loss(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
        """The weighted mean cross entropy, and the share of answer digits whose best logit is right."""
        hidden = self.model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        targets, weights = ids[:, 1:], weights[:, 1:]
        chosen = weights > 0
        logits = self.model.lm_head(hidden[chosen])
        targets, weights = targets[chosen], weights[chosen]
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        digits = weights == ANSWER_DIGITS
        right = logits[digits].argmax(-1) == targets[digits]
        return (losses * weights).sum() / weights.sum(), right.float().mean().item() if digits.any() else 1.0


def train(training: Training, state: Path, max_seconds: float, num_final_steps: int) -> None:
    """Train through all lengths, then lower the learning rate to nothing over `num_final_steps`."""
    plan, progress = training.plan, training.progress
    begun_at = time.monotonic() - progress.seconds
    while progress.stage < len(plan.lengths) and progress.seconds < max_seconds:
        loss = training.step(1.0)
        progress.seconds = time.monotonic() - begun_at
        if progress.step % 50 == 0:
            report(training, loss, 1.0)
        if progress.step % 200 == 0:
            save_state(training, state)
        if progress.recall > plan.good_recall:
            if progress.stage == len(plan.lengths) - 1:
                break
            progress.stage, progress.recall = progress.stage + 1, 0.0
            save_state(training, state)
            log.info("now %d tokens", plan.lengths[progress.stage])
    for remaining in range(num_final_steps, 0, -1):
        rate = remaining / num_final_steps
        loss = training.step(rate)
        progress.seconds = time.monotonic() - begun_at
        if progress.step % 50 == 0:
            report(training, loss, rate)
    save_state(training, state)


def report(training: Training, loss: float, rate: float) -> None:
    p = training.progress
    length = training.plan.lengths[p.stage]
    log.info(
        "%6.0f s step %d length %d loss %.3f recall %.3f rate %.2f tokens %.1fM", p.seconds, p.step, length, loss, p.recall, rate, p.num_tokens / 1e6
    )


def save_state(training: Training, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {"model": training.model.state_dict(), "optimizer": training.optimizer.state_dict(), "progress": vars(training.progress)},
        temporary,
    )
    temporary.replace(path)


def load_state(training: Training, path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    training.model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    training.progress = Progress(**saved["progress"])


# --- Checkpoint -----------------------------------------------------------------------------------------------


def write_checkpoint(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Everything transformers needs to load model and tokenizer, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.generation_config.update(do_sample=False, temperature=None, top_p=None)
    half.save_pretrained(folder)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, default=Path("demo_model_state.pt"), help="where the run is kept")
    parser.add_argument("--max-hours", type=float, default=1.5, help="before the learning rate goes down")
    parser.add_argument("--final-steps", type=int, default=600, help="steps while it goes down")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--num-layers", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=Plan.learning_rate)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.manual_seed(Plan.seed)
    tokenizer = train_tokenizer()
    plan = Plan(learning_rate=args.learning_rate)
    training = Training(plan, Encoder(tokenizer), new_model(tokenizer.get_vocab_size(), args.num_layers))
    if args.state.exists():
        load_state(training, args.state)
    log.info("vocab %d parameters %d", tokenizer.get_vocab_size(), training.model.num_parameters())
    train(training, args.state, args.max_hours * 3600, args.final_steps)
    write_checkpoint(training.model, tokenizer, args.output)


if __name__ == "__main__":
    main()
