"""A system on Ray with TLS: its token is nowhere to be read, and outlives the processes that have it."""

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pdserve.contract.ids import Incarnation
from pdserve.contract.messages import Hello, WatchOpen
from pdserve.contract.ports import Call
from pdserve.rpc.credentials import Credentials, DeploymentToken, TlsIdentity
from pdserve.rpc.grpc_rpc import GrpcRpc
from tests.contract.tls_files import make_files
from tests.integration.conftest import RaySystem
from tests.integration.test_ray_system import wait_until_ready, wait_until_replaced
from tests.ray_cluster import Pdserve, Up, actors, complete, private_pdserve, title
from tests.small_models import SmallModel

TOKEN = "a-token-that-stands-nowhere-else-0123456789"
"""What this launcher draws, so that it can be looked for."""

LAUNCHER = f"import secrets; secrets.token_urlsafe = lambda n: '{TOKEN[::-1]}'[::-1]"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@dataclass
class Knowing(Pdserve):
    """Commands whose launcher draws TOKEN. It stands reversed in their own command line."""

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        code = f"{LAUNCHER}; import sys; from controller.cli import main; sys.exit(main())"
        return [sys.executable, "-c", code, *arguments]


@pytest.fixture
def knowing() -> Iterator[Knowing]:
    with private_pdserve() as pdserve:
        yield Knowing(pdserve.runtime)


def test_the_token_is_nowhere_to_be_read_and_survives_controller_and_workers(
    knowing: Knowing, chat_model: SmallModel, tmp_path: Path
) -> None:
    files = make_files(tmp_path / "tls")
    options = [
        "--port",
        "0",
        "--threads",
        "1",
        "--set",
        "engine.kv_memory=16MiB",
        "--set",
        "logs.level=DEBUG",
    ]
    for key in ("certificate", "key", "authority"):
        options += ["--set", f"network.tls.{key}={getattr(files, key)}"]
    options += ["--set", "network.transports=[grpc]"]  # so that KV goes through TLS as well
    identity = TlsIdentity.read(files)
    with knowing.up("--model", str(chat_model.folder), *options) as up:
        system = RaySystem(knowing, up, chat_model)
        expected = complete(up.url, list(range(5, 60)))
        lose_controller(system)
        worker = next(each for each in knowing.status()["workers"] if each["id"] == "prefill-0")
        said = len(up.lines)
        os.kill(worker["pid"], signal.SIGKILL)
        wait_until_replaced(system, [worker], said)
        assert complete(up.url, list(range(5, 60))) == expected
        for each in knowing.status()["workers"]:
            assert asyncio.run(is_greeted(each["address"], Credentials(DeploymentToken(TOKEN), identity)))
        assert not places_with_the_token(up, knowing)


async def is_greeted(address: str, credentials: Credentials) -> bool:
    """Whether the worker at `address` takes `credentials`."""
    rpc = GrpcRpc(credentials)
    stream = await rpc.open(address, Call.WATCH)
    await stream.send(WatchOpen("a test", Incarnation(1)))
    answer = await stream.receive()
    await rpc.close()
    return isinstance(answer, Hello)


def lose_controller(system: RaySystem) -> None:
    (controller,) = [each for each in actors(system.up) if "ControllerActor" in title(each)]
    controller.kill()
    controller.wait()
    wait_until_ready(system, {controller.pid})


def places_with_the_token(up: Up, pdserve: Pdserve) -> list[str]:
    """Command lines, environments, files (Ray's logs and sessions among them) and what was printed."""
    found = [f"printed: {line}" for line in (*up.lines, *up.error_lines) if TOKEN in line]
    found += [f"command line of {process.pid}" for process in up.family() if TOKEN in title(process)]
    found += [f"environment of {process.pid}" for process in up.family() if TOKEN in environment(process)]
    files = [path for path in pdserve.runtime.rglob("*") if path.is_file() and not path.is_symlink()]
    assert files
    found += [str(path) for path in files if TOKEN.encode() in path.read_bytes()]
    return found


def environment(process: psutil.Process) -> str:
    try:
        return str(process.environ())
    except psutil.Error:  # it has ended since
        return ""


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("network.address=8.8.8.8", "which is not a private address"),
        ("network.tls.certificate=/nothing/here", "key and authority must be given too"),
    ],
)
def test_a_start_that_would_not_be_protected_is_refused(
    knowing: Knowing, chat_model: SmallModel, setting: str, words: str
) -> None:
    line = knowing.refusal("up", "--model", str(chat_model.folder), "--port", "0", "--set", setting)
    assert words in line
    assert "network.tls" in line
