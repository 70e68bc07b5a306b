"""Text at the router: chat template, tokeniser, and what a token looks like as text.

Uses `tokenizers` and the chat-template renderer of transformers, neither of which imports torch.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from pdserve.contract.errors import ConfigError, InvalidRequest
from pdserve.contract.tokens import TokenBytes, pack_tokens, unpack_tokens
from router.vocabulary import Vocabulary

_NO_TOKENIZER = (
    "this model has no tokenizer (no tokenizer.json in its folder), so it takes no text: "
    "send token ids as 'prompt', and set 'return_token_ids' to read the answer"
)
_NO_CHAT_TEMPLATE = (
    "this model has no chat template (neither chat_template.jinja nor 'chat_template' in "
    "tokenizer_config.json): use /v1/completions"
)

_TEMPLATE_MISTAKES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
"""What a template's own operations raise on messages that it was not written for."""


class TextModel:
    """The tokeniser and chat template of one model folder. A folder without a tokeniser is legal: its
    model is served by token ids alone."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ):
        """`special_tokens` are those by name (`bos_token` -> "<s>"), as chat templates use them."""
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._special_tokens = dict(special_tokens or {})
        if tokenizer is not None:
            _prepare(tokenizer, self._special_tokens.values())

    @classmethod
    def load(cls, folder: Path | str) -> "TextModel":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja of a local model folder.

        Raises ConfigError when a file is there and cannot be used.
        """
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json")
        return cls(_read_tokenizer(folder), _read_chat_template(folder, config), _named_tokens(config))

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> TokenBytes:
        """Tokenise a prompt. Special tokens are added where the tokeniser's own post-processor says so,
        as transformers does it."""
        return pack_tokens(self._require().encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> TokenBytes:
        """Render a conversation up to where the assistant speaks, and tokenise it."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The conversation as the model's chat template writes it. Raises InvalidRequest with the
        template's own words when it refuses the conversation."""
        self._require()
        if self._chat_template is None:
            raise InvalidRequest(_NO_CHAT_TEMPLATE, param="messages")
        present = [
            {key: value for key, value in message.items() if value is not None} for message in messages
        ]
        try:
            rendered, _ = render_jinja_template(
                conversations=[present],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except (TemplateError, *_TEMPLATE_MISTAKES) as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise InvalidRequest(message, param="messages") from error
        return str(rendered[0])

    def decode(self, tokens: TokenBytes) -> str:
        """The text of `tokens`, special tokens left out; "" without a tokeniser."""
        return self.decode_ids(unpack_tokens(tokens))

    def decode_ids(self, token_ids: Sequence[int]) -> str:
        """As `decode`, of ids."""
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for, which may be part of a character. A special token
        stands for its name; without a tokeniser every token is named ``token_id:N``."""
        if self._tokenizer is None:
            return b"token_id:%d" % token_id
        return self._vocabulary.token_bytes(token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that never show in text."""
        return self._vocabulary.special_ids if self._tokenizer is not None else frozenset()

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._require())

    def _require(self) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequest(_NO_TOKENIZER, param="prompt")
        return self._tokenizer


def _prepare(tokenizer: Tokenizer, special_tokens: Any) -> None:
    """Prompts are never cut or padded, and every named special token is known as special."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens(
        [token for token in special_tokens if tokenizer.token_to_id(token) is not None]
    )


def _read_tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every bad file
        raise ConfigError(f"{path} is not a tokenizer that can be used: {error}") from error


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        by_name = {entry["name"]: entry["template"] for entry in template}
        template = by_name.get("default")
    return template


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, written either as a string or as an added token's object."""
    named = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            named[key] = content
    return named


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object")
    return content
