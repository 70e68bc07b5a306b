"""The real and the virtual clock keep the same promises, and so do both sources of randomness."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from pdserve.clock import (
    LoopClock,
    SeededRng,
    SystemRng,
    VirtualClock,
    run_virtual,
)
from pdserve.contract.ports import Clock, Rng
from pdserve.virtual_loop import MIN_TIMERS, VirtualDeadlock

Story = Callable[[Clock], Awaitable[None]]
Play = Callable[[Story], None]


@pytest.fixture(params=["real", "virtual"])
def play(request: pytest.FixtureRequest) -> Play:
    """Runs a story on a loop of the clock's kind."""
    clock: Clock = LoopClock() if request.param == "real" else VirtualClock()
    run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run if request.param == "real" else run_virtual

    def run_story(story: Story) -> None:
        async def main() -> None:
            await story(clock)

        run(main())

    return run_story


def test_time_passes_while_sleeping_and_never_goes_back(play: Play) -> None:
    async def story(clock: Clock) -> None:
        times = [clock.now()]
        for seconds in (0.01, 0.0, 0.02):
            await clock.sleep(seconds)
            times.append(clock.now())
        assert times == sorted(times)
        assert times[-1] - times[0] >= 0.03 - 1e-3  # a loop's timers have its clock's resolution

    play(story)


def test_sleepers_wake_in_the_order_of_their_times(play: Play) -> None:
    async def story(clock: Clock) -> None:
        woken: list[float] = []

        async def sleep(seconds: float) -> None:
            await clock.sleep(seconds)
            woken.append(seconds)

        await asyncio.gather(*[sleep(seconds) for seconds in (0.3, 0.1, 0.2, 0.0)])
        assert woken == [0.0, 0.1, 0.2, 0.3]

    play(story)


def test_a_timeout_ends_its_block_and_no_other(play: Play) -> None:
    async def story(clock: Clock) -> None:
        with pytest.raises(TimeoutError):
            async with clock.timeout(0.01):
                await asyncio.Event().wait()
        async with clock.timeout(0.05):
            await clock.sleep(0)
        async with clock.timeout(None):
            await clock.sleep(0.1)

    play(story)


def test_a_virtual_day_is_exact_and_takes_no_time() -> None:
    async def story() -> list[float]:
        clock = VirtualClock()
        times = [clock.now()]
        for _ in range(24):
            await clock.sleep(3600.0)
            times.append(clock.now())
        return times

    assert run_virtual(story()) == [3600.0 * hour for hour in range(25)]


def test_two_virtual_runs_of_one_seed_are_the_same_run() -> None:
    async def story() -> list[tuple[float, int]]:
        clock, rng = VirtualClock(), SeededRng(7)
        log: list[tuple[float, int]] = []

        async def walk(who: int) -> None:
            for _ in range(20):
                await clock.sleep(rng.random_bits(2) / 8)
                log.append((clock.now(), who))

        await asyncio.gather(*[walk(who) for who in range(10)])
        return log

    assert run_virtual(story()) == run_virtual(story())


def test_a_virtual_system_that_can_never_move_again_says_so() -> None:
    async def story() -> None:
        await asyncio.Event().wait()

    with pytest.raises(VirtualDeadlock):
        run_virtual(story())


def test_timers_of_one_virtual_moment_run_in_the_order_in_which_they_were_set() -> None:
    async def story() -> list[int]:
        loop, ran = asyncio.get_running_loop(), []
        for number in range(50):
            loop.call_at(1.0, ran.append, number)
        await asyncio.sleep(1.0)
        return ran

    assert run_virtual(story()) == list(range(50))


def test_timers_that_were_cancelled_neither_run_nor_move_virtual_time() -> None:
    async def story() -> float:
        loop, ran = asyncio.get_running_loop(), []
        timers = [loop.call_later(number, ran.append, number) for number in range(3 * MIN_TIMERS)]
        kept = {7, MIN_TIMERS + 7}
        for number, timer in enumerate(timers):
            if number not in kept:
                timer.cancel()
        timers += [loop.call_later(1e6, ran.append, -1) for _ in range(MIN_TIMERS)]
        await asyncio.sleep(2 * MIN_TIMERS)
        assert ran == sorted(kept)
        return loop.time()

    assert run_virtual(story()) == 2 * MIN_TIMERS


async def test_the_virtual_clock_refuses_another_loop() -> None:
    with pytest.raises(RuntimeError, match="run_virtual"):
        VirtualClock().now()


@pytest.mark.parametrize("rng", [SystemRng(), SeededRng(1)], ids=["system", "seeded"])
def test_random_numbers_keep_their_bounds_and_reach_all_of_them(rng: Rng) -> None:
    assert {rng.random_bits(2) for _ in range(200)} == {0, 1, 2, 3}
    drawn = [rng.random_bits(63) for _ in range(50)]
    assert len(set(drawn)) == 50
    assert max(drawn) < 2**63
    assert max(drawn) >= 2**60


def test_a_seed_names_one_sequence_and_system_randomness_has_none() -> None:
    def draw(rng: Rng) -> list[int]:
        return [rng.random_bits(64) for _ in range(5)]

    assert draw(SeededRng(5)) == draw(SeededRng(5))
    assert draw(SeededRng(5)) != draw(SeededRng(6))
    assert draw(SystemRng()) != draw(SystemRng())
