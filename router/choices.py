"""Running the choices of a job: tokens from the desk become pieces of text, many streams become one.

Each choice has a task that reads its tokens as they come and never waits for the client (`router.unread`), so
deadlines are kept and slow clients noticed also while a write to the client is blocked: the block of
`running_job` is interrupted then. Leaving it closes every stream at once, and with it the work behind it
everywhere.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from pdserve.contract.errors import ClientTooSlow, DeadlineExceeded, StreamBroken
from pdserve.contract.ids import RequestId
from pdserve.contract.messages import CancelReason, RequestTimings
from pdserve.contract.ports import Clock
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import BYTES_PER_TOKEN, TokenBytes, num_tokens, slice_tokens, unpack_tokens
from pdserve.contract.work import TokenLogprobs
from pdserve.tasks import task_scope
from router.detokenize import CONTEXT_TOKENS, OutputText
from router.intake import ChoiceJob, Job
from router.request_reports import Origin, RequestReport
from router.requests import Closing, Desk, OutputDelta
from router.text import TextModel
from router.unread import Unread


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
    report: RequestReport | None = None
    """With `finish`, where the job asks for timings and the request has not been forgotten."""


Running = AbstractAsyncContextManager[AsyncGenerator[ChoicePiece, None]]
"""What `running_job` returns."""


@asynccontextmanager
async def running_job(
    desk: Desk,
    job: Job,
    request_ids: Sequence[RequestId],
    origin: Origin,
    text_model: TextModel,
    max_unread_tokens: int,
    clock: Clock,
) -> AsyncIterator[AsyncGenerator[ChoicePiece, None]]:
    """The pieces of all choices of a job, which run side by side; each choice ends with a piece that has
    `finish`. `origin` is that of the first choice.

    Reading them raises the first error of any choice. The block is interrupted, wherever it waits, with
    DeadlineExceeded when the job's deadline passes and with ClientTooSlow when more than `max_unread_tokens`
    of a choice wait to be read.
    """
    started_at = clock.now()
    unread = Unread(len(job.choices), max_unread_tokens)
    closings = [Closing() for _ in job.choices]
    async with task_scope() as tasks:
        readers = [
            tasks.create_task(_read(desk, request_id, _with_origin(choice, origin), unread, closings))
            for request_id, choice in zip(request_ids, job.choices, strict=True)
        ]
        deadline = tasks.create_task(_keep_deadline(job.deadline_s, started_at, clock, readers))
        last_words = _last_words(desk, request_ids) if job.timings else None
        async with aclosing(_pieces(job, unread, readers, closings, text_model, last_words)) as pieces:
            yield pieces
        for task in (deadline, *readers):
            task.cancel()


def _with_origin(choice: ChoiceJob, origin: Origin) -> ChoiceJob:
    request = replace(choice.request, origin=replace(origin, choice=choice.index))
    return replace(choice, request=request)


def _last_words(desk: Desk, request_ids: Sequence[RequestId]) -> Callable[[ChoicePiece], ChoicePiece]:
    """Adds the request's report to a choice's last piece."""
    return lambda piece: replace(piece, report=desk.report(request_ids[piece.index]))


async def _read(
    desk: Desk, request_id: RequestId, choice: ChoiceJob, unread: Unread, closings: Sequence[Closing]
) -> None:
    """Put a choice's tokens where the client takes them. An error follows them there, unless the client must
    not be waited for any more: that one is raised."""
    error: Exception | None = None
    try:
        await _read_all(desk, request_id, choice, unread, closings)
    except Exception as failure:
        error = failure
        if isinstance(failure, ClientTooSlow | DeadlineExceeded):
            raise
    finally:
        unread.end(error)


async def _read_all(
    desk: Desk, request_id: RequestId, choice: ChoiceJob, unread: Unread, closings: Sequence[Closing]
) -> None:
    finished = False
    async with aclosing(desk.generate(request_id, choice.request, closings[choice.index])) as deltas:
        async for delta in deltas:
            try:
                unread.put(choice.index, delta)
            except ClientTooSlow:
                for closing in closings:  # the client's other choices end for the same reason
                    closing.reason = CancelReason.CLIENT_TOO_SLOW
                raise
            finished = delta.finish is not None
    if not finished:
        raise StreamBroken(f"request {request_id} ended without a reason to finish")


async def _keep_deadline(
    deadline_s: float | None, started_at: float, clock: Clock, readers: Sequence["asyncio.Task[None]"]
) -> None:
    """Raises DeadlineExceeded for a client that has not read everything by then. Until all is generated, the
    journeys keep the deadline themselves."""
    if deadline_s is None:
        return
    await asyncio.wait(readers)
    await clock.sleep(started_at + deadline_s - clock.now())
    raise DeadlineExceeded("the request's deadline has passed before its client had read the answer")


async def _pieces(
    job: Job,
    unread: Unread,
    readers: Sequence["asyncio.Task[None]"],
    closings: Sequence[Closing],
    text_model: TextModel,
    last_words: Callable[[ChoicePiece], ChoicePiece] | None,
) -> AsyncGenerator[ChoicePiece, None]:
    outputs = [_choice_text(choice, text_model) for choice in job.choices]
    stopped: set[int] = set()
    while (taken := await unread.take()) is not None:
        index, delta = taken
        if index in stopped:
            continue
        piece = _piece(index, delta, outputs[index])
        if piece.finish is not None:
            stopped.add(index)
            closings[index].reason = CancelReason.STOP_STRING
            readers[index].cancel()  # after a stop string the work behind it goes on
            piece = piece if last_words is None else last_words(piece)
        yield piece


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
