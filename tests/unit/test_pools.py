"""Slots and the controller over processes that live and die as told, in virtual time."""

import asyncio
from typing import Any

import pytest

from controller.pools import MAX_DEATHS, MAX_FIRST_DEATHS, STABLE_S, DeathRecord
from controller.status import ProcessState, SystemState
from pdserve.clock import VirtualClock
from pdserve.contract.messages import Members, Role
from tests.fake_processes import (
    START_S,
    FakeProcess,
    FakeProcesses,
    controller_of,
    deployment,
    follow_until,
    vanish,
    virtually,
)


def test_a_system_starts_and_routers_know_all_workers() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(plan, processes)
        await follow_until(controller, SystemState.READY)
        assert [process.spec.id for process in processes.made] == ["router-0", "unsplit-0", "unsplit-1"]
        await controller.shut_down()

    virtually(scenario())


def test_a_dead_worker_leaves_the_membership_and_is_replaced() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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


def test_an_earlier_membership_that_arrives_late_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router waits for a worker until a newer membership names it no more."""

    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        arrived: list[int] = []
        newer = asyncio.Event()

        async def set_members(members: Members) -> None:
            if members.epoch == before + 1:
                await newer.wait()
            newer.set()
            arrived.append(members.epoch)

        assert processes["router-0"].members is not None
        before = processes["router-0"].members.epoch
        monkeypatch.setattr(processes["router-0"], "set_members", set_members)
        processes["decode-0"].die()
        await asyncio.sleep(2 * START_S)
        assert arrived[:2] == [before + 2, before + 1]
        assert (await controller.status()).state is SystemState.READY
        await controller.shut_down()

    virtually(scenario())


@pytest.mark.parametrize("start_s", [START_S, 10 * STABLE_S])
def test_a_worker_that_dies_again_and_again_is_given_up_with_the_reason(start_s: float) -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.start_s = start_s
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes, clock)
        status = await follow_until(controller, SystemState.FAILED)
        assert status.failed is not None
        assert status.failed.message == "decode-0 cannot be placed: it asks for GPU 1"
        assert clock.now() == pytest.approx(5.0)
        await controller.shut_down()

    virtually(scenario())


def test_a_replacement_waits_for_a_node_as_long_as_it_takes() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
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
        first = controller_of(deployment(), earlier)
        await follow_until(first, SystemState.READY)
        router = earlier["router-0"]
        told = router.members
        vanish(first)
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(deployment(), processes)
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
        first = controller_of(deployment(), earlier)
        await follow_until(first, SystemState.READY)
        vanish(first)
        earlier["decode-0"].die()
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(deployment(), processes)
        await follow_until(second, SystemState.READY)
        router = earlier["router-0"]
        assert router.members is not None
        assert [member.incarnation for member in router.members.members] == [1, processes["decode-0"].number]
        await second.shut_down()

    virtually(scenario())


def test_the_end_stops_routers_before_workers_and_leaves_nothing() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
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
        controller = controller_of(deployment(), processes)
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
