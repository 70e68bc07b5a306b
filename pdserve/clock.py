"""Time and randomness: the real ones and the reproducible ones.

`LoopClock` is real time. `run_virtual` runs a coroutine on a loop whose time
jumps to the next timer whenever nothing is ready, so simulated hours take seconds and every run with the
same seed is the same run. No thread and no socket may be used under it.
"""

import asyncio
import random
import time
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from pdserve.virtual_loop import VirtualLoop

T = TypeVar("T")


class LoopClock:
    """Monotonic time; sleeping and timeouts are the running event loop's."""

    def now(self) -> float:
        return time.monotonic()  # not loop.time(): uvloop's stands still within one pass, in milliseconds

    def unix_time(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)


class VirtualClock(LoopClock):
    """Time of a loop made by `run_virtual`; refuses to run on any other."""

    def now(self) -> float:
        loop = asyncio.get_running_loop()
        if not isinstance(loop, VirtualLoop):
            raise RuntimeError("VirtualClock needs run_virtual()")
        return loop.time()

    def unix_time(self) -> float:
        return self.now()


class SystemRng:
    """Randomness of the operating system."""

    def __init__(self) -> None:
        self._random = random.SystemRandom()

    def random_bits(self, num_bits: int) -> int:
        return self._random.getrandbits(num_bits)


class SeededRng:
    """The same sequence for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def random_bits(self, num_bits: int) -> int:
        return self._random.getrandbits(num_bits)


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end in virtual time, starting at 0. Raises VirtualDeadlock instead of hanging."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
