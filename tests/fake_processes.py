"""Processes that live and die as told, for the controller's logic in virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from controller.controller import Controller
from controller.plan import Deployment, ModelSource
from controller.pools import ProcessEnded, StartRefused
from controller.status import ProcessReport, ProcessSpec, SystemState, SystemStatus
from pdserve.clock import VirtualClock, run_virtual
from pdserve.config import load_config
from pdserve.contract.ids import Incarnation, WorkerId
from pdserve.contract.messages import Member, Members, Role, WorkerState

START_S = 3.0


class FakeProcess:
    """A router or worker that starts in `START_S` and lives until `die`."""

    def __init__(self, spec: ProcessSpec, number: int) -> None:
        self.spec = spec
        self.number = number
        self.members: Members | None = None
        self.missing = ""
        self.previous: ProcessReport | None = None
        self.refusal = ""
        self.fatal = ""
        self.start_s = START_S
        self.is_killed = False
        self.is_stopped = False
        self.busy_s = 0.0
        """How long it has to do when it is told to leave."""
        self.deadlines: list[float] = []
        """Within which it was told to leave."""
        self.state = WorkerState.READY
        self.generation = 0
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    @property
    def is_over(self) -> bool:
        return self._over.done()

    def die(self, reason: str = "killed") -> None:
        self._over.set_result(reason)

    async def placed(self) -> None:
        if self.missing:
            await self.ended()

    def shortage(self) -> str:
        return self.missing

    async def start(self) -> ProcessReport:
        if self.refusal:
            raise StartRefused(self.refusal)
        await asyncio.wait({self._over}, timeout=self.start_s)
        if self.fatal:
            self.die(self.fatal)
        return await self.report()

    async def ended(self) -> str:
        return await asyncio.shield(self._over)

    async def report(self) -> ProcessReport:
        if self._over.done():
            raise ProcessEnded(self._over.result())
        epoch = self.members.epoch if self.members else -1
        return ProcessReport(
            self.number,
            "node",
            f"host:{self.number}",
            member=self._member(),
            epoch=epoch,
            generation=self.generation,
        )

    async def drain(self, deadline_s: float) -> None:
        if self._over.done():
            raise ProcessEnded(self._over.result())
        self.deadlines.append(deadline_s)
        self.state = WorkerState.DRAINING
        asyncio.get_running_loop().call_later(min(self.busy_s, deadline_s), self._leave)

    def _leave(self) -> None:
        if not self._over.done():
            self.die("stopped")

    async def set_members(self, members: Members) -> None:
        if self._over.done():
            raise ProcessEnded(self._over.result())
        if self.members is None or members.epoch > self.members.epoch:
            self.members = members

    async def stop(self) -> None:
        self.is_stopped = True

    def kill(self) -> None:
        self.is_killed = True

    def _member(self) -> Member | None:
        if self.spec.pool == "router":
            return None
        identity = WorkerId(self.spec.id), f"host:{self.number}", Incarnation(self.number)
        return Member(*identity, Role(self.spec.pool), "r", self.state)


class FakeProcesses:
    """Remembers every process; `left_behind` are those of an earlier controller."""

    def __init__(self, left_behind: "FakeProcesses | None" = None) -> None:
        self.made: list[FakeProcess] = []
        self.prepare: dict[str, str] = {}  # id -> refusal
        self.missing: dict[str, str] = {}  # id -> shortage
        self.fatal: dict[str, str] = {}  # id -> what ends it while it starts
        self.start_s = START_S
        self.busy_s = 0.0
        self.able = asyncio.Event()
        self.able.set()
        self._left_behind = left_behind

    def __getitem__(self, process_id: str) -> FakeProcess:
        """The newest of that id."""
        return [process for process in self.made if process.spec.id == process_id][-1]

    def find(self, spec: ProcessSpec, deployment: Deployment) -> FakeProcess | None:
        if self._left_behind is None or spec not in self._left_behind.living():
            return None
        process = self._left_behind[spec.id]
        self.made.append(process)
        return process

    def left_behind(self, deployment: Deployment) -> list[ProcessSpec]:
        return [] if self._left_behind is None else self._left_behind.living()

    def living(self) -> list[ProcessSpec]:
        return [process.spec for process in self.made if not process.is_over]

    async def until_able(self) -> None:
        await self.able.wait()

    def create(
        self, spec: ProcessSpec, deployment: Deployment, previous: ProcessReport | None
    ) -> FakeProcess:
        number = len(self.made) + (100 if self._left_behind else 0)
        process = FakeProcess(spec, number)
        process.refusal = self.prepare.get(spec.id, "")
        process.missing = self.missing.get(spec.id, "")
        process.fatal = self.fatal.get(spec.id, "")
        process.start_s = self.start_s
        process.previous = previous
        process.generation = deployment.generation
        process.busy_s = self.busy_s
        self.made.append(process)
        return process


class FakeStore:
    """Keeps a deployment for the controller that comes next."""

    def __init__(self) -> None:
        self.kept: Deployment | None = None

    async def keep(self, deployment: Deployment) -> None:
        await asyncio.sleep(0)
        self.kept = deployment

    async def forget(self) -> None:
        self.kept = None


def controller_of(
    deployment: Deployment,
    processes: FakeProcesses,
    clock: VirtualClock | None = None,
    store: FakeStore | None = None,
) -> Controller:
    return Controller(deployment, processes, clock or VirtualClock(), store or FakeStore())


def vanish(controller: Controller) -> None:
    """The controller's process is gone, without a word to anybody."""
    for task in [*controller._slots._keepers.values(), *controller._slots._errands]:
        task.cancel()


def deployment(**options: object) -> Deployment:
    config = load_config(None, {key.replace("__", "."): value for key, value in options.items()})
    return Deployment(config, ModelSource("/model", None, "model"))


async def follow_until(controller: Controller, state: SystemState) -> SystemStatus:
    status = await controller.follow(0)
    while status.state is not state:
        status = await controller.follow(status.version)
    return status


def virtually(test: Coroutine[Any, Any, None]) -> None:
    run_virtual(test)
