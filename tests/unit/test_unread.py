"""What waits for a client becomes one delta per choice, and not too much may wait."""

import asyncio

import pytest

from pdserve.contract.errors import ClientTooSlow, WorkerLost
from pdserve.contract.messages import RequestTimings
from pdserve.contract.sampling import FinishReason
from pdserve.contract.tokens import pack_tokens, unpack_tokens
from pdserve.contract.work import TokenLogprobs
from router.requests import OutputDelta
from router.unread import Unread


def delta(*tokens: int, finish: FinishReason | None = None, queue_s: float | None = None) -> OutputDelta:
    timings = None if queue_s is None else RequestTimings(queue_s=queue_s)
    return OutputDelta(pack_tokens(tokens), tuple(map(TokenLogprobs, tokens)), finish, timings)


async def taken(unread: Unread) -> tuple[int, list[int]] | None:
    got = await unread.take()
    return None if got is None else (got[0], unpack_tokens(got[1].tokens))


async def test_deltas_that_wait_become_one_with_all_they_say() -> None:
    unread = Unread(1, max_tokens=10)
    unread.put(0, delta(1, queue_s=2.0))
    unread.put(0, delta(2, 3))
    unread.put(0, delta(4, finish=FinishReason.LENGTH))
    assert await unread.take() == (0, delta(1, 2, 3, 4, finish=FinishReason.LENGTH, queue_s=2.0))


async def test_the_last_timings_count() -> None:
    unread = Unread(1, max_tokens=10)
    unread.put(0, delta(1, queue_s=2.0))
    unread.put(0, delta(2, queue_s=3.0))
    assert await unread.take() == (0, delta(1, 2, queue_s=3.0))


async def test_the_choice_that_has_waited_longest_comes_first() -> None:
    unread = Unread(2, max_tokens=10)
    unread.put(1, delta(1))
    unread.put(0, delta(2))
    unread.put(1, delta(3))
    assert [await taken(unread), await taken(unread)] == [(1, [1, 3]), (0, [2])]


async def test_the_end_comes_when_all_choices_have_ended() -> None:
    unread = Unread(2, max_tokens=10)
    unread.end()
    waiting = asyncio.create_task(taken(unread))
    await asyncio.sleep(0)
    assert not waiting.done()
    unread.put(1, delta(1))
    unread.end()
    assert [await waiting, await taken(unread)] == [(1, [1]), None]


async def test_an_error_comes_after_what_was_said_before() -> None:
    unread = Unread(2, max_tokens=10)
    unread.put(0, delta(1))
    unread.end(WorkerLost("the first"))
    unread.end(WorkerLost("the second"))
    assert await taken(unread) == (0, [1])
    with pytest.raises(WorkerLost, match="the first"):
        await unread.take()


async def test_a_client_that_lets_too_much_wait_is_too_slow() -> None:
    unread = Unread(2, max_tokens=3)
    unread.put(0, delta(*range(5)))  # came at once: nobody could have read it
    assert await taken(unread) == (0, list(range(5)))
    unread.put(0, delta(1, 2))
    unread.put(1, delta(1, 2))
    unread.put(0, delta(3))
    with pytest.raises(ClientTooSlow, match="has not read for 4 tokens, and may not for 3"):
        unread.put(0, delta(4))
