"""The texts that the demo model learns from, made of the sentences of `pdserve.demo`.

A text is a list of pieces, each with the weight that its tokens have in the loss: most on digits that can be
known because they stand earlier in the text, little on words that could be others, almost none on news.
"""

import random

from pdserve import demo

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL_TOKENS

FIRST_DIGIT, ANSWER_DIGITS, ANSWER_WORDS, WORDS, NEWS = 3.0, 1.0, 0.5, 0.1, 0.02
"""Loss weights, from the digit that needs the right fact to the digits of a fact told for the first time."""

GREETINGS = (
    "Hello!",
    "Hello.",
    "Hi!",
    "Good morning!",
    "Good evening!",
    "Hello, who are you?",
    "Who are you?",
)
INTRODUCTION = "Hello! I remember numbers. Tell me the number of a name and ask me for it."
STORY_REQUESTS = ("Tell me a story.", "Write a story.", "Tell me a story, please.", "Write something.")
SYSTEM_PROMPTS = ("You remember numbers.", "You are a helpful assistant.", "Answer the question.")
INVITATION = "I remember. Ask me for the number of a name."
PUZZLED = "I do not know that. Let me tell you a story."

Pieces = list[tuple[str, float]]


class Writer:
    """Writes one text: tells numbers, asks for them, and keeps count of its tokens."""

    def __init__(self, rng: random.Random, num_tokens: int, *, terse: bool) -> None:
        self.rng = rng
        self.pieces: Pieces = []
        self._num_tokens = num_tokens
        self._num_written = 0
        self._terse = terse
        self._told: dict[str, str] = {}
        self._untold = rng.sample(demo.NAMES, len(demo.NAMES))
        self._separator = "\n" if rng.random() < 0.25 else " "
        self._at_start = True

    @property
    def share_written(self) -> float:
        return self._num_written / self._num_tokens

    def mark(self, token: str, weight: float = 0.0) -> None:
        """A special token; the next sentence follows it without a space."""
        self.pieces.append((token, weight))
        self._num_written += 1
        self._at_start = True

    def say(self, sentence: str, weight: float = WORDS) -> None:
        self._add(self._gap() + sentence, weight)

    def fill(self) -> None:
        """A sentence that does not matter."""
        self.say(demo.filler_sentence(self.rng))

    def tell(self) -> None:
        """A new fact, while there are names."""
        if not self._untold:
            return self.fill()
        name = self._untold.pop()
        num_digits = 4 if self.rng.random() < 0.8 else self.rng.randint(2, 6)
        self._told[name] = demo.draw_number(self.rng, name, held_out=False, num_digits=num_digits)
        return self._state(name, NEWS)

    def repeat(self) -> None:
        """A fact told before, once more."""
        self._state(self.rng.choice(list(self._told)), ANSWER_DIGITS)

    def passage(self, until_share: float, fact_share: float) -> None:
        """Facts and fillers, at least one fact."""
        self.tell()
        while self.share_written < until_share:
            self.tell() if self.rng.random() < fact_share else self.fill()

    def ask(self) -> str:
        """A question, mostly about a name whose number was told. Returns the name."""
        kind, names = self.rng.random(), list(self._told)
        if kind < 0.1 and self._untold:
            name = self._untold[0]
        else:
            name = names[0] if kind < 0.2 else self.rng.choice(names)
        self.say(demo.question_about(name))
        return name

    def answer(self, name: str) -> None:
        number = self._told.get(name, demo.UNKNOWN)
        self._number(demo.answer_about(name, "#"), number, ANSWER_DIGITS, ANSWER_WORDS)

    def _state(self, name: str, digits_weight: float) -> None:
        sentence = demo.fact_sentence(self.rng, name, "#", terse=self._terse)
        self._number(sentence, self._told[name], digits_weight, WORDS)

    def _number(self, sentence: str, number: str, digits_weight: float, words_weight: float) -> None:
        """`sentence` with `number` in the place of " #"."""
        before, after = sentence.split(" #")
        self._add(self._gap() + before, words_weight)
        first, others = (number, "") if number == demo.UNKNOWN else (number[0], number[1:])
        self._add(" " + first, FIRST_DIGIT * digits_weight)
        self._add(others, digits_weight)
        self._add(after, words_weight)

    def _gap(self) -> str:
        return "" if self._at_start else self._separator

    def _add(self, text: str, weight: float) -> None:
        self.pieces.append((text, weight))
        self._num_written += demo.count_tokens(text)
        self._at_start = False


