"""The controller's logic: keeps the wanted processes alive and tells every router who the workers are.

Knows Ray only as `pools.Processes`.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from controller.integrity import ProcessIntegrity
from controller.plan import Deployment, ModelSource
from controller.pools import ProcessEnded, Processes, Slot
from controller.rollout import rolled_out
from controller.slots import Slots
from controller.status import ROUTER_POOL, ProcessState, ProcessStatus, SystemState, SystemStatus
from pdserve.config import DeployConfig, FaultConfig
from pdserve.contract.errors import ConfigError, NotFound, Unavailable
from pdserve.contract.messages import Member, Members, WorkerState
from pdserve.contract.ports import Clock

REPORT_TIMEOUT_S = 2.0
"""How long status waits for a process that does not answer."""
MAX_NEWS = 1000
"""Changes that are kept for followers; a launcher looks after every one."""


class DeploymentStore(Protocol):
    """Where the controller that comes after this one finds what is wanted. It needs Ray's head."""

    async def keep(self, deployment: Deployment) -> None: ...
    async def forget(self) -> None: ...


class Controller:
    """The slots of one system, and the membership that follows from them."""

    def __init__(
        self,
        deployment: Deployment,
        processes: Processes,
        clock: Clock,
        store: DeploymentStore,
        tell: Callable[[SystemStatus], None] = lambda _: None,
    ) -> None:
        """`deployment` is what was wanted last; `tell` hears of every change."""
        self._tell = tell
        self._store = store
        # Milliseconds: whoever has followed an earlier controller has seen less, and hears of this one.
        self._version = int(clock.unix_time() * 1000)
        self._was_ready = False
        self._is_stopped = False
        self._has_head = True
        self._changed = asyncio.Event()
        self._news: deque[tuple[int, ProcessStatus]] = deque(maxlen=MAX_NEWS)  # (version, what it brought)
        self._noted: dict[str, tuple[ProcessState, str]] = {}  # process id -> the last of its news
        self._members = Members(-1, ())
        self._told: dict[str, int] = {}  # router id -> epoch that it was sent last
        self._connected: dict[str, int] = {}  # router id -> epoch in which it reaches all workers
        self._wanting = asyncio.Lock()  # each change starts from what the one before has made
        self._slots = Slots(deployment, processes, clock, self._on_change)

    @property
    def _deployment(self) -> Deployment:
        return self._slots.deployment

    @property
    def model(self) -> ModelSource:
        return self._deployment.model

    def tell(self, process_id: str, message: str) -> None:
        """What a process does while it starts."""
        slot = self._slots.find(process_id)
        if slot is not None:
            slot.tell(message)

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
                await asyncio.gather(*[slot.refresh() for slot in self._slots])
        return self._status()

    async def check_integrity(self) -> tuple[ProcessIntegrity, ...]:
        """Let every process check its own books; who does not answer in time has no report."""
        return tuple(await asyncio.gather(*[self._inspect(slot) for slot in self._slots]))

    async def scale(self, sizes: Mapping[str, int], deadline_s: float | None) -> SystemStatus:
        """Let pools have other numbers of workers, by the configuration's names. Who is too many there leaves
        in `deadline_s` (None: as configured). Returns before all that is done. Raises ConfigError."""
        async with self._wanting:
            wanted = self._deployment.resized(sizes)
            await self._want(wanted, dict.fromkeys(wanted.pools_of(sizes), self._deadline_s(deadline_s)))
        return self._status()

    async def drain(self, worker_id: str, deadline_s: float | None) -> int:
        """Let a worker leave; another takes its place, unless its pool is to be smaller. Returns the id of
        the process that leaves, before it has left. Raises NotFound or Unavailable."""
        slot = self._slots.find(worker_id)
        if slot is None or slot.spec.pool == ROUTER_POOL:
            known = ", ".join(slot.spec.id for slot in self._slots.workers)
            raise NotFound(f"there is no worker {worker_id!r}: there are {known}")
        if slot.state not in (ProcessState.READY, ProcessState.DRAINING) or slot.last_report is None:
            raise Unavailable(f"{worker_id} is {slot.state.value}, so there is nothing to drain")
        pid = slot.last_report.pid
        self._slots.drain(slot, self._deadline_s(deadline_s))
        return pid

    async def roll_out(
        self, config: DeployConfig, model: ModelSource, deadline_s: float | None
    ) -> SystemStatus:
        """Replace the workers, one after the other, by such as `config` makes them. Each leaves in
        `deadline_s` (None: as configured). Returns before that is done. Raises ConfigError."""
        async with self._wanting:
            wanted = rolled_out(self._deployment, config, model)
            await self._want(replace(wanted, rollout_deadline_s=deadline_s), {})
        return self._status()

    def _deadline_s(self, wanted_s: float | None) -> float:
        return self._deployment.config.pools.drain_deadline_s if wanted_s is None else wanted_s

    async def _want(self, deployment: Deployment, deadlines_s: Mapping[str, float]) -> None:
        if deployment != self._deployment:
            await self._store.keep(deployment)
        self._slots.want(deployment, deadlines_s)
        self._on_change()

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
        slots = [slot for slot in self._slots if fault.is_for(slot.spec.id)]
        ready = [slot for slot in slots if slot.state is ProcessState.READY]
        if not ready:
            known = ", ".join(slot.spec.id for slot in self._slots)
            raise NotFound(f"no process {fault.process!r} is ready to suffer a fault; there are {known}")
        arming = [self._slots.run_errand(_arm(slot, fault)) for slot in ready]
        if fault.at != "now":  # that may take the process' answer with it
            await asyncio.gather(*arming)
        return tuple(slot.spec.id for slot in ready)

    async def shut_down(self) -> None:
        """End all processes: first the routers, then the workers."""
        self._is_stopped = True
        await self._slots.close()
        if self._has_head:
            with contextlib.suppress(TimeoutError):  # the head has gone just now
                async with asyncio.timeout(REPORT_TIMEOUT_S):
                    await self._store.forget()

    @staticmethod
    async def _inspect(slot: Slot) -> ProcessIntegrity:
        try:
            async with asyncio.timeout(REPORT_TIMEOUT_S):
                return await slot.inspect()
        except TimeoutError:
            return ProcessIntegrity(slot.spec.id, "silent", None)

    def _on_change(self) -> None:
        self._version += 1
        self._note_news()
        if not self._is_stopped:
            self._slots.advance()
            self._update_members()
            self._tell_routers()
            self._advance_rollout()
        self._was_ready = self._was_ready or self._is_ready()
        self._tell(self._status())
        self._changed.set()
        self._changed = asyncio.Event()

    def _advance_rollout(self) -> None:
        """Let the next worker of an earlier generation leave, when all others serve and the routers know."""
        outdated = [slot for slot in self._slots.workers if self._is_outdated(slot)]
        if outdated and self._is_ready():
            first = min(outdated, key=lambda slot: (slot.spec.index, slot.spec.pool))
            if not first.is_to_leave:
                self._slots.drain(first, self._deadline_s(self._deployment.rollout_deadline_s))

    def _is_outdated(self, slot: Slot) -> bool:
        return slot.last_report is not None and slot.last_report.generation < self._deployment.generation

    def _note_news(self) -> None:
        for process in (slot.status for slot in self._slots):
            if self._noted.get(process.id) != (process.state, process.message):
                self._noted[process.id] = (process.state, process.message)
                self._news.append((self._version, process))

    def _update_members(self) -> None:
        """Take over who is ready. Nobody is let go before it is known who lives, so a controller that was
        restarted takes no worker away from the routers."""
        if not all(slot.is_settled for slot in self._slots):
            return
        members = tuple(member for slot in self._slots.workers if (member := _member(slot)) is not None)
        seen = max((slot.last_report.epoch for slot in self._slots.routers if slot.last_report), default=-1)
        if members != self._members.members or seen > self._members.epoch:
            self._members = Members(max(seen, self._members.epoch) + 1, members)

    def _tell_routers(self) -> None:
        """Send the membership to every router that does not have it yet."""
        for slot in self._slots.routers:
            if slot.state is not ProcessState.READY:
                self._told.pop(slot.spec.id, None)
                self._connected.pop(slot.spec.id, None)
            elif self._told.get(slot.spec.id, -1) < self._members.epoch:
                self._told[slot.spec.id] = self._members.epoch
                self._slots.run_errand(self._push(slot, self._members))

    async def _push(self, slot: Slot, members: Members) -> None:
        if slot.process is not None:
            with contextlib.suppress(ProcessEnded):  # the slot hears of it too
                await slot.process.set_members(members)
                # An earlier one may return later: it has waited for a worker that is no member any more.
                known = self._connected.get(slot.spec.id, -1)
                self._connected[slot.spec.id] = max(known, members.epoch)
                self._on_change()

    def _is_ready(self) -> bool:
        alive = all(slot.state is ProcessState.READY for slot in self._slots)
        epoch = self._members.epoch
        return alive and all(self._connected.get(slot.spec.id) == epoch for slot in self._slots.routers)

    def _status(self) -> SystemStatus:
        return SystemStatus(
            self._version,
            self._deployment.config.name,
            self._state(),
            self._deployment.model.served_name,
            tuple(slot.status for slot in self._slots),
            self._slots.pools,
            self._deployment.generation,
            has_head=self._has_head,
        )

    def _state(self) -> SystemState:
        if self._is_stopped:
            return SystemState.STOPPED
        if self._is_ready():
            return SystemState.READY
        if self._was_ready:
            return SystemState.DEGRADED
        failed = any(slot.state is ProcessState.FAILED for slot in self._slots)
        return SystemState.FAILED if failed else SystemState.STARTING


async def _arm(slot: Slot, fault: FaultConfig) -> None:
    if slot.process is not None:
        with contextlib.suppress(ProcessEnded):  # the slot hears of it too
            await slot.process.arm(fault)


def _member(slot: Slot) -> Member | None:
    """What the routers are told of a worker, from when it is ready until it has ended."""
    member = None if slot.last_report is None else slot.last_report.member
    if member is not None and slot.state is ProcessState.DRAINING:
        return replace(member, state=WorkerState.DRAINING)
    return member if slot.state is ProcessState.READY else None
