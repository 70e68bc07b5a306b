"""Slots and the controller over processes that live and die as told, in virtual time."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from controller.controller import Controller
from controller.plan import Deployment, ModelSource
from controller.pools import MAX_DEATHS, MAX_FIRST_DEATHS, STABLE_S, DeathRecord, ProcessEnded, StartRefused
from controller.status import ProcessReport, ProcessSpec, ProcessState, SystemState, SystemStatus
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
        self._over: asyncio.Future[str] = asyncio.get_running_loop().create_future()

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
        return ProcessReport(self.number, "node", f"host:{self.number}", member=self._member(), epoch=epoch)

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
        return Member(*identity, Role(self.spec.pool), "r", WorkerState.READY)


class FakeProcesses:
    """Remembers every process; `left_behind` are those of an earlier controller."""

    def __init__(self, left_behind: "FakeProcesses | None" = None) -> None:
        self.made: list[FakeProcess] = []
        self.prepare: dict[str, str] = {}  # id -> refusal
        self.missing: dict[str, str] = {}  # id -> shortage
        self.fatal: dict[str, str] = {}  # id -> what ends it while it starts
        self.start_s = START_S
        self.able = asyncio.Event()
        self.able.set()
        self._left_behind = left_behind

    def __getitem__(self, process_id: str) -> FakeProcess:
        """The newest of that id."""
        return [process for process in self.made if process.spec.id == process_id][-1]

    def find(self, spec: ProcessSpec) -> FakeProcess | None:
        if self._left_behind is None:
            return None
        process = self._left_behind[spec.id]
        if process._over.done():
            return None
        self.made.append(process)
        return process

    async def until_able(self) -> None:
        await self.able.wait()

    def create(self, spec: ProcessSpec, previous: ProcessReport | None) -> FakeProcess:
        number = len(self.made) + (100 if self._left_behind else 0)
        process = FakeProcess(spec, number)
        process.refusal = self.prepare.get(spec.id, "")
        process.missing = self.missing.get(spec.id, "")
        process.fatal = self.fatal.get(spec.id, "")
        process.start_s = self.start_s
        process.previous = previous
        self.made.append(process)
        return process


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


def test_a_system_starts_and_routers_know_all_workers() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        status = await follow_until(controller, SystemState.READY)
        assert [process.id for process in status.processes] == ["router-0", "prefill-0", "decode-0"]
        members = processes["router-0"].members
        assert members is not None
        assert [member.worker_id for member in members.members] == ["prefill-0", "decode-0"]
        assert [member.role for member in members.members] == [Role.PREFILL, Role.DECODE]
        await controller.shut_down()

    virtually(scenario())


def test_without_a_prefill_pool_workers_are_unsplit() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        plan = deployment(pools__prefill__replicas=0, pools__decode__replicas=2)
        controller = Controller(plan, processes, VirtualClock())
        await follow_until(controller, SystemState.READY)
        assert [process.spec.id for process in processes.made] == ["router-0", "unsplit-0", "unsplit-1"]
        await controller.shut_down()

    virtually(scenario())


def test_a_dead_worker_leaves_the_membership_and_is_replaced() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        ready = await follow_until(controller, SystemState.READY)
        router, dead = processes["router-0"], processes["decode-0"]
        dead.die("its process died: killed")
        lost = await controller.follow(ready.version)
        assert (lost.state, lost.workers[1].state) == (SystemState.DEGRADED, ProcessState.LOST)
        assert lost.workers[1].message == "its process died: killed"
        await asyncio.sleep(0)
        assert router.members is not None
        assert [member.worker_id for member in router.members.members] == ["prefill-0"]
        again = await follow_until(controller, SystemState.READY)
        assert again.workers[1].num_restarts == 1
        assert dead.is_killed
        assert [member.incarnation for member in router.members.members] == [1, processes["decode-0"].number]
        await controller.shut_down()

    virtually(scenario())


def test_a_dead_worker_is_replaced_when_rays_head_is_back() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        ready = await follow_until(controller, SystemState.READY)
        assert ready.has_head
        processes.able.clear()
        controller.note_head(False)
        away = await controller.follow(ready.version)
        assert (away.state, away.has_head) == (SystemState.READY, False)
        processes["decode-0"].die()
        lost = await controller.follow(away.version)
        assert (lost.state, lost.workers[1].state) == (SystemState.DEGRADED, ProcessState.LOST)
        await asyncio.sleep(MAX_DEATHS * STABLE_S)
        assert len(processes.made) == 3
        processes.able.set()
        controller.note_head(True)
        again = await follow_until(controller, SystemState.READY)
        assert (again.has_head, again.workers[1].num_restarts) == (True, 1)
        await controller.shut_down()

    virtually(scenario())


def test_a_dead_router_is_replaced_and_told_who_is_there() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        await follow_until(controller, SystemState.READY)
        first = processes["router-0"]
        first.die()
        await follow_until(controller, SystemState.DEGRADED)
        await follow_until(controller, SystemState.READY)
        second = processes["router-0"]
        assert second is not first
        assert second.previous is not None
        assert second.previous.pid == first.number
        assert second.members is not None
        assert first.members is not None
        assert second.members.members == first.members.members
        await controller.shut_down()

    virtually(scenario())


@pytest.mark.parametrize("start_s", [START_S, 10 * STABLE_S])
def test_a_worker_that_dies_again_and_again_is_given_up_with_the_reason(start_s: float) -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.start_s = start_s
        controller = Controller(deployment(), processes, VirtualClock())
        await follow_until(controller, SystemState.READY)
        for _ in range(MAX_DEATHS):
            processes["decode-0"].die("out of memory")
            await follow_until(controller, SystemState.DEGRADED)
            await asyncio.sleep(start_s + 10)
        status = await controller.status()
        assert status.failed is not None
        assert status.failed.id == "decode-0"
        assert "out of memory" in status.failed.message
        assert f"{MAX_DEATHS} times in a row, none having served for" in status.failed.message
        await controller.shut_down()

    virtually(scenario())


def test_a_worker_that_dies_now_and_then_is_always_replaced() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        for num_restarts in range(3 * MAX_DEATHS):
            ready = await follow_until(controller, SystemState.READY)
            assert ready.workers[1].num_restarts == num_restarts
            await asyncio.sleep(STABLE_S)
            processes["decode-0"].die()
            await follow_until(controller, SystemState.DEGRADED)
        await controller.shut_down()

    virtually(scenario())


@pytest.mark.parametrize("start_s", [START_S, 10 * STABLE_S])
def test_a_worker_that_dies_while_the_system_starts_soon_fails_the_start(start_s: float) -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.start_s = start_s
        processes.fatal["decode-0"] = "out of memory"
        controller = Controller(deployment(), processes, VirtualClock())
        status = await follow_until(controller, SystemState.FAILED)
        assert status.failed is not None
        assert status.failed.message == (
            f"it died {MAX_FIRST_DEATHS} times in a row, before it could serve; the last time: out of memory"
        )
        assert len([process for process in processes.made if process.spec.id == "decode-0"]) == 2
        await controller.shut_down()

    virtually(scenario())


def test_what_keeps_a_replacement_from_starting_may_pass() -> None:
    """The first start of a slot is refused for good; a later one is tried again."""

    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        ready = await follow_until(controller, SystemState.READY)
        processes.prepare["decode-0"] = "the hub cannot be reached"
        processes["decode-0"].die()
        lost = await controller.follow(ready.version)
        while lost.workers[1].message != "the hub cannot be reached":
            lost = await controller.follow(lost.version)
        assert lost.workers[1].state is ProcessState.LOST
        processes.prepare.clear()
        again = await follow_until(controller, SystemState.READY)
        assert again.workers[1].num_restarts == 2
        await controller.shut_down()

    virtually(scenario())


def test_a_follower_who_looks_late_hears_of_everything_that_happened() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        ready = await follow_until(controller, SystemState.READY)
        processes["decode-0"].die("killed")
        await asyncio.sleep(START_S / 2)
        controller.tell("decode-0", "loading weights")
        await asyncio.sleep(START_S)
        status = await controller.follow(ready.version)
        assert [(news.id, news.state, news.message) for news in status.news] == [
            ("decode-0", ProcessState.LOST, "killed"),
            ("decode-0", ProcessState.PENDING, ""),
            ("decode-0", ProcessState.STARTING, ""),
            ("decode-0", ProcessState.STARTING, "loading weights"),
            ("decode-0", ProcessState.READY, ""),
        ]
        assert [news.num_restarts for news in status.news] == [0, 1, 1, 1, 1]
        await controller.shut_down()

    virtually(scenario())


def test_a_model_that_is_refused_fails_the_start_at_once() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.prepare["prefill-0"] = "model 'x' is quantised"
        controller = Controller(deployment(), processes, VirtualClock())
        status = await follow_until(controller, SystemState.FAILED)
        assert status.failed is not None
        assert (status.failed.id, status.failed.message) == ("prefill-0", "model 'x' is quantised")
        assert len([process for process in processes.made if process.spec.id == "prefill-0"]) == 1
        await controller.shut_down()

    virtually(scenario())


def test_what_no_node_takes_fails_the_start_and_names_what_is_missing() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.missing["decode-0"] = "decode-0 cannot be placed: it asks for GPU 1"
        clock = VirtualClock()
        controller = Controller(deployment(), processes, clock)
        status = await follow_until(controller, SystemState.FAILED)
        assert status.failed is not None
        assert status.failed.message == "decode-0 cannot be placed: it asks for GPU 1"
        assert clock.now() == pytest.approx(5.0)
        await controller.shut_down()

    virtually(scenario())


def test_a_replacement_waits_for_a_node_as_long_as_it_takes() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        await follow_until(controller, SystemState.READY)
        processes.missing["decode-0"] = "no node has that"
        processes["decode-0"].die()
        await asyncio.sleep(3600)
        status = await controller.status()
        assert status.workers[1].state is ProcessState.PENDING
        assert status.workers[1].message == "no node has that"
        await controller.shut_down()

    virtually(scenario())


def test_a_restarted_controller_takes_over_what_lives() -> None:
    async def scenario() -> None:
        earlier = FakeProcesses()
        first = Controller(deployment(), earlier, VirtualClock())
        await follow_until(first, SystemState.READY)
        router = earlier["router-0"]
        told = router.members
        for task in first._keeping:  # the controller's process is gone, without a word to anybody
            task.cancel()
        processes = FakeProcesses(left_behind=earlier)
        second = Controller(deployment(), processes, VirtualClock())
        await follow_until(second, SystemState.READY)
        assert processes.made == earlier.made
        assert router.members is not None
        assert told is not None
        assert router.members.members == told.members
        assert router.members.epoch > told.epoch
        await second.shut_down()

    virtually(scenario())


def test_a_restarted_controller_replaces_what_died_meanwhile() -> None:
    async def scenario() -> None:
        earlier = FakeProcesses()
        first = Controller(deployment(), earlier, VirtualClock())
        await follow_until(first, SystemState.READY)
        for task in first._keeping:
            task.cancel()
        earlier["decode-0"].die()
        processes = FakeProcesses(left_behind=earlier)
        second = Controller(deployment(), processes, VirtualClock())
        await follow_until(second, SystemState.READY)
        router = earlier["router-0"]
        assert router.members is not None
        assert [member.incarnation for member in router.members.members] == [1, processes["decode-0"].number]
        await second.shut_down()

    virtually(scenario())


def test_the_end_stops_routers_before_workers_and_leaves_nothing() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        await follow_until(controller, SystemState.READY)
        order: list[str] = []
        for process in processes.made:
            process.stop = _noting(order, process)  # type: ignore[method-assign]
        await controller.shut_down()
        assert order[0] == "router-0"
        assert sorted(order) == ["decode-0", "prefill-0", "router-0"]
        assert all(process.is_killed for process in processes.made)
        assert (await controller.status()).state is SystemState.STOPPED

    virtually(scenario())


def _noting(order: list[str], process: FakeProcess) -> Any:
    async def stop() -> None:
        order.append(process.spec.id)

    return stop


def test_progress_is_shown_while_a_process_starts() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = Controller(deployment(), processes, VirtualClock())
        await asyncio.sleep(START_S / 2)
        controller.tell("decode-0", "loading weights")
        assert (await controller.follow(0)).workers[1].message == "loading weights"
        ready = await follow_until(controller, SystemState.READY)
        assert ready.workers[1].message == ""
        await controller.shut_down()

    virtually(scenario())


@pytest.mark.parametrize(
    ("served_s", "delays"),
    [
        ([None, None], [0.0, None]),
        ([0.0, None, 1.0, None], [0.0, 1.0, 2.0, 4.0]),
        ([0.0, None, None, None, None], [0.0, 1.0, 2.0, 4.0, None]),
        ([0.0, None, STABLE_S, None, 2 * STABLE_S], [0.0, 1.0, 0.0, 1.0, 0.0]),
        ([None, 0.0, None], [0.0, 1.0, 2.0]),
    ],
)
def test_delays_grow_with_deaths_in_a_row(served_s: list[float | None], delays: list[float | None]) -> None:
    record = DeathRecord()
    assert [record.note(served) for served in served_s] == delays
