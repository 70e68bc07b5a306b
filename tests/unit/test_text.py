"""The tokeniser, the chat template and single tokens, against transformers' own."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pdserve.contract.errors import ConfigError, InvalidRequest
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from router.text import TextModel
from tests.small_tokenizers import (
    CHAT_TEMPLATE,
    byte_level_tokenizer,
    save_chat_folder,
    save_model_folder,
    sentencepiece_tokenizer,
)

TEXTS = ["hello world", " the fox", "zażółć 😀", "", "a\n\nb", "<|end|>", "one  two"]
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": " hello ", "name": None},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "the number of Bob?"},
]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_folder(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentencepiece")
    return save_model_folder(folder, sentencepiece_tokenizer(), bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_those_of_transformers(chat_folder: Path, sentencepiece_folder: Path, text: str) -> None:
    for folder in (chat_folder, sentencepiece_folder):
        expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        assert unpack_tokens(TextModel.load(folder).encode(text)) == expected


def test_chats_are_rendered_and_tokenised_as_transformers_does(chat_folder: Path) -> None:
    reference = AutoTokenizer.from_pretrained(chat_folder)
    model = TextModel.load(chat_folder)
    assert model.render_chat(CHAT) == reference.apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True
    )
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert unpack_tokens(model.encode_chat(CHAT)) == expected


def test_the_template_file_wins_over_the_config(tmp_path: Path) -> None:
    save_chat_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert TextModel.load(tmp_path).render_chat(CHAT) == "be kind!"


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    save_model_folder(tmp_path, byte_level_tokenizer(), chat_template=templates)
    assert TextModel.load(tmp_path).render_chat(CHAT) == "yes"


def test_named_tokens_may_be_objects(tmp_path: Path) -> None:
    bos = {"content": "<|bos|>", "lstrip": False, "__type": "AddedToken"}
    save_model_folder(tmp_path, byte_level_tokenizer(), bos_token=bos, chat_template=CHAT_TEMPLATE)
    assert TextModel.load(tmp_path).render_chat(CHAT[:1]).startswith("<|bos|>")


def test_a_template_that_refuses_is_the_clients_error(chat_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="system messages come first") as caught:
        TextModel.load(chat_folder).render_chat([CHAT[1], CHAT[0]])
    assert caught.value.info.param == "messages"


def test_a_model_without_a_chat_template_says_so(sentencepiece_folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        TextModel.load(sentencepiece_folder).render_chat(CHAT)


def test_a_folder_without_a_tokeniser_takes_ids_only(tmp_path: Path) -> None:
    model = TextModel.load(tmp_path)
    assert not model.has_tokenizer
    assert model.decode(pack_tokens([1, 2])) == ""
    assert model.token_bytes(7) == b"token_id:7"
    for ask in (lambda: model.encode("hello"), lambda: model.render_chat(CHAT)):
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            ask()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_file_stops_the_start(tmp_path: Path, name: str) -> None:
    save_chat_folder(tmp_path)
    (tmp_path / name).write_text("{ not json")
    with pytest.raises(ConfigError, match=name):
        TextModel.load(tmp_path)


@pytest.mark.parametrize("text", ["hello world 😀 zażółć", "the  fox\n"])
def test_the_bytes_of_tokens_add_up_to_the_text(
    chat_folder: Path, sentencepiece_folder: Path, text: str
) -> None:
    for folder, expected in ((chat_folder, text), (sentencepiece_folder, "<s> " + text)):
        model = TextModel.load(folder)
        assert b"".join(map(model.token_bytes, unpack_tokens(model.encode(text)))) == expected.encode()


def test_unknown_ids_stand_for_nothing(chat_folder: Path) -> None:
    assert TextModel.load(chat_folder).token_bytes(100_000) == b""


def test_text_needs_no_torch(chat_folder: Path) -> None:
    code = (
        "import sys; from router.http_api import create_app; from router.text import TextModel\n"
        f"m = TextModel.load({str(chat_folder)!r}); m.encode_chat([{{'role': 'user', 'content': 'x'}}])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'ray'}, loaded & {'torch', 'ray'}\n"
        "assert 'pdserve.engine' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
