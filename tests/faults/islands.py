"""A Ray cluster whose nodes live in network namespaces of their own, so that the link between two of them can
be cut while everybody else still reaches both.

        this namespace: head, router, clients
                     | bridge |
       namespace a: a node   namespace b: a node

A cut isolates the two ports of the bridge from each other: packets between them are dropped without a word,
as by a broken switch. Needs root, iproute2 and util-linux.

Every name has the id of the process that gave it, so runs do not meet, and each removes what killed ones have
left.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.ray_cluster import Up, end, free_ports

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_worker_niceness": "0",
}
NODES = ("a", "b")
_NAMESPACES = Path("/run/netns")
_COMMANDS = ("ip", "setpriv")


def why_not() -> str:
    """Why there can be no islands here; empty when there can. Tries it out."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [command for command in _COMMANDS if not shutil.which(command)]:
        return f"network namespaces need iproute2 and util-linux ({' and '.join(missing)})"
    try:
        with _network():
            isolate("on")
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"
    return ""


class Islands:
    """A head and two nodes, ``a`` and ``b``."""

    def __init__(self, address: str) -> None:
        self.address = address
        """Of the head, for --address."""

    def cut(self) -> None:
        """Nothing passes between the two nodes from now on."""
        isolate("on")

    def heal(self) -> None:
        isolate("off")


@contextlib.contextmanager
def islands(resources: dict[str, str]) -> Iterator[Islands]:
    """`resources` of the nodes ``head``, ``a`` and ``b``, as JSON for Ray. Nothing is left at the end."""
    remove_leftovers()
    with contextlib.ExitStack() as undo:
        folder = undo.enter_context(_folder())
        subnet = undo.enter_context(_network())
        port, client_port = (free_ports(2) + number for number in range(2))
        address = f"{subnet}.1:{port}"
        head = ["--head", f"--node-ip-address={subnet}.1", f"--port={port}", "--include-dashboard=false"]
        head += [f"--ray-client-server-port={client_port}", f"--temp-dir={folder / 'ray'}"]
        _start_node(undo, [], [*head, f"--resources={resources['head']}"])
        for number, name in enumerate(NODES, start=2):
            options = [f"--address={address}", f"--node-ip-address={subnet}.{number}"]
            inside = ["ip", "netns", "exec", _own(name)]
            _start_node(undo, inside, [*options, f"--resources={resources[name]}"])
        yield Islands(address)


def isolate(switch: str) -> None:
    """``on``: the two nodes' ports of the bridge pass nothing to each other; ``off``: they do."""
    for name in NODES:
        _ip("link", "set", "dev", _own(name), "type", "bridge_slave", "isolated", switch)


def remove_leftovers() -> None:
    """Namespaces, bridges and folders of runs that were killed. Their Ray has ended with them."""
    for space in sorted(_NAMESPACES.glob("*")):
        if _is_leftover(space.name):
            _ip("netns", "del", space.name)
    for link in psutil.net_if_stats():
        if _is_leftover(link) and link[-1] not in NODES:  # those go with their namespaces
            _ip("link", "del", link)
    for folder in Path(tempfile.gettempdir()).glob("pds*-*"):
        if _is_leftover(folder.name.partition("-")[0]):
            shutil.rmtree(folder, ignore_errors=True)


def _own(suffix: str = "") -> str:
    """A name that no other running process gives; interfaces' may have 15 characters."""
    return f"pds{os.getpid()}{suffix}"


def _is_leftover(name: str) -> bool:
    made_by = re.fullmatch(rf"pds(\d+)[{''.join(NODES)}]?", name)
    return made_by is not None and not psutil.pid_exists(int(made_by[1]))


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"{_own()}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _network() -> Iterator[str]:
    """The bridge, and one namespace per node with an end of it; the first three numbers of all addresses."""
    subnet = _free_subnet()
    with contextlib.ExitStack() as undo:
        _ip("link", "add", _own(), "type", "bridge")
        undo.callback(_ip, "link", "del", _own())
        _ip("addr", "add", f"{subnet}.1/24", "dev", _own())
        _ip("link", "set", _own(), "up")
        for number, name in enumerate(NODES, start=2):
            undo.enter_context(_namespace(_own(name), f"{subnet}.{number}"))
        yield subnet


def _free_subnet() -> str:
    """In which nobody here has an address."""
    taken = {one.address.rpartition(".")[0] for some in psutil.net_if_addrs().values() for one in some}
    subnets = (f"10.213.{(os.getpid() + number) % 256}" for number in range(256))
    return next(subnet for subnet in subnets if subnet not in taken)


@contextlib.contextmanager
def _namespace(space: str, address: str) -> Iterator[None]:
    """With one interface, ``eth0``, whose other end is a port of the bridge."""
    with contextlib.ExitStack() as undo:
        _ip("netns", "add", space)
        undo.callback(_ip, "netns", "del", space)
        _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
        undo.callback(_ip, "link", "del", space)  # goes with its namespace, but only some time later
        _ip("link", "set", space, "master", _own(), "up")
        for command in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _ip("-n", space, *command)
        _ip("-n", space, "link", "set", "lo", "up")
        yield


def _start_node(undo: contextlib.ExitStack, inside: list[str], options: list[str]) -> None:
    """One `ray start`, until `undo`; it ends with this process, however that ends. One by one: nodes that
    start at the same time choose the same sockets in the one folder that they share."""
    ray = Path(sys.executable).with_name("ray")
    command = ["setpriv", "--pdeathsig", "TERM", *inside, str(ray), "start", "--block", "--num-cpus=2"]
    # Its own range of ports is that of every other Ray on this machine.
    command += ["--object-store-memory=83886080", "--min-worker-port=0", "--max-worker-port=0"]
    process = subprocess.Popen(
        [*command, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **SETTINGS, "PYTHONUNBUFFERED": "1"},
        process_group=0,
    )
    node = Up(process)
    undo.callback(end, node)
    node.wait_for("Ray runtime started.")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
