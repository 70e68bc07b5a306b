"""The Ray cluster under a system: a local one that lives and dies with the launcher, or one that is there.

Call `ray_environment.prepare_ray` before importing this.
"""

import asyncio
import ctypes
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor

import psutil
import ray

from controller import head
from controller.actors import NAMESPACE
from controller.start_errors import LOGS
from pdserve.contract.errors import ConfigError, Unavailable

OBJECT_STORE_BYTES = 80 << 20
"""About the least that Ray takes; nothing of weight travels through Ray."""
EXIT_TIMEOUT_S = 3.0
"""How long Ray's processes may take to end before they are killed."""
_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
_DEFAULT_PORTS = {"ray://": 10001, "": 6379}


class Cluster:
    """This process' connection to Ray. All of it runs on one thread of its own: Linux ends a local Ray's
    processes together with the thread that started them, and signals keep going to the main thread."""

    def __init__(self, address: str | None, num_processes: int = 0) -> None:
        """`address` of a running cluster; None starts a local one for `num_processes` actors."""
        self.is_local = address is None
        self._address = address
        self._num_processes = num_processes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._processes: list[psutil.Process] = []

    async def connect(self) -> None:
        """Raises ConfigError when the cluster cannot be reached, Unavailable when a local one does not start.
        Even when cancelled it does not return
        before Ray's own start is over, so that nothing half-started is left behind."""
        starting = asyncio.get_running_loop().run_in_executor(self._thread, self._connect)
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})
            raise

    @property
    def address(self) -> str:
        """By which another process on this machine connects."""
        return self._address or str(ray.get_runtime_context().gcs_address)

    async def has_head(self) -> bool:
        """Without it Ray starts and kills nothing, and takes minutes to say so."""
        return await head.answers(self.address.removeprefix("ray://"))

    async def close(self) -> None:
        """Disconnect; a local cluster is ended, and all its processes with it."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    def _connect(self) -> None:
        _quiet()
        if self._address is None:
            _adopt_orphans()
            _start_local(self._num_processes)
        else:
            self._address = _join(self._address)
        _stop_listening()

    def _close(self) -> None:
        ray.shutdown()
        if self.is_local:
            _end_children()


def _end_children() -> None:
    """Wait for all descendants, also those that an ending process had just started; kill what does not
    end."""
    while children := psutil.Process().children(recursive=True):
        _, alive = psutil.wait_procs(children, EXIT_TIMEOUT_S)
        for process in alive:
            process.kill()


def _quiet() -> None:
    """Ray's own news are for its log files."""
    logging.getLogger("ray").setLevel(logging.CRITICAL)


def _stop_listening() -> None:
    """End Ray's thread for messages to drivers as soon as it is told anything; nobody is shown them, and when
    the head is gone it would take a whole core."""
    from ray._private.worker import global_worker  # not public, and nothing public does it

    global_worker.threads_stopped.set()


def _adopt_orphans() -> None:
    """Make what Ray's processes leave behind when they end children of this process, which then finds and
    ends them: actors, and agents that a node had just started when it was told to end."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _start_local(num_processes: int) -> None:
    try:
        ray.init(
            address="local",
            namespace=NAMESPACE,
            # Actors ask for no CPU, since threads are set per worker. But Ray starts so many processes ahead
            # of time, and the first actors find theirs waiting.
            num_cpus=num_processes,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    except (OSError, RuntimeError, ValueError) as error:  # also TimeoutError and ConnectionError
        raise Unavailable(f"Ray does not start on this machine ({_reason(error)}); {LOGS}") from error


def _join(address: str) -> str:
    """The address where it was found."""
    if address == "auto":
        address = _running_here()
    _require_reachable(address)
    try:
        # What Ray warns of on the way is in the error, or does not matter.
        with warnings.catch_warnings(action="ignore"):
            ray.init(address=address, namespace=NAMESPACE, configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"cannot join the Ray cluster at {address!r} ({_reason(error)}): check --address, `ray status` "
            "there, and RAY_AUTH_MODE=token where the cluster asks for a token",
            param="ray.address",
        ) from error
    return address


def _running_here() -> str:
    """The cluster of RAY_ADDRESS, else the one that this machine has joined with `ray start`. Ray's own
    ``auto`` would also take the private Ray of another pdserve, and end with it."""
    from ray._private.utils import read_ray_address  # not public, and nothing public says it

    address = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if not address or address == "auto":
        raise ConfigError(
            "no Ray cluster runs on this machine: start one with `ray start --head`, give host:port after "
            "--address, or leave --address out and get a local Ray",
            param="ray.address",
        )
    return str(address)


def _require_reachable(address: str) -> None:
    """Ray itself tries for minutes."""
    scheme = "ray://" if address.startswith("ray://") else ""
    host, _, port = address.removeprefix(scheme).rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"{address!r} is not the address of a Ray cluster: give auto, host:{_DEFAULT_PORTS['']} or "
            f"ray://host:{_DEFAULT_PORTS['ray://']} after --address",
            param="ray.address",
        )
    try:
        head.reach(host, int(port))
    except OSError as error:
        raise ConfigError(
            f"nothing answers at {address} ({error.strerror or error}): start Ray there with `ray start "
            "--head`, or give another --address",
            param="ray.address",
        ) from error


def _reason(error: Exception) -> str:
    """The first line of what it says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
