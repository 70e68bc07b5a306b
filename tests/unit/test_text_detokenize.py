"""Output tokens become text: never half a character, never a stop string, the same however grouped."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdserve.contract.tokens import unpack_tokens
from router.detokenize import Detokenizer, OutputText, StopStrings
from router.text import TextModel
from tests.small_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer

BYTE_LEVEL = TextModel(byte_level_tokenizer())
SENTENCEPIECE = TextModel(sentencepiece_tokenizer(), special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
PROMPT = "the answer:"

texts = st.text(st.sampled_from("the lazy dog, \n😀é漢字👩‍👩‍👧ß"), max_size=30)


def stream(model: TextModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(model, prompt_ids)
    return [*(detokenizer.add([token_id]) for token_id in token_ids), detokenizer.flush()]


@settings(max_examples=200)
@given(texts)
@pytest.mark.parametrize("model", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte-level", "sentencepiece"])
def test_the_pieces_add_up_to_the_text_after_the_prompt(model: TextModel, text: str) -> None:
    prompt_ids = unpack_tokens(model.encode(PROMPT))
    token_ids = unpack_tokens(model.encode(text, add_special_tokens=False))
    whole = model.decode_ids(prompt_ids + token_ids)
    pieces = stream(model, prompt_ids, token_ids)
    assert PROMPT + "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces)


@settings(max_examples=300)
@given(st.lists(st.integers(5, 399), max_size=60))
def test_byte_level_output_equals_decoding_it_whole_even_when_it_is_no_text(token_ids: list[int]) -> None:
    assert "".join(stream(BYTE_LEVEL, [], token_ids)) == BYTE_LEVEL.decode_ids(token_ids)


def test_an_emoji_over_four_tokens_comes_out_whole() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("😀"))
    assert len(token_ids) == 4
    assert stream(BYTE_LEVEL, [], token_ids) == ["", "", "", "😀", ""]


def test_characters_of_byte_tokens_come_out_one_by_one() -> None:
    byte_ids = [3 + byte for byte in "漢字".encode()]
    pieces = stream(SENTENCEPIECE, [3], byte_ids)
    assert pieces == ["", "", "漢", "", "", "字", ""]


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("😀"))[:2]
    assert stream(BYTE_LEVEL, [], token_ids) == ["", "", BYTE_LEVEL.decode_ids(token_ids)]


def test_endless_bytes_that_are_no_text_do_flow() -> None:
    continuation = BYTE_LEVEL.encode("😀")[-4:]
    token_ids = unpack_tokens(continuation) * 200
    pieces = stream(BYTE_LEVEL, [], token_ids)
    assert "".join(pieces) == "\ufffd" * 200
    assert len("".join(pieces[:100])) > 80


def test_the_space_in_front_of_the_first_word_is_kept() -> None:
    prompt_ids = unpack_tokens(SENTENCEPIECE.encode("hello"))
    token_ids = unpack_tokens(SENTENCEPIECE.encode("world", add_special_tokens=False))
    assert "".join(stream(SENTENCEPIECE, prompt_ids, token_ids)) == " world"


def test_special_tokens_have_no_text() -> None:
    word = unpack_tokens(SENTENCEPIECE.encode("fox", add_special_tokens=False))
    assert "".join(stream(SENTENCEPIECE, [3], [*word, 2, 2, *word])) == " fox fox"


def test_a_prompt_that_ends_within_a_character_does_not_swallow_the_output() -> None:
    first, *rest = unpack_tokens(BYTE_LEVEL.encode("😀"))
    assert "".join(stream(BYTE_LEVEL, [first], rest)) == BYTE_LEVEL.decode_ids(rest)


def stop_by_characters(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Character by character: what comes before the first stop string that is complete."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


@settings(max_examples=500)
@given(
    st.text("ab", max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(
    text: str, stops: list[str], rng: random.Random
) -> None:
    finder = StopStrings(stops)
    given_out, found, start = "", False, 0
    while start < len(text) and not found:
        end = start + rng.randint(1, 5)
        scan = finder.add(text[start:end])
        given_out, found, start = given_out + scan.text, scan.found, end
    if not found:
        given_out += finder.flush()
    assert (given_out, found) == stop_by_characters(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["\nUser:", "END"])
    assert finder.add("hello\nU").text == "hello"
    assert finder.add("n").text == "\nUn"
    assert finder.add("E").text == ""
    assert finder.flush() == "E"


def output(stops: Sequence[str] = (), min_tokens: int = 0) -> OutputText:
    return OutputText(BYTE_LEVEL, [], stops, min_tokens=min_tokens, with_offsets=True)


def test_a_stop_string_over_tokens_ends_the_output_at_the_token_that_completes_it() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("hello world and more"))
    pieces = [BYTE_LEVEL.decode_ids([token_id]) for token_id in token_ids]
    piece = output(["lo wor"]).add(token_ids)
    needed = next(count for count in range(len(pieces)) if "lo wor" in "".join(pieces[:count]))
    assert (piece.text, piece.stopped, piece.num_tokens) == ("hel", True, needed)
    assert len(piece.offsets) == needed


def test_offsets_are_where_tokens_start() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("hello 😀 fox"))
    piece = output().add(token_ids, last=True)
    assert piece.text == "hello 😀 fox"
    before = [BYTE_LEVEL.decode_ids(token_ids[:count]).rstrip("\ufffd") for count in range(len(token_ids))]
    assert list(piece.offsets) == [len(text) for text in before]


def test_a_stop_token_has_an_offset_and_no_text() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("hello"))
    word = BYTE_LEVEL.encode("!")
    piece = output().add([*token_ids, *unpack_tokens(word)], last=True, ends_with_stop_token=True)
    assert (piece.text, piece.num_tokens, piece.offsets[-1]) == ("hello", len(token_ids) + 1, 5)


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("aaaa"))
    piece = output(["a"], min_tokens=2).add(token_ids)
    assert (piece.text, piece.stopped, piece.num_tokens) == ("aa", True, 3)


def test_held_text_comes_out_at_the_end() -> None:
    token_ids = unpack_tokens(BYTE_LEVEL.encode("hello wo"))
    piece = output([" world"]).add(token_ids, last=True)
    assert (piece.text, piece.stopped) == ("hello wo", False)


def test_without_a_tokeniser_there_is_no_text() -> None:
    piece = OutputText(TextModel(None), [1], ["x"]).add([1, 2, 3], last=True)
    assert (piece.text, piece.num_tokens, piece.stopped) == ("", 3, False)
