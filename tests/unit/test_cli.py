"""The command line: what it says, what it makes of options, and that errors are one line."""

import contextlib
import socket

import pytest

from controller import cli, running
from controller.actors import describe_shortage
from controller.plan import Deployment, ModelSource
from controller.ports import hold_api_ports
from controller.room import MAX_AUTO_KV_BYTES, kv_memory, require_room_for_all
from controller.start_errors import start_error
from controller.status import (
    ProcessReport,
    ProcessSpec,
    ProcessState,
    ProcessStatus,
    SystemState,
    SystemStatus,
)
from controller.terminal import Progress, ready_text, table
from pdserve.config import ResourcesConfig, load_config
from pdserve.contract.errors import ConfigError, ErrorCode, NotFound
from pdserve.contract.work import BlockCounts
from router.listen import bind


def overrides(*arguments: str) -> dict[str, object]:
    return cli._overrides(cli._parser().parse_args(["up", *arguments]))


@pytest.mark.parametrize(
    "command", [[], ["up"], ["down"], ["status"], ["check"], ["fault"], ["scale"], ["generate"]]
)
def test_help_has_examples(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "--help"])
    assert left.value.code == 0
    assert f"pdserve {' '.join(command)}".strip() in capsys.readouterr().out.partition("examples:")[2]


def test_options_become_keys_of_the_configuration() -> None:
    given = overrides(
        "--model",
        "m",
        "--prefill",
        "0",
        "--decode",
        "3",
        "--dtype",
        "bfloat16",
        "--port",
        "9",
        "--name",
        "two",
    )
    assert given == {
        "name": "two",
        "model.path": "m",
        "model.dtype": "bfloat16",
        "pools.prefill.replicas": 0,
        "pools.decode.replicas": 3,
        "router.http_port": 9,
    }
    config = load_config(None, given)
    assert (config.name, config.is_split, config.pools.decode.replicas) == ("two", False, 3)


def test_any_key_can_be_set_as_yaml() -> None:
    given = overrides(
        "--set", "engine.kv_memory=64MiB", "--set", "pools.decode.resources.custom={gpu_node: 1}"
    )
    config = load_config(None, given)
    assert config.engine.kv_memory == 64 * 2**20
    assert config.pools.decode.resources.custom == {"gpu_node": 1.0}


def test_every_option_names_a_key_that_exists() -> None:
    options = ["--revision", "r", "--served-name", "s", "--max-model-len", "99", "--threads", "1"]
    options += ["--host", "h", "--grpc-port", "0", "--address", "auto"]
    load_config(None, overrides(*options))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--set", "engine"], "--set 'engine' is not KEY=VALUE"),
        (["up", "--set", "engine.kv_memory=["], "the value is not valid YAML"),
        (["up", "--set", "engine.blocksize=3"], "did you mean block_size?"),
        (["up", "--set", "model=foo", "--set", "model.path=x"], "model has been set to 'foo'"),
        (["up", "--dtype", "int3"], "model.dtype is not valid"),
        (["up", "--decode", "0"], "decode.replicas must be at least 1"),
        (["up", "--port", "-1"], "router.http_port is not valid"),
        (["up", "--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
    ],
)
def test_errors_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("pdserve: ")
    assert said.err.count("\n") == 1
    assert words in said.err


# --- what is shown ---

BLOCKS = BlockCounts(free=5, cached=2, reserved=1, active=0)


def a_process(pool: str, state: ProcessState, message: str = "") -> ProcessStatus:
    report = ProcessReport(77, "node-a", "127.0.0.1:5000", "http://127.0.0.1:6000/metrics", takes="chat")
    if pool != "router":
        report = ProcessReport(78, "node-a", "127.0.0.1:5001", "http://x/metrics", kv_blocks=BLOCKS)
    return ProcessStatus(f"{pool}-0", pool, state, message, 2, report)


def a_system(*processes: ProcessStatus) -> SystemStatus:
    return SystemStatus(1, "default", SystemState.READY, "a-model", processes, news=processes)


def test_json_has_every_field() -> None:
    waiting = ProcessStatus("decode-1", "decode", ProcessState.PENDING, "no node", 0, None)
    system = a_system(
        a_process("router", ProcessState.READY), a_process("decode", ProcessState.READY), waiting
    )
    content = system.as_json()
    (router,) = content["routers"]
    assert router["url"] == "http://127.0.0.1:5000"
    worker, pending = content["workers"]
    assert worker == {
        "id": "decode-0",
        "pool": "decode",
        "pid": 78,
        "node": "node-a",
        "address": "127.0.0.1:5001",
        "metrics_url": "http://x/metrics",
        "state": "ready",
        "message": "",
        "restarts": 2,
        "kv_blocks": {"free": 5, "cached": 2, "reserved": 1, "active": 0},
        "kv_transports": [],
    }
    assert set(pending) == set(worker)
    assert pending["pid"] is pending["kv_blocks"] is None


