"""What one end of a link knows of the group that it has now."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field

import torch

from pdserve.contract.errors import ProtocolViolation
from pdserve.contract.ports import Clock
from pdserve.handoff.transports.pair_groups.budget import GroupBudget
from pdserve.handoff.transports.pair_groups.messages import Entry, LinkMessage
from pdserve.handoff.transports.pair_groups.two_rank_group import Backend, Exchange, TwoRankGroup


@dataclass(frozen=True)
class GroupPlace:
    """Where a worker's groups run, the same for all its links."""

    backend: Backend
    device: torch.device
    clock: Clock
    budget: GroupBudget
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    """Of all groups that are not closed yet; an end of a link does not wait for them."""


class LiveGroup:
    """One group of one link, from the proposal until it is dropped. Implements `Retirable`."""

    def __init__(
        self,
        place: GroupPlace,
        generation: int,
        rank: int,
        post: Callable[[LinkMessage], None],
        is_idle: Callable[[], bool],
        retire: Callable[["LiveGroup"], None],
    ) -> None:
        """`post` says something to the peer."""
        self.generation = generation
        self.dropped = False
        self.settled = asyncio.Event()
        """It is built, or has been dropped before it was."""
        self._post = post
        self._is_idle = is_idle
        self._retire = retire
        self._loop = asyncio.get_running_loop()
        self._exchange = Exchange(self._publish)
        self.group = TwoRankGroup(place.backend, rank, self._exchange, place.device, place.clock)
        self._task: asyncio.Task[None] | None = None
        self._tasks = place.tasks

    @property
    def idle(self) -> bool:
        return self._is_idle()

    @property
    def usable(self) -> bool:
        return self.settled.is_set() and not self.dropped

    def retire(self) -> None:
        self._retire(self)

    def start(self, life: Callable[["LiveGroup"], Coroutine[object, object, None]]) -> None:
        """Run `life` as its task: builds it, uses it, and closes it in the end."""
        self._task = asyncio.create_task(life(self))
        self._tasks.add(self._task)
        self._task.add_done_callback(self._tasks.discard)

    async def build(self, host: str) -> None:
        """`host` is the own address that the peer can reach. Raises GroupFailed."""
        await self.group.build(host)
        self.settled.set()

    def arrive(self, entry: Entry) -> None:
        """What the other rank has set. Raises ProtocolViolation when it is not hexadecimal."""
        try:
            self._exchange.arrive(entry.key, bytes.fromhex(entry.value))
        except ValueError as error:
            raise ProtocolViolation(f"an entry of the rendezvous is not hexadecimal: {error}") from None

    def drop(self) -> None:
        """Use it no more. Its task ends and closes it."""
        self.dropped = True
        self.settled.set()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    def _publish(self, key: str, value: bytes) -> None:
        """Called on the group's thread."""
        self._loop.call_soon_threadsafe(self._post, Entry(self.generation, key, value.hex()))
