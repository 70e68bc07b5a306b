"""Keeping processes alive: one slot per wanted router or worker. Knows no Ray; effects go through `Process`.

pending -> starting -> ready -> lost -> pending ...
              |          |       +----> failed   (dies again and again)
              |          +----> draining -> pending ..., or stopped where the slot is not wanted any more
              +----> failed              (cannot be started: bad model, no node for it)
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from controller.integrity import IntegrityReport, ProcessIntegrity
from controller.plan import Deployment
from controller.status import ProcessReport, ProcessSpec, ProcessState, ProcessStatus
from pdserve.config import FaultConfig
from pdserve.contract.messages import Members, WorkerState
from pdserve.contract.ports import Clock

log = logging.getLogger(__name__)

STABLE_S = 120.0
"""A process that has served so long starts the count of deaths anew."""
MAX_DEATHS = 5
"""So many in a row end the attempts, however long each start takes."""
MAX_FIRST_DEATHS = 2
"""The same where no process of the slot has ever served: the start of a system fails soon, with the cause."""
FIRST_DELAY_S = 1.0
"""Before the second replacement; doubles with each further one. The first comes at once."""


LEAVE_GRACE_S = 60.0
"""A process that is there so long after the deadline by which it was to leave is killed: it is frozen."""


class ProcessEnded(Exception):
    """The process is over; the message says how."""


class StartRefused(Exception):
    """Starting the process again would end the same way; the message names cause and fix."""


class Process(Protocol):
    """One started router or worker."""

    async def placed(self) -> None:
        """Returns once the process lives. Raises ProcessEnded."""
        ...

    def shortage(self) -> str:
        """Why no node takes the process; empty when one could."""
        ...

    async def start(self) -> ProcessReport:
        """Returns once it serves, with how it is then; at once when it does already. Raises StartRefused or
        ProcessEnded."""
        ...

    async def ended(self) -> str:
        """Returns when the process is over, with the reason."""
        ...

    async def report(self) -> ProcessReport:
        """Raises ProcessEnded."""
        ...

    async def inspect(self) -> IntegrityReport:
        """What it finds when it checks its own books. Raises ProcessEnded."""
        ...

    async def arm(self, fault: FaultConfig) -> None:
        """Let it suffer `fault`, where faults are allowed. Raises ProcessEnded, as when the fault is that."""
        ...

    async def drain(self, deadline_s: float) -> None:
        """Workers: take no new work, and end when what runs is finished or, at the deadline, given back. Of
        several deadlines the earliest counts. Raises ProcessEnded."""
        ...

    async def set_members(self, members: Members) -> None:
        """Routers: returns once it is connected to all of them. Raises ProcessEnded."""
        ...

    async def stop(self) -> None:
        """End what it serves. Does not raise when the process is over already."""
        ...

    def kill(self) -> None:
        """Make sure that it is over. Idempotent."""
        ...


class Processes(Protocol):
    """Makes processes, and finds those that an earlier controller made."""

    def find(self, spec: ProcessSpec, deployment: Deployment) -> Process | None: ...

    def left_behind(self, deployment: Deployment) -> list[ProcessSpec]:
        """Whoever an earlier controller has left."""
        ...

    async def until_able(self) -> None:
        """Returns when `create` can do its work: at once, but not while Ray's head is away."""
        ...

    def create(self, spec: ProcessSpec, deployment: Deployment, previous: ProcessReport | None) -> Process:
        """`previous` is the last report of the process that it replaces."""
        ...


@dataclass(slots=True)
class DeathRecord:
    """How often a slot's process died in a row, and what follows from it. Pure."""

    num_deaths: int = 0
    """Since a process last served for `STABLE_S`."""
    has_served: bool = False
    """A process of the slot has been ready once."""

    def note(self, served_s: float | None) -> float | None:
        """Count the death of a process that served for `served_s`, None when it died before that; seconds to
        wait before the next start, None to give up."""
        self.has_served |= served_s is not None
        self.num_deaths = 1 if (served_s or 0.0) >= STABLE_S else self.num_deaths + 1
        if self.num_deaths >= (MAX_DEATHS if self.has_served else MAX_FIRST_DEATHS):
            return None
        return 0.0 if self.num_deaths == 1 else FIRST_DELAY_S * 2.0 ** (self.num_deaths - 2)

    def describe(self) -> str:
        """For whoever reads why it was given up."""
        when = f"none having served for {STABLE_S:g} s" if self.has_served else "before it could serve"
        return f"it died {self.num_deaths} times in a row, {when}"


_LIVING = (ProcessState.STARTING, ProcessState.READY, ProcessState.DRAINING)