def test_the_table_shows_blocks_and_messages() -> None:
    text = table(a_system(a_process("decode", ProcessState.LOST, "its process died")))
    assert "5/2/1/0" in text
    assert "decode-0: its process died" in text


def test_progress_says_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    loading = ProcessStatus("decode-0", "decode", ProcessState.STARTING, "loading weights", 0, None)
    for _ in range(3):
        progress.show(a_system(loading))
    progress.show(a_system(a_process("decode", ProcessState.READY)))
    assert [line.partition("] ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "decode-0: loading weights",
        "decode-0 ready",
    ]


@pytest.mark.parametrize(
    ("takes", "path", "words"),
    [
        ("chat", "/v1/chat/completions", '"messages"'),
        ("text", "/v1/completions", '"prompt": "Once upon'),
        ("tokens", "/v1/completions", "return_token_ids"),
    ],
)
def test_the_example_fits_the_model(takes: str, path: str, words: str) -> None:
    text = ready_text(a_system(), "http://127.0.0.1:1", takes, is_demo=False)
    assert f"http://127.0.0.1:1{path}" in text
    assert words in text


def test_the_demo_model_is_asked_what_it_knows() -> None:
    text = ready_text(a_system(), "http://127.0.0.1:1", "chat", is_demo=True)
    answer = text.partition("It should answer: ")[2]
    assert answer.startswith("The number of ")
    assert answer.split()[-1].rstrip(".") in text.partition("It should answer")[0], "the prompt tells it"


# --- who runs here, who fits where ---


def test_systems_are_found_by_name(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    running.require_free("one")
    running.announce(running.this_launcher("one", is_local=True))
    assert running.require("one").launcher is not None
    with pytest.raises(ConfigError, match="'one' runs already"):
        running.require_free("one")
    with pytest.raises(
        NotFound, match="no system named 'two' runs here: running: one; choose one with --name"
    ):
        running.require("two")
    running.withdraw("one")
    with pytest.raises(NotFound, match="start one with `pdserve up`"):
        running.require("one")


def test_a_system_whose_launcher_is_gone_is_forgotten(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    here = running.this_launcher("one", is_local=True)
    reused = running.RunningSystem("one", here.launcher_pid, here.launcher_started_at - 1000, is_local=True)
    running.announce(reused)
    assert running.find("one") is None


NODES = [
    {"NodeID": "a", "Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
    {"NodeID": "b", "Alive": True, "Resources": {"CPU": 8.0}},
    {"NodeID": "c", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
]


@pytest.mark.parametrize(
    ("wanted", "free", "words"),
    [
        ({}, {"a": {}, "b": {}}, ""),
        ({"num_gpus": 1}, {"a": {"GPU": 1.0}, "b": {}}, ""),
        (
            {"num_gpus": 1},
            {"a": {"GPU": 0.0}, "b": {}},
            "asks for GPU 1, and all nodes that have it are full",
        ),
        ({"num_gpus": 2}, {"a": {"GPU": 1.0}, "b": {}}, "asks for GPU 2, and no node has that (2 nodes)"),
        ({"num_gpus": 1, "num_cpus": 8}, {"a": {"GPU": 1.0}, "b": {"CPU": 8.0}}, "CPU 8, GPU 1, and no node"),
    ],
)
def test_what_is_missing_is_named(
    wanted: dict[str, object], free: dict[str, dict[str, float]], words: str
) -> None:
    spec = ProcessSpec("decode-0", "decode", 0)
    line = describe_shortage(spec, ResourcesConfig.model_validate(wanted), NODES, free)
    assert words in line
    assert bool(line) == bool(words)
    if line:
        assert "pools.decode.resources" in line


# --- ports ---


def test_the_launcher_holds_the_ports_of_its_router() -> None:
    """Nobody who asks for any port gets them, and the router can still listen, again and again."""
    with contextlib.ExitStack() as held:
        router = hold_api_ports(load_config(None, {"router.http_port": 0}), held).router
        assert router.http_port != router.grpc_port
        for port in (router.http_port, router.grpc_port, router.admin.port, router.http_port):
            assert port
            bind("127.0.0.1", port, "port").close()
        with pytest.raises(OSError), socket.socket() as foreign:
            foreign.bind(("127.0.0.1", router.http_port))
    with socket.socket() as foreign:
        foreign.bind(("127.0.0.1", router.http_port))


def test_the_first_port_that_is_taken_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, contextlib.ExitStack() as held:
        port = taken.getsockname()[1]
        config = load_config(None, {"router.http_port": 0, "router.grpc_port": port})
        with pytest.raises(ConfigError, match=rf"port {port} on 127\.0\.0\.1 is in use: .*\(--grpc-port\)"):
            hold_api_ports(config, held)


def test_several_routers_that_may_take_any_port_take_theirs_themselves() -> None:
    with contextlib.ExitStack() as held:
        options = {"router.http_port": 0, "router.grpc_port": None, "router.replicas": 2}
        router = hold_api_ports(load_config(None, options), held).router
    assert (router.http_port, router.grpc_port, router.admin.port) == (0, None, 0)


def test_the_admin_port_is_held_at_its_own_host() -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken, contextlib.ExitStack() as held:
        port = taken.getsockname()[1]
        options = {"router.http_port": 0, "router.admin.host": "127.0.0.2", "router.admin.port": port}
        with pytest.raises(
            ConfigError, match=rf"port {port} on 127\.0\.0\.2 is in use: .*router\.admin\.port"
        ):
            hold_api_ports(load_config(None, options), held)


# --- memory ---

GIB = 1 << 30


@pytest.mark.parametrize(
    ("num_workers", "kv", "weight_bytes", "words"),
    [
        (1, "auto", 8 * GIB, ""),
        (2, "auto", 5 * GIB, "the weights of 2 workers take 5.00 GiB each, free are 8.00 GiB"),
        (1, "auto", 9 * GIB, "the weights of one worker take 9.00 GiB, free are 8.00 GiB"),
        (2, "2GiB", 2 * GIB, ""),
        (2, "3GiB", 2 * GIB, "those of 2 workers take 3.00 GiB each, free beside the weights are 4.00 GiB"),
        (2, 0.9, 4 * GIB, ""),
    ],
)
def test_workers_of_one_machine_have_to_fit_together(
    num_workers: int, kv: object, weight_bytes: int, words: str
) -> None:
    options = {"pools.prefill.replicas": 0, "pools.decode.replicas": num_workers, "engine.kv_memory": kv}
    config = load_config(None, options)
    if not words:
        return require_room_for_all(config, "m", weight_bytes, 8 * GIB)
    with pytest.raises(ConfigError) as caught:
        require_room_for_all(config, "m", weight_bytes, 8 * GIB)
    assert words in str(caught.value)
    assert str(caught.value).endswith("or free memory")
    return None


@pytest.mark.parametrize(
    ("wanted", "is_gpu", "share", "expected"),
    [
        (GIB, False, 0.5, (GIB, 0.5)),
        (0.8, False, 0.25, (None, 0.2)),
        (0.8, True, 1.0, (None, 0.8)),
        ("auto", False, 0.5, (None, 0.25)),
        ("auto", False, 1.0, (MAX_AUTO_KV_BYTES, 0.5)),
        ("auto", True, 0.5, (None, 0.425)),
    ],
)
def test_pools_of_one_machine_share_what_is_free(
    wanted: float, is_gpu: bool, share: float, expected: tuple[int | None, float]
) -> None:
    assert kv_memory(wanted, is_gpu, share, free_bytes=10 * GIB) == expected


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("no port is free"), ErrorCode.INVALID_REQUEST, "no port is free"),
        (OutOfMemoryError("CUDA out of memory.\nTried"), ErrorCode.INTERNAL, "(CUDA out of memory.): lower"),
        (
            MemoryError(),
            ErrorCode.INTERNAL,
            "it ran out of memory (no more is known): lower engine.kv_memory",
        ),
        (OSError(5, "Input/output error"), ErrorCode.INTERNAL, "OSError: [Errno 5] Input/output error; more"),
    ],
)
def test_whatever_ends_a_start_becomes_one_line(error: Exception, code: ErrorCode, words: str) -> None:
    told = start_error(error)
    assert told.code is code
    assert words in told.message
    assert "\n" not in told.message


def test_processes_of_a_deployment() -> None:
    config = load_config(None, {"pools.prefill.replicas": 2, "router.replicas": 2, "ray.address": "auto"})
    deployment = Deployment(config, ModelSource("m", None, "m"))
    assert [spec.id for spec in deployment.specs()] == [
        "router-0",
        "router-1",
        "prefill-0",
        "prefill-1",
        "decode-0",
    ]
    assert not deployment.is_local
