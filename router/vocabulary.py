"""What single tokens stand for, in bytes.

Tokenisers write their tokens in one of a few notations: byte-level ones map each byte to a printable
character (GPT-2's table), sentencepiece-like ones write a space as U+2581 and rare bytes as ``<0xNN>``.
"""

import json
import re
from functools import cache
from typing import Any

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "\u2581"


class Vocabulary:
    """Bytes of single tokens of one tokeniser."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._steps = _decoder_steps(tokenizer)
        self.special_ids = frozenset(
            token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that the tokeniser does not know."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        return b"" if token is None else self._plain_token_bytes(token)

    def _plain_token_bytes(self, token: str) -> bytes:
        if "ByteLevel" in self._steps:
            table = _byte_of_character()
            return bytes(table[character] for character in token if character in table)
        byte = _BYTE_TOKEN.fullmatch(token) if "ByteFallback" in self._steps else None
        if byte:
            return bytes([int(byte[1], 16)])
        if "Metaspace" in self._steps or _SPACE_MARK in self._steps:
            token = token.replace(_SPACE_MARK, " ")
        return token.encode()


def _decoder_steps(tokenizer: Tokenizer) -> frozenset[str]:
    """The kinds of the decoder's steps, and the patterns that it replaces."""
    if tokenizer.decoder is None:
        return frozenset()
    state = json.loads(tokenizer.decoder.__getstate__())
    return frozenset(name for step in _flatten(state) for name in (step["type"], _replaced(step)) if name)


def _flatten(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [step for inner in state.get("decoders", []) for step in _flatten(inner)] or [state]


def _replaced(step: dict[str, Any]) -> str:
    pattern = step.get("pattern", {})
    return str(pattern.get("String", "")) if isinstance(pattern, dict) else ""


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}
