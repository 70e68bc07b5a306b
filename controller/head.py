"""Ray's head: without it no process can be started or killed through Ray, and all that run go on."""

import asyncio
import socket
from collections.abc import Callable

REACH_TIMEOUT_S = 5.0
LOOK_S = 2.0
"""Between two looks at the head: Ray tells nobody that it is gone."""


def reach(host: str, port: int) -> None:
    """Raises OSError where nothing listens there."""
    socket.create_connection((host.strip("[]"), port), REACH_TIMEOUT_S).close()


async def answers(address: str) -> bool:
    """Whether something listens at the head's ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        await asyncio.to_thread(reach, host, int(port))
    except OSError:
        return False
    return True


class HeadWatch:
    """Knows whether the head is there, not older than `LOOK_S` and the time that it takes to reach it."""

    def __init__(self, address: str, changed: Callable[[bool], None]) -> None:
        """`changed` is told when the head goes and when it is back; in the beginning it is there."""
        self._address = address
        self._changed = changed
        self._there = asyncio.Event()
        self._there.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._note(await answers(self._address))
            await asyncio.sleep(LOOK_S)

    async def until_there(self) -> None:
        await self._there.wait()

    def _note(self, is_there: bool) -> None:
        if is_there == self._there.is_set():
            return
        if is_there:
            self._there.set()
        else:
            self._there.clear()
        self._changed(is_there)
