"""One value, validated at the door: files, options, and a line for everything that is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from pdserve.config import DeployConfig, load_config
from pdserve.contract.errors import ConfigError
from router.admission import AdmissionLimits
from router.api_settings import ApiLimits
from tools import make_config_docs

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def refusal(file: Path | None = None, **options: object) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(file, {key.replace("__", "."): value for key, value in options.items()})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_may_be_left_out() -> None:
    config = load_config()
    assert config == DeployConfig()
    assert (config.pools.prefill.replicas, config.pools.decode.replicas) == (1, 1)
    assert config.is_split


def test_a_file_is_read_and_options_win_over_it(tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("router: {http_port: 9000, host: 0.0.0.0}\npools: {prefill: {replicas: 0}}\n")
    config = load_config(file, {"router.http_port": 9001, "engine.kv_memory": "512MiB"})
    assert (config.router.http_port, config.router.host) == (9001, "0.0.0.0")
    assert config.engine.kv_memory == 512 * 2**20
    assert not config.is_split


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("# nothing yet\n")
    assert load_config(file) == DeployConfig()


@pytest.mark.parametrize(
    ("written", "meant"),
    [("1000", 1000), ("2k", 2000), ("3MB", 3_000_000), ("1.5GiB", 1_610_612_736), (4096, 4096), (0.25, 0.25)],
)
def test_memory_is_bytes_or_a_fraction(written: object, meant: float) -> None:
    assert load_config(None, {"engine.kv_memory": written}).engine.kv_memory == meant


def test_port_ranges() -> None:
    config = load_config(None, {"network.worker_ports": "30000-30010"})
    assert config.network.worker_ports == (30000, 30010)


def test_an_unknown_key_names_the_file_the_key_and_what_is_meant(tmp_path: Path) -> None:
    file = tmp_path / "deploy.yaml"
    file.write_text("engine:\n  blok_size: 8\n")
    line = refusal(file)
    assert line.startswith(f"{file}: engine.blok_size is not a key: did you mean block_size?")
    assert "kv_memory" in line


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("engine.block_size", 0, ["engine.block_size", "greater than or equal to 1", "0"]),
        ("engine.block_size", "many", ["engine.block_size", "a valid integer", "'many'"]),
        ("engine.chunk_tokens", 100, ["chunk_tokens must be a multiple of block_size (16)"]),
        ("engine.kv_memory", "lots", ["engine.kv_memory", "512MiB"]),
        ("engine.kv_memory", 1.5, ["engine.kv_memory", "0.95"]),
        ("model.dtype", "int4", ["model.dtype", "'bfloat16'", "'int4'"]),
        ("pools.decode.replicas", 0, ["decode.replicas must be at least 1"]),
        ("router.http_port", 70000, ["router.http_port", "65535"]),
        ("network.worker_ports", "9-3", ["network.worker_ports", "30000-30999"]),
        (
            "network.transports",
            ["pigeon"],
            ["network.transports", "'shared_memory', 'cuda_ipc', 'process_group', 'nixl' or 'grpc'"],
        ),
        ("network.transports", [], ["network.transports"]),
        (
            "network",
            {"transports": ["nixl"], "tls": {"certificate": "c", "key": "k", "authority": "a"}},
            ["transports: nixl sends KV unencrypted"],
        ),
        ("name", "No Good", ["name", "'No Good'"]),
        ("model", 3, ["model", "keys of its own"]),
        ("modle.path", "x", ["modle is not a key: did you mean model?"]),
        ("router.limits.max_m", 1, ["router.limits.max_m", "did you mean max_n?"]),
    ],
)
def test_a_bad_value_names_the_key_and_what_is_allowed(key: str, value: object, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {key: value})
    line = str(caught.value)
    assert line.startswith("command line: ")
    assert "\n" not in line
    for word in words:
        assert word in line


def test_a_section_that_is_also_a_value() -> None:
    line = refusal(None, model="foo", model__path="x")
    assert line == (
        "command line: model.path cannot be set, because model has been set to 'foo': leave out one of them"
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "check the path after --config" in refusal(tmp_path / "missing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [\n")
    assert f"{broken} is not valid YAML" in refusal(broken)
    broken.write_text("- a list\n")
    assert "must hold keys and values" in refusal(broken)
    broken.write_bytes(b"model: \xff\xfe\n")
    assert f"{broken} is not valid YAML" in refusal(broken)


def test_the_value_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config().engine.block_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("file", sorted(DEPLOY.glob("*.yaml")), ids=lambda file: file.name)
def test_the_ready_files_are_valid(file: Path) -> None:
    load_config(file)
    assert f"--config deploy/{file.name}" in file.read_text(), "it shows how to start with it"


def test_laptop_is_the_default_written_out() -> None:
    assert load_config(DEPLOY / "laptop.yaml") == DeployConfig()


def test_limits_have_one_set_of_defaults() -> None:
    router = DeployConfig().router
    assert ApiLimits(**router.limits.model_dump()) == ApiLimits()
    assert AdmissionLimits(**router.admission.model_dump()) == AdmissionLimits()


def test_every_key_is_described() -> None:
    def undescribed(section: type[BaseModel]) -> list[str]:
        assert section.__doc__
        missing = []
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                missing += undescribed(field.annotation)
            elif not field.description:
                missing.append(f"{section.__name__}.{name}")
        return missing

    assert undescribed(DeployConfig) == []


def test_the_page_is_generated_from_the_code() -> None:
    assert make_config_docs.PAGE.read_text() == make_config_docs.make_page()


def test_reading_a_configuration_loads_neither_torch_nor_ray() -> None:
    program = "import sys, pdserve.config; print(sorted({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "[]"
