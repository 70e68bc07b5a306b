"""The model that comes with pdserve, and prompts whose right answer is known.

The demo model reads English sentences, some of which tell somebody's number, and answers what the number of
a name is, wherever in the prompt it was told. So a lost, wrong or misplaced block of the KV cache shows as a
wrong answer. Names, sentences and prompts are made here, for its training (`tools/train_demo_model.py`), for
tests and for benchmarks alike; everything is a pure function of the random generator handed in or of a seed.
"""

import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ada Alan Alice Alma Amir Anna Anne Anton Astrid Aydin Basil Bella Ben Berta Bob Bruno Carla Carlos
    Cecil Charlie Chen Clara Cora Dana Daniel Dario David Delia Diego Dora Edgar Edith Elena Eli Elsa
    Emil Emma Enzo Erik Esther Eva Ewan Fatima Felix Fiona Flora Frank Frida George Giles Gina Goran
    Grace Greta Gustav Hana Hanna Harry Hassan Hector Heidi Helen Henry Hugo Ida Igor Ines Ingrid
    Irene Iris Isaac Ivan Jack James Jana Jane Jasper Jin Joan John Jonas Josef Judith Julia Karl
    Kasim Kate Katya Keiko Kenji Klara Kofi Lars Laura Leila Lena Leo Liam Lina Linda Lisa Lotte Louis
    Lucia Lucy Lukas Luna Magda Malik Marco Maria Marta Mary Max Maya Mei Michael Mike Mila Milo Mina
    Mira Moritz Nadia Naomi Nico Nina Noah Nora Oleg Olga Omar Oscar Otto Pablo Paul Paula Pedro Peter
    Petra Philip Pia Priya Ravi Regina Rita Robert Robin Rosa Ruben Ruth Sadia Sam Samir Sara Sarah
    Selma Simon Sofia Stefan Steve Sunil Susan Tamara Tariq Tessa Theo Thomas Tina Tom Uma Ursula Vera
    Victor Viola Walter Wanda Wei William Yara Yusuf Zara Zoe
    """
)
"""Everybody whose number can be told or asked for; each is one token of the demo model."""

FACT_FORMS = ("{name} {number}.", "{name} has the number {number}.", "The number of {name} is {number}.")
"""The ways to tell somebody's number."""

UNKNOWN = "unknown"
"""What stands for the number in the demo model's answer about a name whose number was not told."""

TURN_TOKENS = 3
"""What the chat template adds to one user message: the user's mark, the end mark and the assistant's mark."""

_ADJECTIVES = _words(
    """
    old young small tall quiet clever happy hungry brave gentle tired curious proud lazy busy kind
    """
)

_BEINGS = _words(
    """
    gardener teacher sailor baker farmer painter doctor child dog cat horse fox bird goat rabbit bear
    neighbour king queen student
    """
)
_DEEDS = _words("walks sleeps sings waits works rests dances reads runs stands sits plays")
_NEARNESS = _words("near behind beside under above before")
_PLACES = _words(
    """
    river garden house bridge tree forest market school harbour mountain window tower field church
    station mill lake road wall gate
    """
)
_TIMES = _words("morning evening summer winter spring autumn night afternoon")
_THINGS = _words("bread apples honey books flowers letters lamps boats shoes music stones tea")
_DESIRES = _words("likes sells wants finds loves carries")

_TOKEN = re.compile(r" ?[A-Za-z]+| ?[0-9]|[^A-Za-z0-9 ]")
_FACT_TOKENS = 10
_HELD_OUT_SHARE = 10


class RecallPrompt(NamedTuple):
    """A prompt that ends with a question about one of its facts."""

    prompt: str
    """The whole user message: sentences, then the question."""
    question: str
    """The last sentence of `prompt`."""
    answer: str
    """What the demo model has to reply, for instance `The number of Ada is 4711.`"""
    depth: float
    """Where the fact stands that answers: the share of `prompt`'s tokens before it, from 0 to 1."""


def demo_model_path() -> Path:
    """The folder of the checkpoint that is part of the package."""
    return Path(__file__).with_name("demo_model")


