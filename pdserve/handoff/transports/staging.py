"""Memory of the decode worker's own into which others' bytes come before they are copied into its pool.

A slot is free, or in use by one reader, or lost: a slot whose writer cannot be proven to have stopped is
never used again, so that what still comes does no harm.
"""

import asyncio
import mmap
from typing import NamedTuple

import numpy as np

from pdserve.contract.errors import StreamBroken
from pdserve.contract.ports import Clock
from pdserve.rpc.channel import PEER_LOST_S


class Slot(NamedTuple):
    address: int
    view: memoryview


class Staging:
    """`num_slots` slots of `slot_bytes` each, in one stretch of page-aligned memory."""

    def __init__(self, num_slots: int, slot_bytes: int, clock: Clock) -> None:
        self.num_bytes = num_slots * slot_bytes
        self._clock = clock
        self._num_slots = num_slots
        self._num_lost = 0
        self._free: asyncio.LifoQueue[Slot] = asyncio.LifoQueue()  # the last used is still in the cache
        memory = memoryview(mmap.mmap(-1, self.num_bytes))
        self.address = int(np.frombuffer(memory, np.uint8).ctypes.data)
        for start in range(0, self.num_bytes, slot_bytes):
            self._free.put_nowait(Slot(self.address + start, memory[start : start + slot_bytes]))

    @property
    def is_lost(self) -> bool:
        """No slot is left."""
        return self._num_lost == self._num_slots

    @property
    def has_free(self) -> bool:
        """Whether `acquire` returns at once."""
        return not self._free.empty()

    async def acquire(self) -> Slot:
        """A slot for the caller alone, who releases or loses it. Raises StreamBroken when none becomes free
        for as long as a lost peer may hold one."""
        try:
            async with self._clock.timeout(PEER_LOST_S):
                return await self._free.get()
        except TimeoutError:
            raise StreamBroken(
                f"no staging memory became free within {PEER_LOST_S} s; {self._num_lost} of "
                f"{self._num_slots} slots are lost to reads that failed"
            ) from None

    def release(self, slot: Slot) -> None:
        """Nothing writes to it any more."""
        self._free.put_nowait(slot)

    def lose(self, slot: Slot) -> None:
        """Something may still write to it."""
        self._num_lost += 1
