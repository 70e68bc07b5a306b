"""Between the public protobuf messages and what the router works with."""

from collections.abc import Iterable, Sequence
from typing import Any

from google.protobuf.json_format import ParseDict

from pdserve.api.v1 import generate_pb2 as pb
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import unpack_tokens
from pdserve.contract.work import TokenLogprobs
from router.choices import ChoicePiece
from router.intake import Job
from router.openai_answers import Usage, echoed_text
from router.openai_schema import ChatBody, CompletionBody, parse_fields
from router.report_json import timings_json
from router.request_reports import RequestReport
from router.text import TextModel

_FINISH = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    None: pb.FINISH_REASON_UNSPECIFIED,
}
_SAME_FIELDS = ("model", "n", "max_tokens", "echo", "return_token_ids", "priority", "timings")


def body_from(request: pb.GenerateRequest) -> CompletionBody | ChatBody:
    """The request as the HTTP API's body, so that the same checks apply. Raises InvalidRequest."""
    fields: dict[str, Any] = {name: getattr(request, name) for name in _SAME_FIELDS if request.HasField(name)}
    fields["stop"] = list(request.stop)
    fields |= _sampling_fields(request.sampling)
    match request.WhichOneof("prompt"):
        case "chat":
            return parse_fields(ChatBody, fields | _chat_fields(request))
        case "text":
            fields["prompt"] = request.text
        case "token_ids":
            fields["prompt"] = list(request.token_ids.ids)
    if request.HasField("logprobs"):
        fields["logprobs"] = request.logprobs
    return parse_fields(CompletionBody, fields)


def choice_from(piece: ChoicePiece, job: Job, text_model: TextModel, *, first: bool) -> pb.Choice:
    """What is new of a choice; its first piece brings the echoed prompt."""
    echo = echoed_text(job.choices[piece.index], text_model) if job.echo and first else ""
    return pb.Choice(
        index=piece.index,
        text=echo + piece.text,
        finish_reason=_FINISH[piece.finish],
        token_ids=unpack_tokens(piece.tokens) if job.return_token_ids else (),
        logprobs=_logprobs(piece, text_model),
        timings=None if piece.report is None else timings_from(piece.report),
    )


def joined_choice(parts: Sequence[pb.Choice]) -> pb.Choice:
    """All that came of one choice as one message."""
    whole = pb.Choice(index=parts[0].index, finish_reason=parts[-1].finish_reason)
    whole.text = "".join(part.text for part in parts)
    if parts[-1].HasField("timings"):
        whole.timings.CopyFrom(parts[-1].timings)
    for part in parts:
        whole.token_ids.extend(part.token_ids)
        whole.logprobs.extend(part.logprobs)
    return whole


def says_something(chunk: pb.GenerateChunk) -> bool:
    """False while all that is new of a choice is held back."""
    choice = chunk.choice
    return bool(choice.text or choice.finish_reason or choice.token_ids or choice.logprobs)


def usage_from(usage: Usage) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=usage.num_prompt_tokens,
        completion_tokens=usage.num_output_tokens,
        cached_tokens=usage.num_cached_tokens,
    )


def timings_from(report: RequestReport) -> pb.Timings:
    """The same as the HTTP API's `timings`."""
    return ParseDict(timings_json(report), pb.Timings())


def prompt_ids_from(job: Job) -> list[int]:
    """The prompt's ids, where the client asked for ids."""
    return unpack_tokens(job.prompts[0].tokens) if job.return_token_ids else []


def _sampling_fields(sampling: pb.Sampling) -> dict[str, Any]:
    fields = {descriptor.name: value for descriptor, value in sampling.ListFields()}
    if sampling.stop_token_ids:
        fields["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        fields["logit_bias"] = {str(token_id): value for token_id, value in sampling.logit_bias.items()}
    return fields


def _chat_fields(request: pb.GenerateRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {"messages": [_message(message) for message in request.chat.messages]}
    if request.HasField("logprobs"):
        fields |= {"logprobs": True, "top_logprobs": request.logprobs}
    return fields


def _message(message: pb.Message) -> dict[str, Any]:
    name = {"name": message.name} if message.HasField("name") else {}
    return {"role": message.role, "content": message.content, **name}


def _logprobs(piece: ChoicePiece, text_model: TextModel) -> Iterable[pb.TokenLogprob]:
    if not piece.logprobs:
        return
    token_ids = unpack_tokens(piece.tokens)
    for token_id, logprobs, offset in zip(token_ids, piece.logprobs, piece.offsets, strict=True):
        yield pb.TokenLogprob(
            token_id=token_id,
            token=text_model.token_bytes(token_id),
            logprob=logprobs.chosen,
            text_offset=offset,
            top=_top(logprobs, text_model),
        )


def _top(logprobs: TokenLogprobs, text_model: TextModel) -> Iterable[pb.TopLogprob]:
    for token_id, value in logprobs.top:
        yield pb.TopLogprob(token_id=token_id, token=text_model.token_bytes(token_id), logprob=value)
