"""Pools that change their size, and workers that leave on purpose, in virtual time."""

import asyncio

import pytest

from controller.controller import Controller
from controller.pools import LEAVE_GRACE_S
from controller.status import PoolStatus, ProcessState, SystemState, SystemStatus
from pdserve.clock import VirtualClock
from pdserve.contract.errors import ConfigError, NotFound, Unavailable
from pdserve.contract.messages import WorkerState
from tests.fake_processes import (
    START_S,
    FakeProcesses,
    FakeStore,
    controller_of,
    deployment,
    follow_until,
    vanish,
    virtually,
)

SPLIT = {"pools__prefill__replicas": 2, "pools__decode__replicas": 2}


def known_to_router(processes: FakeProcesses) -> dict[str, WorkerState]:
    members = processes["router-0"].members
    assert members is not None
    return {str(member.worker_id): member.state for member in members.members}


def ids(status: SystemStatus) -> list[str]:
    return [process.id for process in status.processes]


async def ready(controller: Controller, *workers: str) -> SystemStatus:
    """The status once exactly `workers` serve."""
    status = await controller.status()
    while status.state is not SystemState.READY or ids(status) != ["router-0", *workers]:
        status = await controller.follow(status.version)
    return status


def test_more_workers_join_without_touching_the_others() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
        before = await follow_until(controller, SystemState.READY)
        await controller.scale({"prefill": 2, "decode": 3}, None)
        after = await ready(controller, "prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2")
        assert [p.report for p in before.workers] == [after.workers[0].report, after.workers[2].report]
        assert after.pools == (
            PoolStatus("router", 1, 1, 0),
            PoolStatus("prefill", 2, 2, 0),
            PoolStatus("decode", 3, 3, 0),
        )
        assert list(known_to_router(processes)) == [p.id for p in after.workers]
        await controller.shut_down()

    virtually(scenario())


def test_the_newest_are_drained_and_go_when_they_have_nothing_left() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 7.0
        clock = VirtualClock()
        controller = controller_of(deployment(**SPLIT), processes, clock)
        await follow_until(controller, SystemState.READY)
        began_at = clock.now()
        await controller.scale({"decode": 1}, 20.0)
        await asyncio.sleep(1)
        status = await controller.status()
        assert status.pools[2] == PoolStatus("decode", 1, 1, 1)
        assert [p.state for p in status.workers[2:]] == [ProcessState.READY, ProcessState.DRAINING]
        assert known_to_router(processes)["decode-1"] is WorkerState.DRAINING
        await ready(controller, "prefill-0", "prefill-1", "decode-0")
        assert clock.now() - began_at == pytest.approx(7.0)
        leaver = processes["decode-1"]
        assert (leaver.deadlines, leaver.is_killed) == ([20.0], True)
        assert "decode-1" not in known_to_router(processes)
        assert len(processes.made) == 5, "nobody was replaced"
        await controller.shut_down()

    virtually(scenario())


def test_each_of_many_is_told_once() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 5.0
        controller = controller_of(deployment(pools__decode__replicas=30), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 1}, 9.0)
        await ready(controller, "prefill-0", "decode-0")
        told = [process.deadlines for process in processes.made if process.spec.index]
        assert told == [[9.0]] * 29
        await controller.shut_down()

    virtually(scenario())


def test_a_repeated_command_changes_nothing_but_may_hurry() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 100.0
        clock = VirtualClock()
        controller = controller_of(deployment(**SPLIT), processes, clock)
        await follow_until(controller, SystemState.READY)
        began_at = clock.now()
        for deadline_s in (60.0, 60.0, 5.0):
            await controller.scale({"prefill": 1, "decode": 2}, deadline_s)
        await ready(controller, "prefill-0", "decode-0", "decode-1")
        assert clock.now() - began_at == pytest.approx(5.0)
        version = (await controller.status()).version
        await controller.scale({"prefill": 1}, None)
        assert (await ready(controller, "prefill-0", "decode-0", "decode-1")).version == version + 1
        assert len(processes.made) == 5
        await controller.shut_down()

    virtually(scenario())


def test_a_deadline_is_that_of_the_command_that_let_a_worker_leave() -> None:
    """Another pool's command does not hurry it."""

    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 1000.0
        clock = VirtualClock()
        controller = controller_of(deployment(**SPLIT), processes, clock)
        await follow_until(controller, SystemState.READY)
        began_at = clock.now()
        await controller.scale({"decode": 1}, 600.0)
        await asyncio.sleep(1)
        await controller.scale({"prefill": 1}, 5.0)
        await ready(controller, "prefill-0", "decode-0")
        assert clock.now() - began_at == pytest.approx(600.0)
        await controller.shut_down()

    virtually(scenario())


def test_who_is_wanted_again_while_leaving_is_replaced() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 4.0
        controller = controller_of(deployment(**SPLIT), processes)
        await follow_until(controller, SystemState.READY)
        first = processes["decode-1"]
        await controller.scale({"decode": 1}, None)
        await asyncio.sleep(1)
        await controller.scale({"decode": 2}, None)
        await ready(controller, "prefill-0", "prefill-1", "decode-0", "decode-1")
        assert first.is_over
        assert processes["decode-1"] is not first
        await controller.shut_down()

    virtually(scenario())


def test_who_does_not_serve_yet_is_ended_at_once() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 4}, None)
        await asyncio.sleep(START_S / 2)
        await controller.scale({"decode": 1}, None)
        await ready(controller, "prefill-0", "decode-0")
        await asyncio.sleep(START_S)
        starting = [process for process in processes.made if process.spec.index]
        assert [process.is_killed for process in starting] == [True] * 3
        await controller.shut_down()

    virtually(scenario())


def test_who_cannot_start_is_named_and_goes_with_the_pool() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.prepare["decode-1"] = "no memory is left"
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 2}, None)
        await asyncio.sleep(2 * START_S)
        status = await controller.status()
        assert status.state is SystemState.DEGRADED
        assert status.failed is not None
        assert (status.failed.id, status.failed.message) == ("decode-1", "no memory is left")
        await controller.scale({"decode": 1}, None)
        await ready(controller, "prefill-0", "decode-0")
        processes.prepare.clear()
        await controller.scale({"decode": 2}, None)
        await ready(controller, "prefill-0", "decode-0", "decode-1")
        await controller.shut_down()

    virtually(scenario())


def test_the_command_again_tries_again_what_was_given_up() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.prepare["decode-1"] = "no memory is left"
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 2}, None)
        await asyncio.sleep(2 * START_S)
        assert (await controller.status()).failed is not None
        processes.prepare.clear()
        assert (await controller.scale({"decode": 2}, None)).failed is None
        await ready(controller, "prefill-0", "decode-0", "decode-1")
        await controller.shut_down()

    virtually(scenario())


def test_a_drained_worker_is_replaced_and_that_is_no_restart() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 3.0
        controller = controller_of(deployment(**SPLIT), processes)
        await follow_until(controller, SystemState.READY)
        first = processes["prefill-1"]
        assert await controller.drain("prefill-1", 9.0) == first.number
        await asyncio.sleep(1)
        assert await controller.drain("prefill-1", 9.0) == first.number, "it is leaving already"
        assert known_to_router(processes)["prefill-1"] is WorkerState.DRAINING
        await asyncio.sleep(3)
        assert "prefill-1" not in known_to_router(processes)
        status = await ready(controller, "prefill-0", "prefill-1", "decode-0", "decode-1")
        assert status.workers[1].report is not None
        assert status.workers[1].report.pid != first.number
        assert [p.num_restarts for p in status.processes] == [0] * 5
        await controller.shut_down()

    virtually(scenario())


def test_drained_again_and_again_is_not_dying_again_and_again() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        for _ in range(20):
            await controller.drain("decode-0", None)
            await asyncio.sleep(2 * START_S)
        await ready(controller, "prefill-0", "decode-0")
        assert len(processes.made) == 3 + 20
        await controller.shut_down()

    virtually(scenario())


def test_what_cannot_be_is_refused_before_anything_is_touched() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        store = FakeStore()
        controller = controller_of(deployment(**SPLIT), processes, store=store)
        await follow_until(controller, SystemState.READY)
        for sizes, words in (
            ({"decode": 0}, "somebody has to generate tokens"),
            ({"decode": 1, "prefill": 0}, "keep one"),
            ({"decode": 1, "router": 2}, "no pool 'router'"),
        ):
            with pytest.raises(ConfigError, match=words):
                await controller.scale(sizes, None)
        for name in ("router-0", "decode-2", "decode"):
            with pytest.raises(NotFound, match="there are prefill-0, prefill-1, decode-0, decode-1"):
                await controller.drain(name, None)
        processes["decode-0"].die()
        await asyncio.sleep(START_S / 2)
        with pytest.raises(Unavailable, match="starting"):
            await controller.drain("decode-0", None)
        await ready(controller, "prefill-0", "prefill-1", "decode-0", "decode-1")
        assert store.kept is None
        await controller.shut_down()

    virtually(scenario())


def test_unsplit_workers_are_scaled_as_decode_workers() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(pools__prefill__replicas=0), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 2}, None)
        await ready(controller, "unsplit-0", "unsplit-1")
        with pytest.raises(ConfigError, match="unsplit"):
            await controller.scale({"prefill": 1}, None)
        await controller.shut_down()

    virtually(scenario())


def test_a_restarted_controller_goes_on_with_what_was_wanted_last() -> None:
    """It shrinks what its predecessor was shrinking, and grows nothing back."""

    async def scenario() -> None:
        earlier, store = FakeProcesses(), FakeStore()
        earlier.busy_s = 10.0
        first = controller_of(deployment(**SPLIT), earlier, store=store)
        await follow_until(first, SystemState.READY)
        await first.scale({"decode": 1, "prefill": 1}, None)
        await asyncio.sleep(1)
        assert earlier["decode-1"].state is WorkerState.DRAINING
        vanish(first)
        assert store.kept is not None
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(store.kept, processes, store=store)
        status = await ready(second, "prefill-0", "decode-0")
        assert [pool.desired for pool in status.pools] == [1, 1, 1]
        assert set(processes.made) == set(earlier.made), "nobody is new"
        assert list(known_to_router(processes)) == ["prefill-0", "decode-0"]
        await second.shut_down()
        assert store.kept is None

    virtually(scenario())


def test_who_follows_an_earlier_controller_hears_of_the_next() -> None:
    async def scenario() -> None:
        earlier = FakeProcesses()
        first = controller_of(deployment(**SPLIT), earlier)
        seen = (await follow_until(first, SystemState.READY)).version
        vanish(first)
        second = controller_of(deployment(**SPLIT), FakeProcesses(left_behind=earlier))
        for _ in range(3):
            status = await asyncio.wait_for(second.follow(seen), 2 * START_S)
            assert status.version > seen
        await second.shut_down()

    virtually(scenario())


def test_a_restarted_controller_drains_who_is_too_many_and_does_not_know() -> None:
    async def scenario() -> None:
        earlier, store = FakeProcesses(), FakeStore()
        first = controller_of(deployment(**SPLIT), earlier, store=store)
        await follow_until(first, SystemState.READY)
        vanish(first)
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(deployment(), processes)
        await ready(second, "prefill-0", "decode-0")
        for name in ("prefill-1", "decode-1"):
            assert set(earlier[name].deadlines) == {30.0}
            assert earlier[name].is_over
        await second.shut_down()

    virtually(scenario())


def test_who_belongs_to_no_pool_of_this_system_is_left_alone() -> None:
    """An earlier system of that name, which ended badly, was unsplit and had more routers."""

    async def scenario() -> None:
        earlier = FakeProcesses()
        first = controller_of(deployment(pools__prefill__replicas=0, router__replicas=2), earlier)
        await follow_until(first, SystemState.READY)
        vanish(first)
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(deployment(), processes)
        await ready(second, "prefill-0", "decode-0")
        assert not earlier["unsplit-0"].deadlines
        assert not earlier["router-1"].deadlines
        await second.shut_down()

    virtually(scenario())


def test_two_changes_at_once_both_count() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        await asyncio.gather(controller.scale({"prefill": 2}, None), controller.scale({"decode": 2}, None))
        await ready(controller, "prefill-0", "prefill-1", "decode-0", "decode-1")
        await controller.shut_down()

    virtually(scenario())


def test_a_worker_that_dies_while_it_is_to_leave_is_gone() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 100.0
        controller = controller_of(deployment(**SPLIT), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 1}, 50.0)
        await asyncio.sleep(1)
        processes["decode-1"].die("killed")
        await ready(controller, "prefill-0", "prefill-1", "decode-0")
        await controller.shut_down()

    virtually(scenario())


def test_a_frozen_worker_is_killed_long_after_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        clock = VirtualClock()
        controller = controller_of(deployment(**SPLIT), processes, clock)
        await follow_until(controller, SystemState.READY)
        frozen = processes["decode-1"]

        async def hear_nothing(_: float) -> None:
            await frozen.ended()

        monkeypatch.setattr(frozen, "drain", hear_nothing)
        monkeypatch.setattr(frozen, "kill", lambda: frozen.is_over or frozen.die("killed"))
        began_at = clock.now()
        await controller.drain("decode-1", 40.0)
        await controller.drain("decode-1", 10.0)
        await controller.drain("decode-1", 90.0)
        await asyncio.sleep(1)
        status = await ready(controller, "prefill-0", "prefill-1", "decode-0", "decode-1")
        assert clock.now() - began_at == pytest.approx(10.0 + LEAVE_GRACE_S + START_S)
        assert [p.num_restarts for p in status.processes] == [0] * 5
        await controller.shut_down()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    virtually(scenario())


def test_the_end_leaves_nobody_who_was_just_being_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 2}, None)
        await asyncio.sleep(START_S / 2)
        monkeypatch.setattr(processes["decode-1"], "stop", lambda: asyncio.sleep(5))
        await controller.scale({"decode": 1}, None)
        await asyncio.sleep(1)
        await controller.shut_down()
        assert all(process.is_killed for process in processes.made)

    virtually(scenario())


def test_the_end_does_not_wait_for_who_is_leaving() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 1000.0
        controller = controller_of(deployment(**SPLIT), processes)
        await follow_until(controller, SystemState.READY)
        await controller.scale({"decode": 1}, 1000.0)
        await asyncio.sleep(1)
        await asyncio.wait_for(controller.shut_down(), 1)
        assert all(process.is_killed for process in processes.made)

    virtually(scenario())
