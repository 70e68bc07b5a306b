"""`pdserve down`, `status`, `check`, and finding the system that a command means."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import psutil

from controller import head, running
from controller.admin import AdminAccess
from controller.ray_environment import prepare_ray
from controller.status import SystemState
from controller.terminal import integrity_table, say, table
from pdserve.config import FaultConfig
from pdserve.contract.errors import NotFound, Unavailable

if TYPE_CHECKING:
    from controller.remote import RemoteController

DOWN_TIMEOUT_S = 60.0
"""How long a launcher may take to end its system before its processes are killed."""


async def end_system(name: str, address: str | None) -> None:
    """Returns when nothing of the system runs any more. Raises NotFound."""
    system = None if address else running.require(name)
    if system is not None and system.is_local:
        await asyncio.to_thread(_end_launcher, system)
    else:
        if system is not None:
            await _require_head(system)
        async with _controller(name, address or (system.ray_address if system else ""), "") as controller:
            await controller.shut_down()
    running.withdraw(name)
    say(f"{name} is down")


async def show_status(name: str, address: str | None, as_json: bool) -> int:
    """Print the status; the exit code is 0 when the system is ready. Raises NotFound."""
    async with running_controller(name, address) as controller:
        status = await controller.status()
    say(json.dumps(status.as_json(), indent=2) if as_json else table(status))
    return 0 if status.state is SystemState.READY else 1


async def find_admin(name: str, address: str | None) -> AdminAccess:
    """How to reach the routers' admin servers. Raises NotFound."""
    async with running_controller(name, address) as controller:
        return await controller.admin_access()


async def show_top(name: str, address: str | None, router_id: str | None, once: bool) -> None:
    """Show what a router sees, once or until Ctrl-C. Raises NotFound or Unavailable."""
    from controller.top import follow, show_once

    access = await find_admin(name, address)
    await (show_once if once else follow)(access, router_id)


async def show_admin(name: str, address: str | None) -> None:
    """Print the URL of each router's live page, which lets in whoever has it. Raises NotFound."""
    access = await find_admin(name, address)
    access.router(None)  # there is one
    say("\n".join(f"{router.id}  {access.page_url(router)}" for router in access.routers))


async def check_integrity(name: str, address: str | None, as_json: bool) -> int:
    """Print what every process finds when it checks its own books; the exit code is 0 when all answered and
    all is well. Raises NotFound."""
    async with running_controller(name, address) as controller:
        answers = await controller.check_integrity()
    if as_json:
        say(json.dumps({"name": name, "processes": [answer.as_json() for answer in answers]}, indent=2))
    else:
        say(integrity_table(name, answers))
    return 0 if all(answer.is_sound for answer in answers) else 1


async def arm_fault(name: str, address: str | None, fault: FaultConfig) -> None:
    """Let processes of a running system suffer `fault`. Raises ConfigError or NotFound."""
    async with running_controller(name, address) as controller:
        armed = await controller.arm(fault)
    say(f"{fault.do} at {fault.at}: {', '.join(armed)}")


@contextlib.asynccontextmanager
async def running_controller(name: str, address: str | None) -> AsyncIterator["RemoteController"]:
    """Of the system that runs here, or of the one on the cluster at `address`."""
    auth_mode = ""
    if address is None:
        system = running.require(name)
        address, auth_mode = system.ray_address, system.ray_auth_mode
        if not address:
            raise Unavailable(f"{name} is just starting: its Ray is not up yet, try again in a few seconds")
        await _require_head(system)
    async with _controller(name, address, auth_mode) as controller:
        yield controller


def url_of(name: str) -> str:
    """Where the system answers. Raises NotFound or Unavailable."""
    url = running.require(name).url
    if not url:
        raise Unavailable(f"{name} is still starting: try again when `pdserve up` has shown its URL")
    return url


def _end_launcher(system: running.RunningSystem) -> None:
    """Ask the launcher to end; kill it and all its processes when it does not."""
    launcher = system.launcher
    if launcher is None:
        raise NotFound(f"{system.name} is not running any more")
    family = [launcher, *launcher.children(recursive=True)]
    launcher.terminate()
    _, alive = psutil.wait_procs(family, DOWN_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive)


async def _require_head(system: running.RunningSystem) -> None:
    """Raises Unavailable: the controller is found through Ray's head, which would be tried for minutes."""
    if await head.answers(system.ray_address.removeprefix("ray://")):
        return
    here = f"end it with `pdserve down --name {system.name}` and start it again"
    there = "bring the head back, or end it with `ray stop` on its nodes"
    raise Unavailable(
        f"Ray's head at {system.ray_address} is gone, so nobody can ask or tell {system.name} anything. "
        f"{system.url or 'It'} still serves requests, but what dies is not replaced, and after a while Ray "
        f"ends everything: {here if system.is_local else there}"
    )


@contextlib.asynccontextmanager
async def _controller(name: str, address: str, auth_mode: str) -> AsyncIterator["RemoteController"]:
    prepare_ray(auth_mode)
    from controller.cluster import Cluster

    cluster = Cluster(address)
    try:
        await cluster.connect()
        from controller.remote import RemoteController

        yield RemoteController.find(name, cluster)
    finally:
        await cluster.close()
