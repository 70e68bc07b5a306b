"""Running the choices of a job: tokens from the desk become pieces of text, many streams become one.

Whoever stops iterating closes every stream at once, and with it the work behind it everywhere.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from pdserve.contract.errors import StreamBroken
from pdserve.contract.ids import RequestId
from pdserve.contract.messages import RequestTimings
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import BYTES_PER_TOKEN, TokenBytes, num_tokens, slice_tokens, unpack_tokens
from pdserve.contract.work import TokenLogprobs
from router.detokenize import CONTEXT_TOKENS, OutputText
from router.intake import ChoiceJob, Job
from router.requests import Desk, OutputDelta
from router.text import TextModel

_QUEUED_PIECES_PER_CHOICE = 8


@dataclass(frozen=True, slots=True)
class ChoicePiece:
    """What is new of one choice. `text` may be empty while text is held back."""

    index: int
    text: str
    tokens: TokenBytes
    logprobs: tuple[TokenLogprobs, ...] = ()
    offsets: tuple[int, ...] = ()
    """Where each token starts in the choice's text; with `logprobs`."""
    finish: FinishReason | None = None
    timings: RequestTimings | None = None


async def stream_job(
    desk: Desk, job: Job, request_ids: Sequence[RequestId], text_model: TextModel
) -> AsyncGenerator[ChoicePiece, None]:
    """All choices of a job side by side; each ends with a piece that has `finish`.

    Raises the first error of any choice, after closing the others.
    """
    streams = [
        _stream_choice(desk, request_id, choice, text_model)
        for request_id, choice in zip(request_ids, job.choices, strict=True)
    ]
    merged = streams[0] if len(streams) == 1 else _merge(streams)
    async with aclosing(merged) as pieces:
        async for piece in pieces:
            yield piece


async def _stream_choice(
    desk: Desk, request_id: RequestId, choice: ChoiceJob, text_model: TextModel
) -> AsyncGenerator[ChoicePiece, None]:
    output = _choice_text(choice, text_model)
    finished = False
    async with aclosing(desk.generate(request_id, choice.request)) as deltas:
        async for delta in deltas:
            piece = _piece(choice.index, delta, output)
            finished = piece.finish is not None
            yield piece
            if finished and delta.finish is None:  # a stop string was found; the work behind it goes on
                return
    if not finished:
        raise StreamBroken(f"request {request_id} ended without a reason to finish")


def _choice_text(choice: ChoiceJob, text_model: TextModel) -> OutputText:
    sampling = choice.request.sampling
    return OutputText(
        text_model,
        unpack_tokens(choice.prompt.tokens[-CONTEXT_TOKENS * BYTES_PER_TOKEN :]),
        choice.stops,
        min_tokens=sampling.min_tokens,
        with_offsets=sampling.logprobs is not None,
    )


def _piece(index: int, delta: OutputDelta, output: OutputText) -> ChoicePiece:
    added = output.add(
        unpack_tokens(delta.tokens),
        last=delta.finish is not None,
        ends_with_stop_token=delta.finish is FinishReason.STOP,
    )
    tokens = delta.tokens
    if added.num_tokens < num_tokens(tokens):
        tokens = slice_tokens(tokens, 0, added.num_tokens)
    finish = FinishReason.STOP if added.stopped else delta.finish
    logprobs = delta.logprobs[: added.num_tokens]
    return ChoicePiece(index, added.text, tokens, logprobs, added.offsets, finish, delta.timings)


async def _merge(streams: Sequence[AsyncGenerator[ChoicePiece, None]]) -> AsyncGenerator[ChoicePiece, None]:
    queue: _Queue = asyncio.Queue(_QUEUED_PIECES_PER_CHOICE * len(streams))
    tasks = [asyncio.create_task(_drain(stream, queue)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, ChoicePiece):
                yield item
            elif item is None:
                running -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drain(stream: AsyncGenerator[ChoicePiece, None], queue: "_Queue") -> None:
    """Move one stream into the queue, then None; an error travels the same way and is raised there."""
    try:
        async with aclosing(stream) as pieces:
            async for piece in pieces:
                await queue.put(piece)
    except Exception as error:  # noqa: BLE001  # carried to the task that reads the queue
        await queue.put(error)
    else:
        await queue.put(None)


_Queue = asyncio.Queue[ChoicePiece | Exception | None]
