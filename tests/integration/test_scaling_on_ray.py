"""`pdserve scale` and `pdserve drain` on a real system: pools follow, and so do status and Prometheus."""

import json
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from tests.integration.conftest import RaySystem
from tests.ray_cluster import actors, complete, private_pdserve, title
from tests.reference import greedy_reference
from tests.small_models import SmallModel

PROMPT = list(range(5, 80))


@pytest.fixture(scope="module")
def system(chat_model: SmallModel) -> Iterator[RaySystem]:
    """One whose size may change."""
    options = ["--port", "0", "--threads", "1", "--set", "engine.kv_memory=16MiB"]
    with private_pdserve() as pdserve, pdserve.up("--model", str(chat_model.folder), *options) as up:
        yield RaySystem(pdserve, up, chat_model)


def command(system: RaySystem, *words: str) -> list[str]:
    """What a command says that ends well."""
    done = system.pdserve.run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def pids(status: dict[str, Any]) -> dict[str, int]:
    return {worker["id"]: worker["pid"] for worker in status["workers"]}


def answers_rightly(system: RaySystem) -> bool:
    return complete(system.url, PROMPT, 8) == greedy_reference(system.model.reference, tuple(PROMPT), 8)


def test_pools_grow_and_shrink_and_everybody_hears_of_it(system: RaySystem) -> None:
    before = pids(system.pdserve.status())
    said = command(system, "scale", "prefill=2", "decode=2")
    assert said[-1] == "default has 2 prefill and 2 decode workers"
    assert any("decode-1 ready" in line for line in said)
    status = system.pdserve.status()
    assert status["state"] == "ready"
    assert status["pools"] == [
        {"name": "router", "desired": 1, "ready": 1, "draining": 0},
        {"name": "prefill", "desired": 2, "ready": 2, "draining": 0},
        {"name": "decode", "desired": 2, "ready": 2, "draining": 0},
    ]
    larger = pids(status)
    assert list(larger) == ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    assert before.items() <= larger.items(), "nobody was touched"
    groups = json.loads(httpx.get(status["targets_url"]).text)
    assert {group["labels"]["instance"] for group in groups} >= set(larger)
    metrics = httpx.get(status["targets_url"].replace("/targets", "/metrics")).text
    assert 'pdserve_desired_workers{pool="decode"} 2.0' in metrics
    assert 'pdserve_actual_workers{pool="decode"} 2.0' in metrics
    assert answers_rightly(system)

    assert command(system, "scale", "prefill=2", "decode=2") == said[-1:], "there is nothing to do"
    said = command(system, "scale", "prefill=1", "decode=1", "--deadline", "5")
    assert said[-1] == "default has 1 prefill and 1 decode workers"
    assert any("decode-1 draining" in line for line in said)
    assert pids(system.pdserve.status()) == before
    assert not psutil.pid_exists(larger["decode-1"])
    assert not psutil.pid_exists(larger["prefill-1"])
    groups = json.loads(httpx.get(status["targets_url"]).text)
    assert {group["labels"]["instance"] for group in groups} == {*before, "router-0", "controller"}
    assert answers_rightly(system)


def test_a_drained_worker_is_replaced_under_its_requests(system: RaySystem) -> None:
    """It is the only decode worker, and requests come all the while: they go on at its successor."""
    before = pids(system.pdserve.status())
    draining = system.pdserve.begin("drain", "decode-0", "--deadline", "0")
    while draining.poll() is None:
        assert answers_rightly(system)
    said, _ = draining.communicate()
    assert draining.returncode == 0
    assert said.splitlines()[-1] == "decode-0 was drained; another has taken its place"
    assert answers_rightly(system)
    after = pids(system.pdserve.status())
    assert after["prefill-0"] == before["prefill-0"]
    assert after["decode-0"] != before["decode-0"]
    assert not psutil.pid_exists(before["decode-0"])
    assert [worker["restarts"] for worker in system.pdserve.status()["workers"]] == [0, 0]
    checked = json.loads(system.pdserve.run("check", "--json").stdout)
    assert all(process["report"]["problems"] == [] for process in checked["processes"])
    assert all(process["report"]["holders"] == [] for process in checked["processes"])


def test_a_restarted_controller_knows_the_size_that_was_asked_for(system: RaySystem) -> None:
    command(system, "scale", "decode=2")
    before = pids(system.pdserve.status())
    (controller,) = [actor for actor in actors(system.up) if "ControllerActor" in title(actor)]
    controller.send_signal(signal.SIGKILL)
    controller.wait(30)
    assert command(system, "scale", "decode=2")[-1] == "default has 1 prefill and 2 decode workers"
    assert pids(system.pdserve.status()) == before
    assert command(system, "scale", "decode=1")[-1] == "default has 1 prefill and 1 decode workers"
    assert answers_rightly(system)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("scale", "decode=0"), "somebody has to generate tokens"),
        (("scale", "prefill=0"), "keep one"),
        (("scale", "router=2"), "scale prefill or decode"),
        (("scale", "decode"), "write for example decode=3"),
        (("scale", "decode=2", "--deadline", "-1"), "no number of seconds"),
        (("drain", "decode-7"), "there is no worker 'decode-7': there are prefill-0, decode-0"),
        (("drain", "router-0"), "there is no worker 'router-0'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(system: RaySystem, words: tuple[str, ...], why: str) -> None:
    assert why in system.pdserve.refusal(*words)