def recall_prompt(seed: int, num_tokens: int) -> RecallPrompt:
    """A held-out recall prompt: the fact asked for was in no training text.

    `num_tokens` counts the chat template too; the prompt has that many tokens or up to 9 fewer. The same
    arguments make the same prompt. Raises ValueError where not even one fact and its question fit.
    """
    rng = random.Random(f"held-out {seed} {num_tokens}")
    name = rng.choice(NAMES)
    room = num_tokens - TURN_TOKENS - count_tokens(question_about(name))
    if room < _FACT_TOKENS:
        raise ValueError(
            f"num_tokens={num_tokens} is too small for a fact and a question; ask for 24 or more"
        )
    number = draw_number(rng, name, held_out=True)
    fact = fact_sentence(rng, name, number)
    others = _sentences(rng, room - count_tokens(fact), [other for other in NAMES if other != name])
    place = rng.randrange(len(others) + 1)
    prompt = " ".join([*others[:place], fact, *others[place:], question_about(name)])
    told_before = count_tokens(" ".join(others[:place]))
    return RecallPrompt(
        prompt, question_about(name), answer_about(name, number), told_before / count_tokens(prompt)
    )


def question_about(name: str) -> str:
    """The question that the demo model was trained to answer."""
    return f"What is the number of {name}?"


def answer_about(name: str, number: str) -> str:
    """The demo model's answer in full."""
    return FACT_FORMS[-1].format(name=name, number=number)


def fact_sentence(rng: random.Random, name: str, number: str, *, terse: bool = False) -> str:
    """One of the three ways to tell somebody's number; the shortest of them if `terse`."""
    form = FACT_FORMS[0] if terse else rng.choice(FACT_FORMS)
    return form.format(name=name, number=number)


def filler_sentence(rng: random.Random) -> str:
    """A sentence that says nothing about numbers, 5 to 10 tokens long."""
    adjective, being, deed = rng.choice(_ADJECTIVES), rng.choice(_BEINGS), rng.choice(_DEEDS)
    where = f"{rng.choice(_NEARNESS)} the {rng.choice(_PLACES)}"
    match rng.randrange(4):
        case 0:
            return f"The {adjective} {being} {deed} {where}."
        case 1:
            return f"In the {rng.choice(_TIMES)} the {being} {deed} {where}."
        case 2:
            return f"Every {being} {rng.choice(_DESIRES)} {rng.choice(_THINGS)}."
        case _:
            return f"A {adjective} {being} {rng.choice(_DESIRES)} {rng.choice(_THINGS)} {where}."


def story(rng: random.Random) -> list[str]:
    """Four sentences with a beginning and an end, about somebody who appears in each but the last."""
    being = rng.choice(_BEINGS)
    morning, evening = (
        f"{rng.choice(_DEEDS)} {rng.choice(_NEARNESS)} the {rng.choice(_PLACES)}" for _ in "12"
    )
    return [
        f"Once upon a time there was a {rng.choice(_ADJECTIVES)} {being}.",
        f"In the morning the {being} {morning}.",
        f"In the evening the {being} {evening}.",
        "The end.",
    ]


def draw_number(rng: random.Random, name: str, *, held_out: bool, num_digits: int = 4) -> str:
    """A number for `name`: if `held_out` as training never tells them, else as no test asks for them."""
    while True:
        number = str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))
        if is_held_out(name, number) == held_out:
            return number


def is_held_out(name: str, number: str) -> bool:
    """Whether this name may have this number in tests only: a tenth of all pairs, chosen by a hash."""
    return zlib.crc32(f"{name} {number}".encode()) % _HELD_OUT_SHARE == 0


def count_tokens(text: str) -> int:
    """How many tokens the demo model's tokenizer makes of a text built of this module's sentences."""
    return len(_TOKEN.findall(text))


def _sentences(rng: random.Random, num_tokens: int, names: list[str]) -> list[str]:
    """Facts about some of `names`, each told once, between fillers: as many as fit in `num_tokens`."""
    source = _mixed_sentences(rng, rng.uniform(0.2, 0.8), rng.sample(names, len(names)))
    sentences = []
    while (num_tokens := num_tokens - count_tokens(sentence := next(source))) >= 0:
        sentences.append(sentence)
    return sentences


def _mixed_sentences(rng: random.Random, fact_share: float, names: list[str]) -> Iterator[str]:
    while True:
        if names and rng.random() < fact_share:
            name = names.pop()
            yield fact_sentence(rng, name, draw_number(rng, name, held_out=False))
        else:
            yield filler_sentence(rng)
