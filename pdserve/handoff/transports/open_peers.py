"""What a worker keeps open of other processes on its host, for as long as those live and calls need it."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from pdserve.contract.errors import StreamBroken

T = TypeVar("T")

MAX_IDLE = 8
"""How many things stay open while no call uses them."""


class Peer(Generic[T]):
    """Something that is open of the process `pid`."""

    def __init__(self, key: tuple[int, bytes], opened: T, pidfd: int) -> None:
        self.key = key
        self.opened = opened
        self.pidfd = pidfd
        self.num_calls = 0
        self.retired = False
        """Its process has ended, or room was needed: closed when the last call releases it."""


class OpenPeers(Generic[T]):
    """By (pid, handle), least recently acquired first. `close_one` may take its time."""

    def __init__(self, close_one: Callable[[T], Awaitable[None]]) -> None:
        self._close_one = close_one
        self._peers: dict[tuple[int, bytes], Peer[T]] = {}
        self._opening: dict[tuple[int, bytes], asyncio.Task[Peer[T]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def acquire(self, pid: int, handle: bytes, open_one: Callable[[], Awaitable[T]]) -> Peer[T]:
        """What `open_one` opens of process `pid`, or has opened before, for one more call.

        Raises StreamBroken when the process is gone, and what `open_one` raises.
        """
        key = (pid, handle)
        peer = self._peers.get(key)
        if peer is None:
            # A caller that is cancelled leaves what it has begun to open to the next one.
            peer = await asyncio.shield(self._begin_to_open(key, open_one))
        if peer.retired:
            raise StreamBroken(f"process {pid} is gone")
        self._peers[key] = self._peers.pop(key)
        peer.num_calls += 1
        return peer

    def release(self, peer: Peer[T]) -> None:
        peer.num_calls -= 1
        if peer.retired and not peer.num_calls:
            self._close(peer)
        idle = [peer for peer in self._peers.values() if not peer.num_calls]
        for surplus in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(surplus)

    async def close(self) -> None:
        """Close everything; no call uses anything any more."""
        await asyncio.gather(*self._opening.values(), return_exceptions=True)
        for peer in list(self._peers.values()):
            self._retire(peer)
        await asyncio.gather(*self._closing)

    def _begin_to_open(
        self, key: tuple[int, bytes], open_one: Callable[[], Awaitable[T]]
    ) -> "asyncio.Task[Peer[T]]":
        if key not in self._opening:
            self._opening[key] = asyncio.ensure_future(self._open(key, open_one))
            self._opening[key].add_done_callback(lambda opened: self._opened(key, opened))
        return self._opening[key]

    async def _open(self, key: tuple[int, bytes], open_one: Callable[[], Awaitable[T]]) -> Peer[T]:
        try:
            pidfd = os.pidfd_open(key[0])
        except OSError as error:
            raise StreamBroken(f"process {key[0]} is gone ({error.strerror})") from error
        try:
            peer = Peer(key, await open_one(), pidfd)
        except BaseException:
            os.close(pidfd)
            raise
        self._peers[key] = peer
        asyncio.get_running_loop().add_reader(pidfd, self._retire, peer)
        return peer

    def _opened(self, key: tuple[int, bytes], opened: "asyncio.Task[Peer[T]]") -> None:
        del self._opening[key]
        if not opened.cancelled():
            opened.exception()  # has been seen, also when nobody waits any more

    def _retire(self, peer: Peer[T]) -> None:
        asyncio.get_running_loop().remove_reader(peer.pidfd)
        if self._peers.get(peer.key) is peer:
            del self._peers[peer.key]
        peer.retired = True
        if not peer.num_calls:
            self._close(peer)

    def _close(self, peer: Peer[T]) -> None:
        os.close(peer.pidfd)
        closing = asyncio.ensure_future(self._close_one(peer.opened))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
