"""From output tokens to the text that a client sees, as the tokens come.

Two things hold text back: a character that is not complete yet, and text that may turn out to be the
start of a stop string. Nothing else does. What comes out does not depend on how the tokens were grouped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from router.text import TextModel

CONTEXT_TOKENS = 4
"""How much of the end of a prompt is needed to continue its text."""

_REPLACEMENT = "\ufffd"
_MAX_PENDING_TOKENS = 3
"""A character has at most four bytes: three tokens can be waiting for the one that completes it."""
_MAX_HELD_TOKENS = 8


class Detokenizer:
    """Text of a growing list of tokens.

    Decoding is not a sum over tokens: a character may be spread over several, and many decoders strip
    the space in front of the first one. So a window is decoded, whose front part has been given out:

        ids   [ context, given out | held back: may end within a character ]
              0                    read                                  len(ids)

    (`tokenizers.decoders.DecodeStream` has no flush, and fails on byte tokens that are no text.)
    """

    def __init__(self, text_model: TextModel, prompt_ids: Sequence[int]):
        """The text continues that of `prompt_ids`, of which only the end is looked at."""
        self._decode = text_model.decode_ids
        self._special_ids = text_model.special_ids
        self._ids: list[int] = []
        self._read = 0
        self._num_given = 0  # characters of the window that have been given out
        self._start_after(prompt_ids)

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that is certain now and was not before; "" while a character is incomplete."""
        self._ids += [token_id for token_id in token_ids if token_id not in self._special_ids]
        text = self._decode(self._ids)
        if not text.endswith(_REPLACEMENT):
            return self._release(text, len(self._ids))
        if len(self._ids) - self._read <= _MAX_HELD_TOKENS:
            return ""
        # The bytes are no text at all; only the last few may still become a character.
        end = len(self._ids) - _MAX_PENDING_TOKENS
        return self._release(self._decode(self._ids[:end]), end)

    def flush(self) -> str:
        """What was held back, when no more tokens come: incomplete characters as U+FFFD."""
        return self._release(self._decode(self._ids), len(self._ids))

    def _start_after(self, prompt_ids: Sequence[int]) -> None:
        """Use the end of the prompt as context, unless it ends within a character."""
        tail = [token_id for token_id in prompt_ids[-CONTEXT_TOKENS:] if token_id not in self._special_ids]
        text = self._decode(tail)
        if text.endswith(_REPLACEMENT):
            return
        self._ids, self._read, self._num_given = tail, len(tail), len(text)

    def _release(self, text: str, end: int) -> str:
        """Give out `text`, the text of ids[:end], and make what was new in it the context."""
        fresh = text[self._num_given :]
        if end > self._read:
            context = self._ids[self._read : end]
            self._ids = context + self._ids[end:]
            self._read = len(context)
            self._num_given = len(self._decode(context))
        return fresh


@dataclass(frozen=True, slots=True)
class StopScan:
    """`text` may be given out; `found` says that a stop string followed it."""

    text: str
    found: bool


class StopStrings:
    """Finds the stop string that is complete first; of two that end together, the longer one."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def add(self, text: str) -> StopScan:
        held = self._held + text
        found = [(held.find(stop) + len(stop), held.find(stop)) for stop in self._stops if stop in held]
        if found:
            _, start = min(found)
            self._held = ""
            return StopScan(held[:start], found=True)
        keep = self._possible_start(held)
        self._held = held[len(held) - keep :]
        return StopScan(held[: len(held) - keep], found=False)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string may start with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What `OutputText.add` makes of new tokens."""

    text: str
    num_tokens: int
    """How many of the tokens belong to the output; the others came after a stop string."""
    stopped: bool = False
    """A stop string was found."""
    offsets: tuple[int, ...] = ()
    """Where each token starts in the whole text, in characters; only when asked for."""


class OutputText:
    """The text of one choice."""

    def __init__(
        self,
        text_model: TextModel,
        prompt_ids: Sequence[int],
        stops: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        with_offsets: bool = False,
    ):
        """Stop strings count only in text of tokens after the first `min_tokens`."""
        self._detokenizer = Detokenizer(text_model, prompt_ids)
        self._stops = StopStrings(stops)
        self._min_tokens = min_tokens
        self._with_offsets = with_offsets
        self._token_by_token = bool(stops) or with_offsets
        self._num_tokens = 0
        self._num_characters = 0  # decoded so far, stop string or not

    def add(
        self, token_ids: Sequence[int], *, last: bool = False, ends_with_stop_token: bool = False
    ) -> TextPiece:
        """Take new tokens. `last` gives out what is held back; a stop token at the end has no text."""
        visible = token_ids[:-1] if ends_with_stop_token else token_ids
        piece = self._add_each(visible) if self._token_by_token else self._add_all(visible)
        if piece.stopped:
            return piece
        offsets = piece.offsets
        if self._with_offsets and ends_with_stop_token:
            offsets += (self._num_characters,)
        rest = self._finish() if last else StopScan("", found=False)
        return TextPiece(piece.text + rest.text, len(token_ids), rest.found, offsets)

    def _add_all(self, token_ids: Sequence[int]) -> TextPiece:
        return TextPiece(self._detokenizer.add(token_ids), len(token_ids))

    def _add_each(self, token_ids: Sequence[int]) -> TextPiece:
        text = ""
        offsets: list[int] = []
        for token_id in token_ids:
            offsets.append(self._num_characters)
            scan = self._add_one(token_id)
            text += scan.text
            if scan.found:
                return TextPiece(text, len(offsets), True, self._kept(offsets))
        return TextPiece(text, len(offsets), False, self._kept(offsets))

    def _add_one(self, token_id: int) -> StopScan:
        text = self._detokenizer.add((token_id,))
        self._num_tokens += 1
        self._num_characters += len(text)
        if self._num_tokens <= self._min_tokens:
            return StopScan(text, found=False)
        return self._stops.add(text)

    def _finish(self) -> StopScan:
        scan = self._stops.add(self._detokenizer.flush())
        return scan if scan.found else StopScan(scan.text + self._stops.flush(), found=False)

    def _kept(self, offsets: list[int]) -> tuple[int, ...]:
        return tuple(offsets) if self._with_offsets else ()
