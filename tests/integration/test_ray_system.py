"""A system on Ray: it answers, says how it is, and outlives its parts."""

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from tests.integration.conftest import RaySystem
from tests.ray_cluster import actors, assert_gone, complete, title
from tests.small_models import SmallModel, make_model

REPLACEMENT_TIMEOUT_S = 30.0


def reference(model: SmallModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens of transformers' own generate()."""
    ids = torch.tensor([prompt])
    output = model.reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def prompt_of(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 300, (length,), generator=generator).tolist()


def wait_until_replaced(system: RaySystem, victims: list[dict[str, Any]], since: int) -> dict[str, Any]:
    """The status once the launcher has said, after its first `since` lines, that each of `victims` was lost
    and is ready again, and the routers have connected to all workers."""
    for victim in victims:
        system.up.wait_for(f"{victim['id']} lost", since)
        system.up.wait_for(f"{victim['id']} ready", since)
    return wait_until_ready(system, {victim["pid"] for victim in victims})


def wait_until_ready(system: RaySystem, old_pids: set[int]) -> dict[str, Any]:
    """The status once all processes are ready and none of `old_pids` is among them."""
    deadline = time.monotonic() + REPLACEMENT_TIMEOUT_S
    while True:
        status = system.pdserve.status()
        pids = {process["pid"] for process in [*status["routers"], *status["workers"]]}
        if status["state"] == "ready" and not pids & old_pids:
            return status
        assert time.monotonic() < deadline, status


def held_blocks(status: dict[str, Any]) -> int:
    counts = [worker["kv_blocks"] for worker in status["workers"]]
    return sum(count["reserved"] + count["active"] for count in counts)


def test_its_tokens_are_those_of_a_single_process(ray_system: RaySystem) -> None:
    prompt = prompt_of(75, seed=1)
    assert complete(ray_system.url, prompt, 12) == reference(ray_system.model, prompt, 12)


def test_the_printed_curl_works(ray_system: RaySystem) -> None:
    text = "\n".join(ray_system.up.lines)
    command = re.search(r"^curl .*\n.*$", text, re.MULTILINE)
    assert command is not None
    done = subprocess.run(["bash", "-c", command[0]], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("data: {")
    assert done.stdout.rstrip().endswith("data: [DONE]")


def test_the_official_client_streams(ray_system: RaySystem) -> None:
    with openai.OpenAI(base_url=f"{ray_system.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["small-llama"]
        stream = client.chat.completions.create(
            model="small-llama",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=5,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_request_leaves_one_line_without_its_text_in_the_routers_log(ray_system: RaySystem) -> None:
    text = "The walrus and the carpenter"
    body = {"prompt": text, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "timings": True}
    for name in ("find-me", "the-next"):  # when the next one has been answered, the first has ended
        answer = httpx.post(
            f"{ray_system.url}/v1/completions", json=body, headers={"X-Request-Id": name}, timeout=60.0
        )
        assert answer.headers["x-request-id"] == name
        timings = answer.json()["choices"][0]["timings"]
        if name == "find-me":
            request_id = timings["request_id"]
    logs = {path.resolve() for path in ray_system.pdserve.runtime.rglob("worker-*.err")}
    lines = [line for path in logs for line in path.read_text(errors="replace").splitlines()]
    assert not [line for line in lines if "walrus" in line]
    (line,) = [line for line in lines if request_id in line]
    assert " INFO router-0 router.request_log: request ended " in line
    fields = dict(field.partition("=")[::2] for field in line.partition(" request ended ")[2].split(" "))
    assert fields["request_id"] == request_id
    assert fields["client_request_id"] == "find-me"
    assert (fields["outcome"], fields["output_tokens"]) == ("length", "6")
    assert (fields["decode_worker"], fields["prefill_worker"]) == ("decode-0", "prefill-0")
    assert float(fields["first_token_s"]) < float(fields["second_token_s"]) < float(fields["last_token_s"])


def test_generate_streams_to_the_terminal(ray_system: RaySystem) -> None:
    options = ("--max-tokens", "6", "--temperature", "0")
    chat = ray_system.pdserve.run("generate", "hello world", *options)
    raw = ray_system.pdserve.run("generate", "hello world", "--raw", *options)
    assert chat.returncode == raw.returncode == 0, chat.stderr + raw.stderr
    body = {"prompt": "hello world", "max_tokens": 6, "temperature": 0}
    answer = httpx.post(f"{ray_system.url}/v1/completions", json=body, timeout=60.0).json()
    assert raw.stdout == answer["choices"][0]["text"] + "\n"
    assert chat.stdout != raw.stdout


def test_status_tells_everything_about_every_process(ray_system: RaySystem) -> None:
    complete(ray_system.url, prompt_of(40, seed=2))
    status = ray_system.pdserve.status()
    assert (status["name"], status["state"], status["model"]) == ("default", "ready", "small-llama")
    (router,) = status["routers"]
    assert (router["id"], router["pool"], router["url"]) == ("router-0", "router", ray_system.url)
    assert [(worker["id"], worker["pool"]) for worker in status["workers"]] == [
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
    ]
    family = {process.pid for process in ray_system.up.family()}
    for process in [router, *status["workers"]]:
        assert process["state"] == "ready"
        assert process["pid"] in family
        assert process["node"]
        host, _, port = process["address"].rpartition(":")
        assert host == "127.0.0.1"
        assert port.isdigit()
    sizes = set()
    for worker in status["workers"]:
        assert set(worker["kv_blocks"]) == {"free", "cached", "reserved", "active"}
        assert worker["kv_blocks"]["cached"] > 0
        sizes.add(sum(worker["kv_blocks"].values()))
    assert len(sizes) == 1, "equal pools for equal kv_memory"
    (prefill, decode) = status["workers"]
    assert prefill["kv_transports"] == []
    assert decode["kv_transports"] == [
        {"source": "prefill-0", "transport": "shared_memory", "reason": "same host"}
    ]
    assert held_blocks(status) == 0


def test_status_as_a_table(ray_system: RaySystem) -> None:
    done = ray_system.pdserve.run("status")
    assert done.returncode == 0
    for word in (
        "router-0",
        "prefill-0",
        "decode-0",
        "ready",
        "small-llama",
        "127.0.0.1:",
        "prefill-0 -> decode-0",
    ):
        assert word in done.stdout


def test_every_process_checks_its_books(ray_system: RaySystem) -> None:
    complete(ray_system.url, prompt_of(40, seed=3))
    done = ray_system.pdserve.run("check")
    assert done.returncode == 0
    assert "the books of 3 of 3 processes balance" in done.stdout
    content = json.loads(ray_system.pdserve.run("check", "--json").stdout)
    assert [process["id"] for process in content["processes"]] == ["router-0", "prefill-0", "decode-0"]
    for process in content["processes"]:
        assert process["sound"]
        assert process["report"]["problems"] == []
        assert process["report"]["checked"]


def test_every_process_serves_its_metrics(ray_system: RaySystem) -> None:
    complete(ray_system.url, prompt_of(40, seed=3))
    status = ray_system.pdserve.status()
    for process in [*status["routers"], *status["workers"]]:
        page = httpx.get(process["metrics_url"]).text
        if process["pool"] == "router":
            assert re.search(r"^pdserve_router_output_tokens_total [1-9]", page, re.MULTILINE)
        else:
            assert f'pdserve_kv_blocks{{pool="{process["pool"]}",state="cached"}}' in page


def test_the_grpc_api_is_there(ray_system: RaySystem) -> None:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    address = ray_system.pdserve.status()["routers"][0]["grpc_address"]
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10.0)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_running_router_has_not_loaded_torch(ray_system: RaySystem) -> None:
    status = ray_system.pdserve.status()

    def mapped(pid: int) -> str:
        return Path(f"/proc/{pid}/maps").read_text()

    assert "libtorch" not in mapped(status["routers"][0]["pid"])
    assert "libtorch" not in mapped(ray_system.up.process.pid), "nor has the launcher"
    assert "libtorch" in mapped(status["workers"][0]["pid"]), "where torch is loaded this shows it"


def test_killed_workers_are_replaced_and_requests_go_on(ray_system: RaySystem) -> None:
    """First the prefill worker alone: its prompts are computed at the decode worker. Then that one too."""
    before = ray_system.pdserve.status()["workers"]
    since = len(ray_system.up.lines)
    prompt = prompt_of(50, seed=4)
    for victim in before:
        psutil.Process(victim["pid"]).kill()
        assert complete(ray_system.url, prompt, 6) == reference(ray_system.model, prompt, 6)
    after = wait_until_replaced(ray_system, before, since)["workers"]
    assert [worker["restarts"] for worker in after] == [worker["restarts"] + 1 for worker in before]
    assert complete(ray_system.url, prompt, 6) == reference(ray_system.model, prompt, 6)


def test_a_killed_router_is_replaced_at_its_port(ray_system: RaySystem) -> None:
    before = ray_system.pdserve.status()["routers"][0]
    since = len(ray_system.up.lines)
    psutil.Process(before["pid"]).kill()
    after = wait_until_replaced(ray_system, [before], since)["routers"][0]
    assert (after["url"], after["grpc_address"]) == (ray_system.url, before["grpc_address"])
    prompt = prompt_of(30, seed=7)
    assert complete(ray_system.url, prompt, 4) == reference(ray_system.model, prompt, 4)


def test_a_killed_controller_comes_back_and_finds_everybody(ray_system: RaySystem) -> None:
    before = ray_system.pdserve.status()
    known = {process["pid"] for process in [*before["routers"], *before["workers"]]}
    (controller,) = [
        process
        for process in actors(ray_system.up)
        if process.pid not in known and "ControllerActor" in title(process)
    ]
    controller.kill()
    prompt = prompt_of(60, seed=5)
    assert complete(ray_system.url, prompt, 6) == reference(ray_system.model, prompt, 6)
    after = wait_until_ready(ray_system, {controller.pid})
    assert {process["pid"] for process in [*after["routers"], *after["workers"]]} == known
    assert complete(ray_system.url, prompt, 6) == reference(ray_system.model, prompt, 6)


def test_who_serves_comes_after_nobody_else_on_the_machine(ray_system: RaySystem) -> None:
    mine = psutil.Process().nice()
    assert {process.nice() for process in actors(ray_system.up)} == {mine}


def test_the_name_is_taken(ray_system: RaySystem) -> None:
    line = ray_system.pdserve.refusal("up")
    assert "a system named 'default' runs already" in line
    assert "pdserve down" in line


def test_the_port_is_taken(ray_system: RaySystem) -> None:
    port = ray_system.url.rpartition(":")[2]
    line = ray_system.pdserve.refusal("up", "--name", "second", "--port", port)
    assert f"port {port} on 127.0.0.1 is in use" in line
    assert "--port" in line


class OnTheSameRay:
    """Options that start another system on the cluster of the first, as on any running cluster."""

    def __init__(self, system: RaySystem) -> None:
        record = system.pdserve.record()
        self.pdserve = type(system.pdserve)(
            system.pdserve.runtime,
            {"RAY_AUTH_MODE": record["ray_auth_mode"], "RAY_ADDRESS": record["ray_address"]},
        )
        self.options = ("--name", "second", "--address", "auto", "--port", "0")
        self.options += ("--set", "engine.kv_memory=16MiB")
        self._system = system
        self._pids = {process.pid for process in actors(system.up)}

    def assert_as_before(self) -> None:
        """Of the second system nothing is left; the first is untouched."""
        assert_gone([process for process in actors(self._system.up) if process.pid not in self._pids])
        assert {process.pid for process in actors(self._system.up)} == self._pids
        assert self._system.pdserve.status()["state"] == "ready"
        assert self.pdserve.records() == ["default.json"]


@pytest.fixture
def same_ray(ray_system: RaySystem) -> OnTheSameRay:
    return OnTheSameRay(ray_system)


def test_what_no_node_can_take_is_named(same_ray: OnTheSameRay, chat_model: SmallModel) -> None:
    wanted = ("--prefill", "0", "--set", "pools.decode.resources.custom={moon_base: 2}")
    line = same_ray.pdserve.refusal("up", *same_ray.options, "--model", str(chat_model.folder), *wanted)
    assert "unsplit-0 cannot be placed: it asks for moon_base 2, and no node has that" in line
    assert "pools.decode.resources" in line
    same_ray.assert_as_before()


def test_a_quantised_model_is_refused_by_name(same_ray: OnTheSameRay, tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "squeezed")
    config = model.folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"quantization_config": {"quant_method": "awq"},', 1))
    line = same_ray.pdserve.refusal("up", *same_ray.options, "--prefill", "0", "--model", str(model.folder))
    assert "is quantised (awq)" in line
    assert "float16, bfloat16 or float32" in line
    same_ray.assert_as_before()


def test_a_pool_that_does_not_fit_is_refused_by_the_worker(
    same_ray: OnTheSameRay, chat_model: SmallModel
) -> None:
    """On a cluster the launcher does not know what the nodes have."""
    options = (*same_ray.options, "--prefill", "0", "--set", "engine.kv_memory=1TB")
    line = same_ray.pdserve.refusal("up", "--model", str(chat_model.folder), *options)
    assert "unsplit-0 cannot start: the KV pool of 931.32 GiB does not fit in the" in line
    assert "lower engine.kv_memory" in line
    same_ray.assert_as_before()


def test_a_system_on_a_running_cluster_outlives_its_launcher(
    same_ray: OnTheSameRay, chat_model: SmallModel
) -> None:
    """Unsplit, detached, beside the first system; `pdserve down` ends it and leaves the first."""
    options = (*same_ray.options, "--prefill", "0", "--decode", "1", "--detach")
    done = same_ray.pdserve.run("up", "--model", str(chat_model.folder), *options)
    assert done.returncode == 0, done.stderr
    status = same_ray.pdserve.status("--name", "second")
    assert [worker["pool"] for worker in status["workers"]] == ["unsplit"]
    prompt = prompt_of(75, seed=6)
    assert complete(status["routers"][0]["url"], prompt, 8) == reference(chat_model, prompt, 8)
    family = [psutil.Process(process["pid"]) for process in [*status["routers"], *status["workers"]]]
    down = same_ray.pdserve.run("down", "--name", "second")
    assert down.returncode == 0, down.stderr
    assert_gone(family)
    same_ray.assert_as_before()
