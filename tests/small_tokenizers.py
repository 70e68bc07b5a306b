"""Small tokenisers of the two kinds there are: byte-level, and sentencepiece-like with byte fallback."""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "prefill computes the prompt and decode writes the answer",
    "hello world, hello tokens; one two three four five six seven",
    "the number of Alice is 1234 and the number of Bob is 567",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}"
    "{{ raise_exception('system messages come first') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_level_tokenizer(vocab_size: int = 400) -> Tokenizer:
    """As GPT-2, Llama 3 or Qwen have it: every byte sequence is text of some tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_tokenizer(vocab_size: int = 420) -> Tokenizer:
    """As Llama 2, Mistral or Gemma have it: spaces as U+2581, unknown characters as bytes, <s> in front."""
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "\u2581")
    learned.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581*[^\u2581]+"), "isolated")
    learned.train_from_iterator(
        [f"\u2581{line}" for line in CORPUS],
        trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False),
    )
    state = json.loads(learned.to_str())["model"]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {
        token: rank for rank, token in enumerate([*first, *sorted(state["vocab"], key=state["vocab"].get)])
    }
    merges = [tuple(pair) for pair in state["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def save_model_folder(folder: Path, tokenizer: Tokenizer, **config: object) -> Path:
    """Write what a model folder has for text."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}), encoding="utf-8"
    )
    return folder


def save_chat_folder(folder: Path) -> Path:
    """A byte-level tokeniser with a chat template, as most chat models have."""
    return save_model_folder(
        folder, byte_level_tokenizer(), bos_token="<|bos|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )
