"""Another configuration for a running system: what it may change, and worker after worker gets it."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from controller.controller import Controller
from controller.plan import Deployment, ModelSource
from controller.pool_commands import is_rolled_out
from controller.rollout import require_same_text, rolled_out
from controller.status import ProcessState, SystemState
from pdserve.config import load_config
from pdserve.contract.errors import ConfigError, Unavailable
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

SIZES = {"pools.prefill.replicas": 2, "pools.decode.replicas": 2}
NEW = load_config(None, SIZES | {"engine.step_budget_ms": 50})
MODEL = ModelSource("/model", None, "model")


def four_workers() -> Deployment:
    return deployment(**{key.replace(".", "__"): value for key, value in SIZES.items()})


async def until_rolled_out(controller: Controller) -> None:
    status = await controller.status()
    while not is_rolled_out(status):
        status = await controller.follow(status.version)


def test_workers_are_replaced_one_by_one_and_both_pools_in_turn() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 2.0
        controller = controller_of(four_workers(), processes)
        await follow_until(controller, SystemState.READY)
        router = processes["router-0"]
        status = await controller.roll_out(NEW, MODEL, 10.0)
        while not is_rolled_out(status):
            status = await controller.follow(status.version)
            assert [worker.state for worker in status.workers].count(ProcessState.READY) >= 3
        assert [process.spec.id for process in processes.made[5:]] == [
            "decode-0",
            "prefill-0",
            "decode-1",
            "prefill-1",
        ]
        assert {process.generation for process in processes.made[5:]} == {1}
        assert processes["router-0"] is router
        await controller.roll_out(NEW, MODEL, 10.0)
        await asyncio.sleep(10 * START_S)
        assert len(processes.made) == 9, "there was nothing more to do"
        await controller.shut_down()

    virtually(scenario())


def test_it_stops_at_the_first_worker_that_cannot_start_and_goes_back() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(four_workers(), processes)
        await follow_until(controller, SystemState.READY)
        processes.prepare = {"decode-0": "no memory for that"}
        await controller.roll_out(NEW, MODEL, None)
        with pytest.raises(Unavailable, match="decode-0 cannot be started: no memory for that"):
            await until_rolled_out(controller)
        await asyncio.sleep(10 * START_S)
        states = [worker.state for worker in (await controller.status()).workers]
        assert states.count(ProcessState.READY) == 3
        assert len(processes.made) == 6
        processes.prepare = {}
        await controller.roll_out(load_config(None, SIZES), MODEL, None)
        await until_rolled_out(controller)
        await controller.shut_down()

    virtually(scenario())


def test_a_restarted_controller_finishes_it() -> None:
    async def scenario() -> None:
        earlier, store = FakeProcesses(), FakeStore()
        first = controller_of(four_workers(), earlier, store=store)
        await follow_until(first, SystemState.READY)
        await first.roll_out(NEW, MODEL, None)
        await asyncio.sleep(1.5 * START_S)
        vanish(first)
        assert store.kept is not None
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(store.kept, processes, store=store)
        await until_rolled_out(second)
        living = [process for process in processes.made if not process.is_over]
        assert {process.generation for process in living if process.spec.pool != "router"} == {1}
        await second.shut_down()

    virtually(scenario())


def test_its_deadline_outlives_other_commands_and_its_controller() -> None:
    """Answers of the former model that it cuts short cannot go on anywhere."""

    async def scenario() -> None:
        earlier, store = FakeProcesses(), FakeStore()
        first = controller_of(four_workers(), earlier, store=store)
        await follow_until(first, SystemState.READY)
        await first.roll_out(NEW, MODEL, 600.0)
        await asyncio.sleep(1)
        await first.scale({"prefill": 2}, 7.0)
        await asyncio.sleep(1.5 * START_S)
        vanish(first)
        assert store.kept is not None
        processes = FakeProcesses(left_behind=earlier)
        second = controller_of(store.kept, processes, store=store)
        await until_rolled_out(second)
        assert {deadline_s for process in earlier.made for deadline_s in process.deadlines} == {600.0}
        await second.shut_down()

    virtually(scenario())


def test_whoever_dies_meanwhile_comes_back_with_the_new_configuration() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        processes.busy_s = 5.0
        controller = controller_of(four_workers(), processes)
        await follow_until(controller, SystemState.READY)
        await controller.roll_out(NEW, MODEL, None)
        await asyncio.sleep(1)
        processes["prefill-1"].die()
        await until_rolled_out(controller)
        assert len(processes.made) == 5 + 4
        await controller.shut_down()

    virtually(scenario())


def test_it_names_the_router_that_keeps_it_from_going_on() -> None:
    async def scenario() -> None:
        processes = FakeProcesses()
        controller = controller_of(deployment(router__replicas=2), processes)
        await follow_until(controller, SystemState.READY)
        processes.fatal = {"router-1": "its port is taken"}
        processes["router-1"].die()
        await asyncio.sleep(300)
        new = load_config(None, {"router.replicas": 2, "model.dtype": "float32"})
        await controller.roll_out(new, MODEL, None)
        with pytest.raises(Unavailable, match=r"router-1 cannot be started: .* its port is taken"):
            await asyncio.wait_for(until_rolled_out(controller), 300)
        await controller.shut_down()

    virtually(scenario())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"router.queue_timeout_s": 5}, "router.queue_timeout_s"),
        ({"ray.address": "auto"}, "ray.address"),
        ({"network.metrics_host": "0.0.0.0"}, "network.metrics_host"),
        ({"name": "other"}, "name"),
    ],
)
def test_what_a_running_system_cannot_become_is_refused(options: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is ") as refused:
        rolled_out(four_workers(), load_config(None, SIZES | options), MODEL)
    assert refused.value.info.param == key


def test_no_rollout_sends_unencrypted_what_tls_has_promised_to_encrypt() -> None:
    """Also where the file leaves out the section, which was given on the command line."""
    files = {f"network__tls__{name}": f"/{name}.pem" for name in ("certificate", "key", "authority")}
    with pytest.raises(ConfigError, match=r"^network\.transports: nixl sends KV unencrypted") as refused:
        rolled_out(deployment(**files), load_config(None, {"network.transports": ["nixl", "grpc"]}), MODEL)
    assert refused.value.info.param == "network.transports"


def test_another_name_of_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="the routers serve 'model', not 'other'"):
        rolled_out(four_workers(), NEW, replace(MODEL, served_name="other"))


def test_what_workers_read_is_taken_and_all_else_stays() -> None:
    options = {
        "model.dtype": "bfloat16",
        "engine.kv_memory": "64MiB",
        "network.transports": ["grpc"],
        "pools.decode.env": {"A": "b"},
        "pools.drain_deadline_s": 7,
        "pools.decode.replicas": 9,
        "router.http_port": 0,
    }
    now = four_workers()
    later = rolled_out(now, load_config(None, options), replace(MODEL, revision="v2"))
    assert later.generation == 1
    config = later.config
    assert (config.model.dtype, config.engine.kv_memory) == ("bfloat16", 64 << 20)
    assert (config.network.transports, config.pools.decode.env) == (("grpc",), {"A": "b"})
    assert (config.pools.drain_deadline_s, config.router, config.logs) == (
        7,
        now.config.router,
        now.config.logs,
    )
    assert [spec.id for spec in later.specs()] == [spec.id for spec in now.specs()], "scale changes sizes"
    assert later.model.revision == "v2"
    assert (later.token, later.admin_token, later.start_id) == (now.token, now.admin_token, now.start_id)


def test_a_revision_with_another_tokeniser_is_refused(tmp_path: Path) -> None:
    sources = []
    for name, content in (("old", "{}"), ("same", "{}"), ("other", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content)
        sources.append(ModelSource(str(tmp_path / name), None, "model"))
    old, same, other = sources
    require_same_text(old, old)
    require_same_text(old, same)
    with pytest.raises(ConfigError, match=r"tokenizer\.json of .*other"):
        require_same_text(old, other)
