"""The slots of a system, made to fit what is wanted of it: who is missing is started, who is too many leaves
in good order. Knows no Ray."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from typing import Any

from controller.plan import Deployment
from controller.pools import Process, Processes, Slot
from controller.status import ROUTER_POOL, PoolStatus, ProcessSpec, ProcessState
from pdserve.contract.ports import Clock
from pdserve.tasks import cancel_and_wait


class Slots:
    """All slots of one system, each with the task that keeps a process in it."""

    def __init__(
        self, deployment: Deployment, processes: Processes, clock: Clock, changed: Callable[[], None]
    ) -> None:
        """`changed` is called after every change of a slot."""
        self.deployment = deployment
        self._deadlines_s: dict[str, float] = {}  # pool -> within which who is too many there is to leave
        self._processes = processes
        self._clock = clock
        self._changed = changed
        self._slots: dict[str, Slot] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._errands: set[asyncio.Task[None]] = set()
        for spec in [*deployment.specs(), *self._too_many(processes.left_behind(deployment))]:
            self._add(spec, processes.find(spec, deployment))
        self._note_who_is_wanted()

    def __iter__(self) -> Iterator[Slot]:
        """By pool, routers first, and by index."""
        pools = self.deployment.pool_names
        return iter(sorted(self._slots.values(), key=lambda s: (pools.index(s.spec.pool), s.spec.index)))

    def __getitem__(self, process_id: str) -> Slot:
        return self._slots[process_id]

    def find(self, process_id: str) -> Slot | None:
        return self._slots.get(process_id)

    @property
    def routers(self) -> list[Slot]:
        return [slot for slot in self if slot.spec.pool == ROUTER_POOL]

    @property
    def workers(self) -> list[Slot]:
        return [slot for slot in self if slot.spec.pool != ROUTER_POOL]

    @property
    def pools(self) -> tuple[PoolStatus, ...]:
        return tuple(self._pool(name) for name in self.deployment.pool_names)

    def want(self, deployment: Deployment, deadlines_s: Mapping[str, float]) -> None:
        """Whoever is missing is started, whoever is too many is to leave, and what was given up is tried
        again. In the pools of `deadlines_s` they leave within that time, also who is leaving already."""
        self.deployment = deployment
        self._deadlines_s.update(deadlines_s)
        for spec in deployment.specs():
            if spec.id not in self._slots:
                self._add(spec, None)
        self._note_who_is_wanted()
        for slot in self:
            leaves = slot.is_to_leave or slot.state is ProcessState.DRAINING
            if leaves and not slot.is_wanted and slot.spec.pool in deadlines_s:
                self.drain(slot, deadlines_s[slot.spec.pool])
            elif slot.state is ProcessState.FAILED and slot.is_wanted:
                slot.forgive()
                self._keep(slot, None)

    def advance(self) -> None:
        """Empty the slots that are not wanted, each as soon as that can be. Called after every change."""
        for slot in [slot for slot in self if not slot.is_wanted]:
            if slot.state is ProcessState.READY and not slot.is_to_leave:
                configured_s = self.deployment.config.pools.drain_deadline_s
                self.drain(slot, self._deadlines_s.get(slot.spec.pool, configured_s))
            elif slot.state is ProcessState.STOPPED:
                self._remove(slot)
            elif slot.state not in (ProcessState.READY, ProcessState.DRAINING) and slot.is_settled:
                keeper = self._remove(slot)
                self.run_errand(_abandon(slot, keeper))

    def drain(self, slot: Slot, deadline_s: float) -> None:
        """Begin to let the process of `slot` leave."""
        slot.is_to_leave = True
        self.run_errand(slot.drain(deadline_s))

    def run_errand(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Something that may take a while, and ends at the latest with `close`."""
        task = asyncio.create_task(work)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)
        return task

    async def close(self) -> None:
        """End all processes: first the routers, then the workers."""
        await cancel_and_wait(*self._keepers.values(), *self._errands)
        await asyncio.gather(*[slot.stop() for slot in self.routers])
        await asyncio.gather(*[slot.stop() for slot in self.workers])

    def _too_many(self, specs: Iterable[ProcessSpec]) -> list[ProcessSpec]:
        """The workers among them that are not wanted."""
        wanted, pools = self.deployment.specs(), self.deployment.pool_names[1:]
        return [spec for spec in specs if spec.pool in pools and spec not in wanted]

    def _add(self, spec: ProcessSpec, found: Process | None) -> None:
        slot = Slot(spec, lambda: self.deployment, self._processes, self._clock, self._changed)
        self._slots[spec.id] = slot
        self._keep(slot, found)

    def _keep(self, slot: Slot, found: Process | None) -> None:
        self._keepers[slot.spec.id] = asyncio.create_task(slot.run(found))

    def _remove(self, slot: Slot) -> asyncio.Task[None]:
        del self._slots[slot.spec.id]
        return self._keepers.pop(slot.spec.id)

    def _note_who_is_wanted(self) -> None:
        wanted = self.deployment.specs()
        for slot in self:
            slot.is_wanted = slot.spec in wanted

    def _pool(self, name: str) -> PoolStatus:
        states = [slot.state for slot in self if slot.spec.pool == name]
        return PoolStatus(
            name,
            self.deployment.num_wanted(name),
            states.count(ProcessState.READY),
            states.count(ProcessState.DRAINING),
        )


async def _abandon(slot: Slot, keeper: asyncio.Task[None]) -> None:
    """End what serves nobody yet, or any more."""
    try:
        await cancel_and_wait(keeper)
    finally:
        await slot.stop()