class Slot:
    """One place in a pool. `run` keeps a process in it; `changed` is called after every change."""

    def __init__(
        self,
        spec: ProcessSpec,
        deployment: Callable[[], Deployment],
        processes: Processes,
        clock: Clock,
        changed: Callable[[], None],
    ) -> None:
        """`deployment` is what a process that is created now is made by."""
        self.spec = spec
        self.is_wanted = True
        """Whoever leaves is replaced."""
        self.is_to_leave = False
        """The process is about to hear that it has to leave, or has heard."""
        self.state = ProcessState.PENDING
        self.process: Process | None = None
        self.last_report: ProcessReport | None = None
        self.previous: ProcessReport | None = None
        self.num_restarts = 0
        self.is_settled = False
        """It is known whether an earlier controller has left a living process for this slot."""
        self._message = ""
        self._processes = processes
        self._clock = clock
        self._deployment = deployment
        self._changed = changed
        self._deaths = DeathRecord()
        self._ready_at: float | None = None
        self._kill_at = math.inf
        self._killing: asyncio.Task[None] | None = None  # at that time, unless the process has left

    @property
    def status(self) -> ProcessStatus:
        return ProcessStatus(
            self.spec.id, self.spec.pool, self.state, self._message, self.num_restarts, self.last_report
        )

    async def run(self, process: Process | None) -> None:
        """Until cancelled, until starting it once more makes no sense, or until the process has left and no
        other is wanted. `process` is what an earlier controller has left here."""
        self.is_settled = process is None
        self._changed()
        while True:
            try:
                await self._live(process or await self._create())
            except StartRefused as error:
                if not self._deaths.has_served:
                    return self._set(ProcessState.FAILED, str(error))
                reason = str(error)  # it could be started once, so what is in its way now may pass
            except ProcessEnded as error:
                reason = str(error)
            process = None
            if self.state is ProcessState.DRAINING:
                self._note_leave()
                if not self.is_wanted:
                    return self._set(ProcessState.STOPPED)
            elif not await self._pause(reason):
                return None
            else:
                self.num_restarts += 1

    def tell(self, message: str) -> None:
        """What the process does at the moment, for whoever watches it start."""
        if self.state is ProcessState.STARTING:
            self._set(self.state, message)

    def forgive(self) -> None:
        """Forget the deaths for which it was given up; `run` may be called again."""
        self._deaths = DeathRecord()
        self._set(ProcessState.PENDING)

    async def drain(self, deadline_s: float) -> None:
        """Let the process leave in good order, and kill it if it is still there long after that. Returns when
        it has heard of it."""
        process = self.process
        if process is None or self.state not in (ProcessState.READY, ProcessState.DRAINING):
            return
        if self.state is ProcessState.READY:
            self._set(ProcessState.DRAINING)
        self._kill_in(deadline_s + LEAVE_GRACE_S, process)
        with contextlib.suppress(ProcessEnded):  # `run` hears of it too
            await process.drain(deadline_s)

    async def refresh(self) -> None:
        """Ask the process for its report."""
        if self.process is not None and self.state in _LIVING:
            try:
                self.last_report = await self.process.report()
            except ProcessEnded:
                return  # `run` hears of it too

    async def inspect(self) -> ProcessIntegrity:
        """Let the process check its own books."""
        report = None
        if self.process is not None and self.state in _LIVING:
            with contextlib.suppress(ProcessEnded):
                report = await self.process.inspect()
        return ProcessIntegrity(self.spec.id, self.state.value, report)

    async def stop(self) -> None:
        """End the process. `run` has to be cancelled before."""
        process, self.process = self.process, None
        if process is not None:
            try:
                await process.stop()
            finally:
                process.kill()
        self._set(ProcessState.STOPPED)

    async def _create(self) -> Process:
        await self._processes.until_able()
        return self._processes.create(self.spec, self._deployment(), self.previous)

    async def _live(self, process: Process) -> None:
        """One process from its creation to its end."""
        self.process, self.is_to_leave = process, False
        self._set(ProcessState.PENDING)
        try:
            await self._place(process)
            self._set(ProcessState.STARTING)
            self.last_report = await process.start()
            self.is_settled = True
            self._ready_at = self._clock.now()
            self._set(ProcessState.DRAINING if _is_draining(self.last_report) else ProcessState.READY)
            raise ProcessEnded(await process.ended())
        except (ProcessEnded, StartRefused):
            process.kill()
            self.previous = self.last_report or self.previous
            self.process = self.last_report = None
            self.is_settled = True
            raise
        finally:
            self._kill_no_more()

    def _kill_in(self, seconds: float, process: Process) -> None:
        """Of several times the earliest counts."""
        kill_at = self._clock.now() + seconds
        if kill_at < self._kill_at:
            self._kill_no_more()
            self._kill_at = kill_at
            self._killing = asyncio.create_task(self._kill(seconds, process))

    async def _kill(self, seconds: float, process: Process) -> None:
        await self._clock.sleep(seconds)
        log.warning("%s has not left within %g s; killing it", self.spec.id, seconds)
        process.kill()

    def _kill_no_more(self) -> None:
        if self._killing is not None:
            self._killing.cancel()
        self._kill_at, self._killing = math.inf, None

    async def _place(self, process: Process) -> None:
        placing = asyncio.create_task(process.placed())
        try:
            await asyncio.wait({placing}, timeout=self._deployment().config.ray.placement_timeout_s)
            missing = "" if placing.done() else process.shortage()
            if missing and self.num_restarts == 0 and not self._deaths.has_served:
                raise StartRefused(missing)
            if missing:  # it ran before, so the cluster has lost a node and may get another
                self._set(ProcessState.PENDING, missing)
            await placing
        finally:
            placing.cancel()

    def _note_leave(self) -> None:
        """No death. What comes next is as sure to start, unless it is made by another configuration."""
        self._ready_at = None
        was_same = self.previous is not None and self.previous.generation == self._deployment().generation
        self._deaths = DeathRecord(has_served=was_same)

    async def _pause(self, reason: str) -> bool:
        """Wait before the next start; False when there is to be none."""
        log.warning("%s ended: %s", self.spec.id, reason)
        served_s = None if self._ready_at is None else self._clock.now() - self._ready_at
        self._ready_at = None
        delay_s = self._deaths.note(served_s)
        if delay_s is None:
            self._set(ProcessState.FAILED, f"{self._deaths.describe()}; the last time: {reason}")
            return False
        self._set(ProcessState.LOST, reason)
        await self._clock.sleep(delay_s)
        return True

    def _set(self, state: ProcessState, message: str = "") -> None:
        self.state, self._message = state, message
        self._changed()


def _is_draining(report: ProcessReport) -> bool:
    """A process that an earlier controller has told to leave."""
    return report.member is not None and report.member.state is WorkerState.DRAINING
