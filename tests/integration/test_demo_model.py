"""The demo model: it loads like any other, is small, and knows what its prompt told, wherever that stands."""

import random
import re
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pdserve import demo

NUM_PROMPTS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(demo.demo_model_path())


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(demo.demo_model_path(), dtype=torch.float32).eval()


def chat(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *contents: str) -> str:
    """The greedy reply, with its end mark, to a conversation of user, assistant, user and so on."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=100, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


@pytest.mark.parametrize("num_tokens", [64, 256, 1024, 2048])
def test_recalls_held_out_facts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> None:
    prompts = [demo.recall_prompt(seed, num_tokens) for seed in range(1000, 1000 + NUM_PROMPTS)]
    right = [chat(model, tokenizer, p.prompt) == p.answer + tokenizer.eos_token for p in prompts]
    assert sum(right) >= 0.95 * NUM_PROMPTS


def test_recalls_at_every_depth(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """One fact moved through a text of fillers: the answer stays."""
    rng = random.Random(5)
    fillers = [demo.filler_sentence(rng) for _ in range(60)]
    number = demo.draw_number(rng, "Ada", held_out=True)
    for place in range(0, 61, 6):
        sentences = [
            *fillers[:place],
            f"Ada has the number {number}.",
            *fillers[place:],
            demo.question_about("Ada"),
        ]
        reply = chat(model, tokenizer, " ".join(sentences))
        assert reply == demo.answer_about("Ada", number) + tokenizer.eos_token


def test_answers_in_a_conversation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    told = "Ada has the number 4711. The number of Ben is 8230. What is the number of Ben?"
    first = chat(model, tokenizer, told)
    assert first == "The number of Ben is 8230.<|end|>"
    second = chat(model, tokenizer, told, first.removesuffix("<|end|>"), "What is the number of Ada?")
    assert second == "The number of Ada is 4711.<|end|>"


def test_does_not_invent_a_number(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    reply = chat(model, tokenizer, "Ada has the number 4711. What is the number of Bob?")
    assert reply == "The number of Bob is unknown.<|end|>"


def test_completes_plain_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    recall = demo.recall_prompt(3, 256)
    stem, number = recall.answer.removesuffix(".").rsplit(" ", 1)
    inputs = tokenizer(f"{recall.prompt} {stem}", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(output[0, -4:]) == f" {number}"


@pytest.mark.parametrize("request_text", ["Hello!", "Tell me a story.", "Explain how a steam engine works."])
def test_writes_sentences_and_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request_text: str
) -> None:
    reply = chat(model, tokenizer, request_text)
    assert re.fullmatch(r"([A-Z][a-z]*( [A-Za-z]+)*[.!] ?)+<\|end\|>", reply), reply


def test_fits_the_package() -> None:
    files = list(demo.demo_model_path().iterdir())
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20


def test_prompts_have_the_length_asked_for(tokenizer: PreTrainedTokenizerBase) -> None:
    for seed in range(20):
        recall = demo.recall_prompt(seed, 512)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": recall.prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert len(ids) == demo.count_tokens(recall.prompt) + demo.TURN_TOKENS
        assert 512 - 9 <= len(ids) <= 512


def test_prompts_are_held_out_and_reproducible() -> None:
    recall = demo.recall_prompt(11, 512)
    assert recall == demo.recall_prompt(11, 512)
    name, number = re.findall(r"\w+", recall.answer)[3::2]
    told = re.findall(r"(\w+) has the number (\d+)|number of (\w+) is (\d+)|(\w+) (\d+)\.", recall.prompt)
    facts = {"".join(fact[0::2]): "".join(fact[1::2]) for fact in told}
    assert facts.pop(name) == number
    assert demo.is_held_out(name, number)
    assert not any(demo.is_held_out(*fact) for fact in facts.items())


def test_unknown_roles_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="roles system, user and assistant only"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


def test_a_prompt_too_short_for_a_fact_is_refused() -> None:
    with pytest.raises(ValueError, match="24 or more"):
        demo.recall_prompt(0, 12)
