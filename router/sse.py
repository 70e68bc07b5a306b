"""Server-sent events of the OpenAI APIs, built from templates.

All that stays the same from event to event is written once per answer; a token costs the escaping of its
text and a join. Events are ASCII, so that no client can take a character of the text for a line end.
"""

import json
from collections.abc import Mapping
from json.encoder import encode_basestring_ascii as escape
from typing import Any

from pdserve.contract.tokens import TokenBytes, unpack_tokens
from router.choices import ChoicePiece
from router.intake import ChoiceJob, Job
from router.openai_answers import AnswerHead, Usage, choice_timings, echoed_text
from router.openai_logprobs import chat_logprobs, completion_logprobs
from router.text import TextModel

DONE = "data: [DONE]\n\n"


class CompletionEvents:
    """Events of a /v1/completions stream."""

    def __init__(self, job: Job, head: AnswerHead, text_model: TextModel, usage: Usage):
        """`usage` counts on while events are made."""
        self._job = job
        self._text_model = text_model
        self._frame = _Frame("text_completion", head, job, usage)
        self._echoes = [echoed_text(choice, text_model) if job.echo else "" for choice in job.choices]

    def first(self, choice: ChoiceJob) -> str:
        """Sent once per choice, with its first piece: the echoed prompt and its ids, where asked for."""
        echo = self._echoes[choice.index]
        ids = ""
        if self._job.return_token_ids:
            ids = f',"prompt_token_ids":{_ids(choice.prompt.tokens)},"token_ids":[]'
        if not echo and not ids:
            return ""
        return self._frame.event(choice.index, f'"text":{escape(echo)},"logprobs":null', ids)

    def piece(self, piece: ChoicePiece) -> str:
        """What is new of a choice; "" when there is nothing to say yet."""
        if _is_silent(piece, self._job):
            return ""
        logprobs = "null"
        if self._job.logprobs is not None:
            shift = len(self._echoes[piece.index])
            logprobs = json.dumps(completion_logprobs(piece, shift, self._text_model))
        content = f'"text":{escape(piece.text)},"logprobs":{logprobs}'
        return self._frame.event(piece.index, content, _in_choice(piece, self._job), piece.finish)

    def usage(self) -> str:
        """The last event before the end; "" unless the client asked for it."""
        return self._frame.usage() if self._job.include_usage else ""


class ChatEvents:
    """Events of a /v1/chat/completions stream."""

    def __init__(self, job: Job, head: AnswerHead, text_model: TextModel, usage: Usage):
        """`usage` counts on while events are made."""
        self._job = job
        self._text_model = text_model
        self._frame = _Frame("chat.completion.chunk", head, job, usage)

    def first(self, choice: ChoiceJob) -> str:
        """Sent once per choice, with its first piece: who speaks, and the prompt's ids where asked for."""
        ids = f',"prompt_token_ids":{_ids(choice.prompt.tokens)}' if self._job.return_token_ids else ""
        content = '"delta":{"role":"assistant","content":""},"logprobs":null'
        return self._frame.event(choice.index, content, beside_choices=ids)

    def piece(self, piece: ChoicePiece) -> str:
        """What is new of a choice; "" when there is nothing to say yet."""
        if _is_silent(piece, self._job):
            return ""
        logprobs = "null"
        if self._job.logprobs is not None:
            logprobs = json.dumps({"content": chat_logprobs(piece, self._text_model), "refusal": None})
        delta = f'{{"content":{escape(piece.text)}}}' if piece.text else "{}"
        content = f'"delta":{delta},"logprobs":{logprobs}'
        return self._frame.event(piece.index, content, _in_choice(piece, self._job), piece.finish)

    def usage(self) -> str:
        """The last event before the end; "" unless the client asked for it."""
        return self._frame.usage() if self._job.include_usage else ""


def error_event(body: Mapping[str, Any]) -> str:
    """An error after the stream has begun, in the shape that OpenAI's clients raise."""
    return f"data: {json.dumps(body)}\n\n"


class _Frame:
    """What surrounds the content of every event of one answer."""

    def __init__(self, kind: str, head: AnswerHead, job: Job, usage: Usage):
        self._head = (
            f'data: {{"id":{escape(head.answer_id)},"object":"{kind}",'
            f'"created":{head.created},"model":{escape(head.model)}'
        )
        self._before = self._head + ',"choices":[{"index":'
        self._usage = usage
        self._is_counted = job.continuous_usage
        self._end = ',"usage":null}\n\n' if job.include_usage else "}\n\n"

    def event(
        self,
        index: int,
        content: str,
        in_choice: str = "",
        finish: str | None = None,
        beside_choices: str = "",
    ) -> str:
        reason = f'"{finish}"' if finish else "null"
        end = self._counted_end() if self._is_counted else self._end
        return f'{self._before}{index},{content},"finish_reason":{reason}{in_choice}}}]{beside_choices}{end}'

    def usage(self) -> str:
        return f'{self._head},"choices":[]{self._counted_end()}'

    def _counted_end(self) -> str:
        return f',"usage":{json.dumps(self._usage.as_json())}}}\n\n'


def _is_silent(piece: ChoicePiece, job: Job) -> bool:
    """Whether a piece has nothing that its client wants to see: its text is held back."""
    wants_tokens = job.return_token_ids or job.logprobs is not None
    return not piece.text and piece.finish is None and not (wants_tokens and piece.tokens)


def _in_choice(piece: ChoicePiece, job: Job) -> str:
    """What the client asked for beyond OpenAI's fields."""
    ids = f',"token_ids":{_ids(piece.tokens)}' if job.return_token_ids else ""
    timings = choice_timings(piece, job)
    return ids + (f",{json.dumps(timings)[1:-1]}" if timings else "")


def _ids(tokens: TokenBytes) -> str:
    return json.dumps(unpack_tokens(tokens))