def write_text(rng: random.Random, num_tokens: int) -> Pieces:
    """One text of at least `num_tokens` tokens. Short texts are drills more often than long ones."""
    writer = Writer(rng, num_tokens, terse=rng.random() < 0.4)
    kinds = (_small_talk, _drill, _chat, _prose)
    shares = (6, 64, 18, 12) if num_tokens <= 64 else (6, 20, 44, 30)
    rng.choices(kinds, shares)[0](writer)
    return writer.pieces


def _drill(writer: Writer) -> None:
    """Few facts, told again and again."""
    few = writer.rng.uniform(0.1, 0.4)
    writer.tell()
    while writer.share_written < 1:
        news = writer.share_written < few or writer.rng.random() < 0.05
        writer.tell() if news else writer.repeat()


def _chat(writer: Writer) -> None:
    """A user tells facts and asks; then more questions, now and then after another fact."""
    rng = writer.rng
    if rng.random() < 0.2:
        writer.mark(SYSTEM)
        writer.say(rng.choice(SYSTEM_PROMPTS))
        writer.mark(END)
    writer.mark(USER)
    writer.passage(rng.uniform(0.2, 0.95), rng.uniform(0.2, 0.9))
    if rng.random() < 0.15:
        _reply(writer, INVITATION)
    else:
        _question_and_answer(writer)
    while writer.share_written < 1:
        writer.mark(USER)
        if rng.random() < 0.1:
            writer.tell()
        _question_and_answer(writer)


def _question_and_answer(writer: Writer) -> None:
    name = writer.ask()
    writer.mark(END)
    writer.mark(ASSISTANT)
    writer.answer(name)
    writer.mark(END, ANSWER_WORDS)


def _reply(writer: Writer, *sentences: str) -> None:
    """Ends the user's turn and answers it."""
    writer.mark(END)
    writer.mark(ASSISTANT)
    for sentence in sentences:
        writer.say(sentence, ANSWER_WORDS)
    writer.mark(END, ANSWER_WORDS)


def _prose(writer: Writer) -> None:
    """Facts and fillers; then the facts once more, and questions with answers."""
    rng = writer.rng
    fact_share, question_share = rng.uniform(0.2, 0.9), rng.random()
    writer.passage(rng.uniform(0.2, 0.95), fact_share)
    while writer.share_written < 1:
        if rng.random() > max(fact_share, 0.6):
            writer.fill()
        elif rng.random() < question_share:
            writer.answer(writer.ask())
        else:
            writer.repeat()


def _small_talk(writer: Writer) -> None:
    """Stories, greetings, requests for stories and words the model does not know, each with its reply."""
    rng = writer.rng
    if rng.random() < 0.3:
        _tell_story(writer)
    while writer.share_written < 1:
        writer.mark(USER)
        kind = rng.randrange(3)
        if kind == 0:
            writer.say(rng.choice(GREETINGS))
            _reply(writer, INTRODUCTION)
        elif kind == 1:
            writer.say(rng.choice(STORY_REQUESTS))
            _reply(writer, *demo.story(rng))
        else:
            writer.say(_strange_words(rng))
            _reply(writer, PUZZLED, *demo.story(rng))


def _tell_story(writer: Writer) -> None:
    for sentence in demo.story(writer.rng):
        writer.say(sentence, ANSWER_WORDS)
    writer.mark(END, ANSWER_WORDS)


def _strange_words(rng: random.Random) -> str:
    letters = "eeaaiioutnshrdlcmfpgwybvk"
    words = ("".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(rng.randint(1, 8)))
    return " ".join(words).capitalize() + rng.choice(".?!")
