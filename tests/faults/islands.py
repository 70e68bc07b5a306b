"""A Ray cluster whose nodes live in network namespaces of their own, so that the link between two of them can
be cut while everybody else still reaches both.

        this namespace: head, router, controller, clients
                     | bridge |
       namespace a: a node   namespace b: a node

A cut isolates the two ports of the bridge from each other: packets between them are dropped without a word,
as by a broken switch. Needs root and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.ray_cluster import free_ports

SUBNET = "10.213.77"
BRIDGE = "pdsbr0"
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
}


def why_not() -> str:
    """Why there can be no islands here; empty when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    return "" if shutil.which("ip") else "network namespaces need iproute2 (the command ip)"


class Islands:
    """A head and two nodes, ``a`` and ``b``."""

    def __init__(self, address: str) -> None:
        self.address = address
        """Of the head, for --address."""

    def cut(self) -> None:
        """Nothing passes between the two nodes from now on."""
        self._isolate("on")

    def heal(self) -> None:
        self._isolate("off")

    @staticmethod
    def _isolate(switch: str) -> None:
        for name in ("a", "b"):
            _ip("link", "set", "dev", f"pds-{name}", "type", "bridge_slave", "isolated", switch)


@contextlib.contextmanager
def islands(resources: dict[str, str]) -> Iterator[Islands]:
    """`resources` of the nodes ``head``, ``a`` and ``b``, as JSON for Ray. Nothing is left at the end."""
    port = free_ports(1)
    with contextlib.ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="pds-")))
        _ip("link", "add", BRIDGE, "type", "bridge")
        undo.callback(_ip, "link", "del", BRIDGE)
        _ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number, name in enumerate(("a", "b"), start=2):
            undo.enter_context(_namespace(name, f"{SUBNET}.{number}"))
        options = ["--head", f"--node-ip-address={SUBNET}.1", f"--port={port}"]
        options += ["--include-dashboard=false", f"--temp-dir={folder / 'ray'}"]
        undo.enter_context(_node([], [*options, f"--resources={resources['head']}"], folder))
        address = f"{SUBNET}.1:{port}"
        for number, name in enumerate(("a", "b"), start=2):
            inside = ["ip", "netns", "exec", f"pds-{name}"]
            options = [f"--address={address}", f"--node-ip-address={SUBNET}.{number}"]
            undo.enter_context(_node(inside, [*options, f"--resources={resources[name]}"], folder))
        yield Islands(address)


@contextlib.contextmanager
def _namespace(name: str, address: str) -> Iterator[None]:
    """With one interface, ``eth0``, whose other end is a port of the bridge."""
    space = f"pds-{name}"
    _ip("netns", "add", space)
    try:
        _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        _ip("link", "set", space, "master", BRIDGE, "up")
        for command in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _ip("-n", space, *command)
        _ip("-n", space, "link", "set", "lo", "up")
        yield
    finally:
        _ip("netns", "del", space)


@contextlib.contextmanager
def _node(inside: list[str], options: list[str], folder: Path) -> Iterator[None]:
    """One `ray start`, for as long as the block runs."""
    ray = Path(sys.executable).with_name("ray")
    command = [*inside, str(ray), "start", "--block", "--num-cpus=6", "--object-store-memory=83886080"]
    with (folder / "nodes.log").open("a+") as log:
        begin = log.tell()
        process = subprocess.Popen(
            [*command, *options],
            env={**os.environ, **SETTINGS, "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=log,
            process_group=0,
        )
        try:
            _wait_until_started(process, folder / "nodes.log", begin)
            yield
        finally:
            _end(process)


def _wait_until_started(process: "subprocess.Popen[bytes]", log: Path, begin: int) -> None:
    with log.open() as said:
        said.seek(begin)
        while "Ray runtime started." not in (text := said.read()):
            assert process.poll() is None, f"no Ray: {text}"
            said.seek(begin)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)


def _end(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, 10.0)
    for one in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(alive, 5.0)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
