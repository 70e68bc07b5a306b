"""What the client of a job has not taken yet.

A journey never waits for its client: its tokens are put here as they come. Of each choice there is one delta
at most, which grows until the client takes it, up to a bound; a client that lets more pile up is cut.
"""

import asyncio

from pdserve.contract.errors import ClientTooSlow
from pdserve.contract.tokens import num_tokens
from router.requests import OutputDelta


class Unread:
    """The deltas of a job's choices between those who put them in and the one client that takes them out."""

    def __init__(self, num_choices: int, max_tokens: int) -> None:
        """`max_tokens` bounds what may wait of one choice."""
        self._max_tokens = max_tokens
        self._num_running = num_choices
        self._deltas: dict[int, OutputDelta] = {}  # choice index -> all that is new of it, oldest first
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, index: int, delta: OutputDelta) -> None:
        """More of a choice. Raises ClientTooSlow when too much of it waits already."""
        waiting = self._deltas.get(index)
        if waiting is not None:
            delta = _joined(waiting, delta)
            self._check(num_tokens(delta.tokens))
        self._deltas[index] = delta
        self._news.set()

    def end(self, error: Exception | None = None) -> None:
        """A choice has ended; of several errors the first one counts."""
        self._num_running -= 1
        self._error = self._error or error
        self._news.set()

    async def take(self) -> tuple[int, OutputDelta] | None:
        """All that is new of the choice that has waited longest, and its index; None when all have ended.
        Raises the error of a choice when what came before it has been taken."""
        while not self._deltas:
            if self._error is not None:
                raise self._error
            if not self._num_running:
                return None
            self._news.clear()
            await self._news.wait()
        index = next(iter(self._deltas))
        return index, self._deltas.pop(index)

    def _check(self, num_waiting: int) -> None:
        if num_waiting > self._max_tokens:
            raise ClientTooSlow(
                f"the client has not read for {num_waiting} tokens, and may not for {self._max_tokens} "
                "(router.limits.max_unread_tokens); read the answer as it comes"
            )


def _joined(first: OutputDelta, second: OutputDelta) -> OutputDelta:
    """Two deltas that follow each other as one."""
    return OutputDelta(
        first.tokens + second.tokens,
        first.logprobs + second.logprobs,
        second.finish,
        second.timings or first.timings,
    )
