"""Starting and ending: what goes wrong is said in one line, and nothing is ever left running."""

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.ray_cluster import Pdserve, assert_gone, complete, end, private_pdserve
from tests.small_models import SmallModel


@pytest.fixture
def alone() -> Iterator[Pdserve]:
    """With a runtime folder where nothing else runs."""
    with private_pdserve() as pdserve:
        yield pdserve


def test_detached_unsplit_and_down(alone: Pdserve, chat_model: SmallModel) -> None:
    options = ("--port", "0", "--threads", "1", "--prefill", "0", "--set", "engine.kv_memory=16MiB")
    done = alone.run("up", "--model", str(chat_model.folder), "--detach", *options)
    assert done.returncode == 0, done.stderr
    assert "pdserve down" in done.stdout
    status = alone.status()
    assert [worker["id"] for worker in status["workers"]] == ["unsplit-0"]
    assert len(complete(status["routers"][0]["url"], list(range(5, 45)), ignore_eos=True)) == 8
    down = alone.run("down")
    assert (down.returncode, down.stdout) == (0, "default is down\n"), down.stderr
    assert_gone(alone.processes())
    assert alone.records() == []


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
    """Two helpers of Ray's own look for its head for a minute before they end too."""
    system = alone.start("--model", str(chat_model.folder), "--port", "0", "--set", "engine.kv_memory=16MiB")
    try:
        system.wait_for("decode-0: importing torch")
        system.process.send_signal(signal.SIGKILL)
        system.join()
        helpers = [process for process in alone.processes() if is_helper(process)]
        assert_gone([process for process in alone.processes() if process not in helpers])
        for process in helpers:
            process.kill()
        assert "no system named 'default' runs here" in alone.refusal("status")
    finally:
        end(system)


def is_helper(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return "agent" in " ".join(process.cmdline()).lower()
    return False


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


@pytest.mark.parametrize("command", ["status", "down"])
def test_nothing_runs(alone: Pdserve, command: str) -> None:
    assert "no system named 'default' runs here: start one with `pdserve up`" in alone.refusal(command)


def test_nobody_to_generate(alone: Pdserve) -> None:
    assert "no system named 'default' runs here" in alone.refusal("generate", "hello")
    line = alone.refusal("generate", "hello", "--url", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in line
