"""The controller's logic: keeps the wanted processes alive and tells every router who the workers are.

Knows Ray only as `pools.Processes`.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from controller.integrity import ProcessIntegrity
from controller.plan import Deployment
from controller.pools import ProcessEnded, Processes, Slot
from controller.status import ROUTER_POOL, ProcessState, ProcessStatus, SystemState, SystemStatus
from pdserve.config import FaultConfig
from pdserve.contract.errors import ConfigError, NotFound
from pdserve.contract.messages import Member, Members
from pdserve.contract.ports import Clock
from pdserve.tasks import cancel_and_wait

REPORT_TIMEOUT_S = 2.0
"""How long status waits for a process that does not answer."""
MAX_NEWS = 1000
"""Changes that are kept for followers; a launcher looks after every one."""


class Controller:
    """The slots of one deployment, and the membership that follows from them."""

    def __init__(
        self,
        deployment: Deployment,
        processes: Processes,
        clock: Clock,
        tell: Callable[[SystemStatus], None] = lambda _: None,
    ) -> None:
        """`tell` hears of every change."""
        self._tell = tell
        self._deployment = deployment
        self._version = 0
        self._was_ready = False
        self._is_stopped = False
        self._has_head = True
        self._changed = asyncio.Event()
        self._news: deque[tuple[int, ProcessStatus]] = deque(maxlen=MAX_NEWS)  # (version, what it brought)
        self._noted: dict[str, tuple[ProcessState, str]] = {}  # process id -> the last of its news
        self._members = Members(-1, ())
        self._told: dict[str, int] = {}  # router id -> epoch that it was sent last
        self._connected: dict[str, int] = {}  # router id -> epoch in which it reaches all workers
        timeout_s = deployment.config.ray.placement_timeout_s
        self._slots = {
            spec.id: Slot(spec, processes, clock, timeout_s, self._on_change) for spec in deployment.specs()
        }
        self._keeping = [asyncio.create_task(slot.run()) for slot in self._slots.values()]
        self._pushing: set[asyncio.Task[None]] = set()

    def tell(self, process_id: str, message: str) -> None:
        """What a process does while it starts."""
        self._slots[process_id].tell(message)

    def note_head(self, is_there: bool) -> None:
        """Whether Ray's head is there; without it nobody is replaced."""
        self._has_head = is_there
        self._on_change()

    async def follow(self, seen: int) -> SystemStatus:
        """The status as soon as its version is above `seen`, with the news since then; processes are not
        asked."""
        while self._version <= seen:
            await self._changed.wait()
        news = tuple(process for version, process in self._news if version > seen)
        return replace(self._status(), news=news)

    async def status(self) -> SystemStatus:
        """The status with fresh reports of all processes that answer."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                await asyncio.gather(*[slot.refresh() for slot in self._slots.values()])
        return self._status()

    async def check_integrity(self) -> tuple[ProcessIntegrity, ...]:
        """Let every process check its own books; who does not answer in time has no report."""
        return tuple(await asyncio.gather(*[self._inspect(slot) for slot in self._slots.values()]))

    async def arm(self, fault: FaultConfig) -> tuple[str, ...]:
        """Let the processes that `fault` names suffer it; which those are. Raises ConfigError or NotFound."""
        if not self._deployment.allow_faults:
            raise ConfigError("faults are not allowed here: start the system with --allow-faults")
        if fault.in_replacements:
            raise ConfigError(
                "in_replacements reaches processes that do not exist yet: write it into faults of the "
                "configuration",
                param="in_replacements",
            )
        slots = [slot for slot in self._slots.values() if fault.is_for(slot.spec.id)]
        ready = [slot for slot in slots if slot.state is ProcessState.READY]
        if not ready:
            known = ", ".join(self._slots)
            raise NotFound(f"no process {fault.process!r} is ready to suffer a fault; there are {known}")
        arming = [asyncio.create_task(_arm(slot, fault)) for slot in ready]
        if fault.at == "now":  # it may take the process' answer with it
            self._pushing.update(arming)
            for task in arming:
                task.add_done_callback(self._pushing.discard)
        else:
            await asyncio.gather(*arming)
        return tuple(slot.spec.id for slot in ready)

    async def shut_down(self) -> None:
        """End all processes: first the routers, then the workers."""
        self._is_stopped = True
        await cancel_and_wait(*self._keeping, *self._pushing)
        await asyncio.gather(*[slot.stop() for slot in self._routers])
        await asyncio.gather(*[slot.stop() for slot in self._workers])

    @staticmethod
    async def _inspect(slot: Slot) -> ProcessIntegrity:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                return await slot.inspect()
        except TimeoutError:
            return ProcessIntegrity(slot.spec.id, "silent", None)

    @property
    def _routers(self) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.spec.pool == ROUTER_POOL]

    @property
    def _workers(self) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.spec.pool != ROUTER_POOL]

    def _on_change(self) -> None:
        if not self._is_stopped:
            self._update_members()
            self._tell_routers()
        self._was_ready = self._was_ready or self._is_ready()
        self._version += 1
        self._note_news()
        self._tell(self._status())
        self._changed.set()
        self._changed = asyncio.Event()

    def _note_news(self) -> None:
        for process in (slot.status for slot in self._slots.values()):
            if self._noted.get(process.id) != (process.state, process.message):
                self._noted[process.id] = (process.state, process.message)
                self._news.append((self._version, process))

    def _update_members(self) -> None:
        """Take over who is ready. Nobody is let go before it is known who lives, so a controller that was
        restarted takes no worker away from the routers."""
        if not all(slot.is_settled for slot in self._slots.values()):
            return
        members = tuple(member for slot in self._workers if (member := _member(slot)) is not None)
        seen = max((slot.last_report.epoch for slot in self._routers if slot.last_report), default=-1)
        if members != self._members.members or seen > self._members.epoch:
            self._members = Members(max(seen, self._members.epoch) + 1, members)

    def _tell_routers(self) -> None:
        """Send the membership to every router that does not have it yet."""
        for slot in self._routers:
            if slot.state is not ProcessState.READY:
                self._told.pop(slot.spec.id, None)
                self._connected.pop(slot.spec.id, None)
            elif self._told.get(slot.spec.id, -1) < self._members.epoch:
                self._told[slot.spec.id] = self._members.epoch
                task = asyncio.create_task(self._push(slot, self._members))
                self._pushing.add(task)
                task.add_done_callback(self._pushing.discard)

    async def _push(self, slot: Slot, members: Members) -> None:
        if slot.process is not None:
            with contextlib.suppress(ProcessEnded):  # the slot hears of it too
                await slot.process.set_members(members)
                self._connected[slot.spec.id] = members.epoch
                self._on_change()

    def _is_ready(self) -> bool:
        alive = all(slot.state is ProcessState.READY for slot in self._slots.values())
        epoch = self._members.epoch
        return alive and all(self._connected.get(slot.spec.id) == epoch for slot in self._routers)

    def _status(self) -> SystemStatus:
        return SystemStatus(
            self._version,
            self._deployment.config.name,
            self._state(),
            self._deployment.model.served_name,
            tuple(slot.status for slot in self._slots.values()),
            has_head=self._has_head,
        )

    def _state(self) -> SystemState:
        if self._is_stopped:
            return SystemState.STOPPED
        if self._is_ready():
            return SystemState.READY
        if self._was_ready:
            return SystemState.DEGRADED
        failed = any(slot.state is ProcessState.FAILED for slot in self._slots.values())
        return SystemState.FAILED if failed else SystemState.STARTING


async def _arm(slot: Slot, fault: FaultConfig) -> None:
    if slot.process is not None:
        with contextlib.suppress(ProcessEnded):  # the slot hears of it too
            await slot.process.arm(fault)


def _member(slot: Slot) -> Member | None:
    """What the routers are told of a worker, once it is ready."""
    if slot.state is not ProcessState.READY or slot.last_report is None:
        return None
    return slot.last_report.member
