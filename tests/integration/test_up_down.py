"""Starting and ending: what goes wrong is said in one line, and nothing is ever left running."""

import json
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from transformers import AutoModelForCausalLM, BloomConfig

from tests.ray_cluster import (
    ROOT,
    Pdserve,
    actors,
    assert_gone,
    complete,
    end,
    free_ports,
    private_pdserve,
    title,
)
from tests.small_models import SmallModel, make_model

RAY_HELPERS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Look for Ray's head for a minute before they end too."""


@pytest.fixture
def alone() -> Iterator[Pdserve]:
    """With a runtime folder where nothing else runs."""
    with private_pdserve() as pdserve:
        yield pdserve


def assert_down(pdserve: Pdserve) -> None:
    """`pdserve down` ends the system, and nothing of it is left."""
    family = pdserve.processes()
    down = pdserve.run("down")
    assert (down.returncode, down.stdout, down.stderr) == (0, "default is down\n", "")
    assert [title(process) for process in family if process.is_running()] == []
    assert pdserve.processes() == []
    assert pdserve.records() == []


def test_a_user_starts_the_built_in_model_asks_it_and_ends_it(alone: Pdserve) -> None:
    up = alone.run("up", "--port", "0", "--detach")
    assert (up.returncode, up.stderr) == (0, ""), up.stdout
    assert "pdserve down --name default" in up.stdout
    shown = re.search(r"^pdserve serves pdserve-demo at (http://127\.0\.0\.1:\d+)$", up.stdout, re.MULTILINE)
    assert shown is not None, up.stdout
    url = shown[1]
    assert ask_with_openai(url, question_of_the_readme()) == "The number of Ada is 4711."
    curl = re.search(r"^curl .*\n.*$", up.stdout, re.MULTILINE)
    expected = re.search(r"^It should answer: (.*)$", up.stdout, re.MULTILINE)
    assert curl is not None
    assert expected is not None
    assert text_of_stream(subprocess.check_output(["bash", "-c", curl[0]], text=True)) == expected[1]

    status = alone.status()
    assert (status["state"], status["model"]) == ("ready", "pdserve-demo")
    assert [router["url"] for router in status["routers"]] == [url]
    assert [worker["id"] for worker in status["workers"]] == ["prefill-0", "decode-0"]
    for process in [*status["routers"], *status["workers"]]:
        assert process["state"] == "ready"
        assert psutil.pid_exists(process["pid"])
        assert all(process[key] for key in ("pool", "node", "address", "metrics_url"))
    for worker in status["workers"]:
        assert set(worker["kv_blocks"]) == {"free", "cached", "reserved", "active"}
    assert_down(alone)


def question_of_the_readme() -> str:
    body = re.search(r"-d '(\{.*?\})'", (ROOT / "README.md").read_text(), re.DOTALL)
    assert body is not None, "the README shows a request"
    content: str = json.loads(body[1])["messages"][0]["content"]
    return content


def ask_with_openai(url: str, question: str) -> str | None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        (model,) = client.models.list()
        answer = client.chat.completions.create(
            model=model.id, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=20
        )
    return answer.choices[0].message.content


def text_of_stream(events: str) -> str:
    bodies = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")]
    return "".join(json.loads(body)["choices"][0]["delta"].get("content") or "" for body in bodies)


def test_a_system_that_is_configured_in_many_ways_at_once(alone: Pdserve, chat_model: SmallModel) -> None:
    """From a file, with options over it: two unsplit workers behind two routers, at given ports and
    addresses, in another dtype and with another name and length."""
    port = free_ports(6)
    first, last = port + 2, port + 5
    options = ["--config", "deploy/unsplit.yaml", "--model", str(chat_model.folder), "--port", str(port)]
    options += ["--served-name", "somebody-else", "--dtype", "bfloat16", "--max-model-len", "64", "--detach"]
    settings = {
        "engine.threads": 1,
        "engine.kv_memory": "16MiB",
        "router.replicas": 2,
        "network.worker_ports": f"{first}-{last}",
        "network.address": "127.0.0.2",
        "network.bind": "0.0.0.0",
        "network.metrics_host": "0.0.0.0",
    }
    for key, value in settings.items():
        options += ["--set", f"{key}={value}"]
    up = alone.run("up", *options)
    assert (up.returncode, up.stderr) == (0, ""), up.stdout
    assert f"pdserve serves somebody-else at http://127.0.0.1:{port}\n" in up.stdout

    status = alone.status()
    urls = [router["url"] for router in status["routers"]]
    assert urls == [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    assert [worker["id"] for worker in status["workers"]] == ["unsplit-0", "unsplit-1"]
    for worker in status["workers"]:
        host, _, worker_port = worker["address"].rpartition(":")
        assert host == "127.0.0.2"
        assert first <= int(worker_port) <= last
        assert sum(worker["kv_blocks"].values()) == (16 << 20) // block_bytes(chat_model, num_bytes=2)
    for process in [*status["routers"], *status["workers"]]:
        assert process["metrics_url"].startswith("http://127.0.0.2:")
        assert "pdserve_" in httpx.get(process["metrics_url"]).text
    prompt = list(range(5, 45))
    answers = [complete(url, prompt, ignore_eos=True) for url in urls]
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8
    for url in urls:
        (card,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert (card["id"], card["max_model_len"]) == ("somebody-else", 64)
        assert httpx.post(f"{url}/v1/completions", json={"prompt": list(range(5, 70))}).status_code == 400
    assert_down(alone)


def block_bytes(model: SmallModel, num_bytes: int) -> int:
    """Of 16 tokens' keys and values, `num_bytes` each."""
    config = model.reference.config
    head_dim = config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers * 2 * 16 * config.num_key_value_heads * head_dim * num_bytes)


@pytest.mark.parametrize("at", ["starting a local Ray", "decode-0: importing torch"])
def test_ctrl_c_during_the_start(alone: Pdserve, chat_model: SmallModel, at: str) -> None:
    system = alone.start("--model", str(chat_model.folder), "--port", "0", "--set", "engine.kv_memory=16MiB")
    try:
        system.wait_for(at)
        assert system.interrupt() == 130, system.error_lines
        assert_gone(alone.processes())
        assert system.error_lines == []
        assert alone.records() == []
    finally:
        end(system)


def test_a_killed_launcher_takes_all_servers_along(alone: Pdserve, chat_model: SmallModel) -> None:
    system = alone.start("--model", str(chat_model.folder), "--port", "0", "--set", "engine.kv_memory=16MiB")
    try:
        system.wait_for("decode-0: importing torch")
        system.process.send_signal(signal.SIGKILL)
        system.join()
        left = {process: title(process).strip() for process in alone.processes()}
        assert_gone([process for process, name in left.items() if name not in RAY_HELPERS])
        for process, name in left.items():
            if name in RAY_HELPERS:
                process.kill()
        assert "no system named 'default' runs here" in alone.refusal("status")
    finally:
        end(system)


def test_a_worker_that_is_killed_at_each_start_fails_the_start(
    alone: Pdserve, chat_model: SmallModel
) -> None:
    system = alone.start("--model", str(chat_model.folder), "--port", "0", "--prefill", "0")
    try:
        for _ in range(2):
            seen = len(system.lines)
            system.wait_for("unsplit-0: importing torch", seen)
            (worker,) = [process for process in actors(system) if "WorkerActor" in title(process)]
            worker.kill()
        assert system.join() == 1
        (line,) = system.error_lines
        assert line.startswith(
            "pdserve: unsplit-0 cannot start: it died 2 times in a row, before it could serve"
        )
        assert "its process was killed (as the kernel does when memory runs out) or crashed" in line
        assert any("unsplit-0 lost" in said for said in system.lines)
        assert alone.processes() == []
        assert alone.records() == []
    finally:
        end(system)


def test_what_only_a_worker_can_find_out(alone: Pdserve, tmp_path: Path) -> None:
    """A model whose attention pdserve has not, started in the background: the error still comes here."""
    config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    line = alone.refusal("up", "--port", "0", "--prefill", "0", "--detach", "--model", str(tmp_path))
    assert "unsplit-0 cannot start: model" in line
    assert "(bloom) is not supported: it needs positions that cannot be given from outside" in line
    assert alone.has_started_ray
    assert alone.processes() == []
    assert alone.records() == []


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def claim_large_weights(folder: Path) -> None:
    """A terabyte of nothing in bfloat16, which takes no room on the disk."""
    change_config(folder, dtype="bfloat16")
    num_bytes = 1 << 40
    tensor = {"dtype": "BF16", "shape": [num_bytes // 2], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": tensor}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)


REFUSED_BEFORE_RAY: dict[str, tuple[Callable[[Path], Any], list[str], list[str]]] = {
    "quantised": (
        lambda folder: change_config(folder, quantization_config={"quant_method": "awq"}),
        [],
        ["is quantised (awq)", "use its float16, bfloat16 or float32 weights"],
    ),
    "an unknown architecture": (
        lambda folder: change_config(folder, model_type="llama9"),
        [],
        ["architecture 'llama9', which the installed transformers does not know", "update transformers"],
    ),
    "code of its own": (
        lambda folder: change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Config"}),
        [],
        ["(own) brings its own Python code: set model.trust_remote_code if you trust it"],
    ),
    "an unsupported architecture": (
        lambda folder: change_config(folder, model_type="deepseek_v3", kv_lora_rank=16),
        [],
        ["(deepseek_v3) is not supported: it needs", "latent attention"],
    ),
    "a damaged config.json": (
        lambda folder: (folder / "config.json").write_text("{"),
        [],
        ["has no readable config.json", "fetch it again"],
    ),
    "damaged weights": (cut_weights, [], ["model.safetensors is cut short", "fetch it again"]),
    "weights that do not fit": (
        claim_large_weights,
        [],
        ["does not fit: the weights of 2 workers take 1024.00 GiB each", "choose a smaller model"],
    ),
    "a dtype that does not fit": (
        claim_large_weights,
        ["--dtype", "float32"],
        ["the weights of 2 workers take 2048.00 GiB each", "a smaller model.dtype"],
    ),
    "a KV pool that does not fit": (
        lambda folder: None,
        ["--set", "engine.kv_memory=1TB"],
        ["the KV pools do not fit: those of 2 workers take 931.32 GiB each", "lower engine.kv_memory"],
    ),
}


@pytest.mark.parametrize("case", REFUSED_BEFORE_RAY)
def test_what_the_files_tell_is_refused_before_anything_starts(
    case: str, alone: Pdserve, tmp_path: Path
) -> None:
    spoil, options, words = REFUSED_BEFORE_RAY[case]
    make_model("llama", tmp_path)
    spoil(tmp_path)
    line = alone.refusal("up", "--port", "0", "--model", str(tmp_path), *options)
    for word in words:
        assert word in line
    assert not alone.has_started_ray
    assert alone.records() == []


def test_a_port_in_use(alone: Pdserve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port {port} on 127.0.0.1 is in use" in alone.refusal("up", "--port", port)


def test_a_missing_model(alone: Pdserve) -> None:
    line = alone.refusal("up", "--port", "0", "--model", "/nowhere/at/all")
    assert "model folder /nowhere/at/all does not exist" in line
    assert "check the path" in line


def test_a_folder_without_weights(alone: Pdserve, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert "has no weights" in alone.refusal("up", "--port", "0", "--model", str(folder))


def test_a_bad_key(alone: Pdserve, tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("router: {htp_port: 8000}\n")
    line = alone.refusal("up", "--config", str(file))
    assert f"{file}: router.htp_port is not a key: did you mean http_port?" in line


@pytest.mark.parametrize(
    ("address", "words"),
    [("127.0.0.1:1", "nothing answers at 127.0.0.1:1"), ("nonsense", "is not the address of a Ray cluster")],
)
def test_ray_is_not_there(alone: Pdserve, address: str, words: str) -> None:
    line = alone.refusal("up", "--address", address)
    assert words in line
    assert alone.records() == []


def test_no_cluster_to_join(alone: Pdserve) -> None:
    somewhere = Pdserve(alone.runtime, {"RAY_ADDRESS": ""})
    line = somewhere.refusal("up", "--address", "auto")
    assert "no Ray cluster runs on this machine: start one with `ray start --head`" in line
    assert alone.records() == []


@pytest.mark.parametrize("command", ["status", "down"])
def test_nothing_runs(alone: Pdserve, command: str) -> None:
    assert "no system named 'default' runs here: start one with `pdserve up`" in alone.refusal(command)


def test_nobody_to_generate(alone: Pdserve) -> None:
    assert "no system named 'default' runs here" in alone.refusal("generate", "hello")
    line = alone.refusal("generate", "hello", "--url", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in line
