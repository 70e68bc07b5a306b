"""From a configuration to a running system on Ray, and back to nothing.

Whatever happens on the way up (a bad model, a full port, Ctrl-C), everything that was started is ended again.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from controller import running
from controller.model_files import resolve_model
from controller.packages import require_packages
from controller.plan import Deployment
from controller.ports import hold_api_ports
from controller.ray_environment import auth_mode, prepare_ray
from controller.status import SystemState, SystemStatus
from controller.terminal import Progress, ready_text, say
from pdserve.config import DeployConfig
from pdserve.contract.errors import ConfigError, PdserveError, Unavailable

if TYPE_CHECKING:
    from controller.cluster import Cluster

STAYING = "Press Ctrl-C to end it."
"""The last line before the launcher only waits."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM."""


class SystemFailed(PdserveError):
    """The system cannot become ready; the message names the process, the cause and the fix."""


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What the command line asks of `run_system` beyond the configuration."""

    leave_running: bool = False
    """On a cluster: return when the system is ready, and leave it there."""
    allow_faults: bool = False
    """Let processes suffer the `faults` of the configuration, and those of `pdserve fault`."""


async def run_system(config: DeployConfig, options: LaunchOptions) -> None:
    """Start a system, stay with it until Ctrl-C, SIGTERM or `pdserve down`, and end it.

    Raises PdserveError when it cannot start and Interrupted when it was not ready yet, with nothing left
    running.
    """
    progress = Progress()
    running.require_free(config.name)
    with contextlib.ExitStack() as held:
        deployment = _check(config, options, held, progress)
        async with _announced(config.name, deployment.is_local) as announcement:
            try:
                async with _interruptible(progress):
                    await _start_and_stay(deployment, announcement, options, progress)
            except Interrupted:
                if not announcement.system.url:
                    raise


def _check(
    config: DeployConfig, options: LaunchOptions, held: contextlib.ExitStack, progress: Progress
) -> Deployment:
    """All that can be found wrong before anything is started; `held` keeps the ports that were free. Raises
    PdserveError."""
    if config.faults and not options.allow_faults:
        raise ConfigError(
            f"faults is set ({len(config.faults)} of them would happen): start with --allow-faults to "
            "rehearse, or remove faults",
            param="faults",
        )
    is_local = config.ray.address is None
    if is_local:
        require_packages(config)
        config = hold_api_ports(config, held)
        progress.note(f"looking for {config.model.path or 'the built-in model'}")
    return Deployment(config, resolve_model(config, fetch=is_local), options.allow_faults)


async def _start_and_stay(
    deployment: Deployment, announcement: "_Announcement", options: LaunchOptions, progress: Progress
) -> None:
    progress.note(
        "starting a local Ray" if deployment.is_local else f"joining Ray at {deployment.config.ray.address}"
    )
    prepare_ray()
    from controller.cluster import (
        Cluster,
    )  # Ray takes a second to import, and what is wrong has been said by now

    cluster = Cluster(deployment.config.ray.address, num_processes=1 + len(deployment.specs()))
    try:
        await cluster.connect()
        announcement.update(ray_address=cluster.address, ray_auth_mode=auth_mode())
        await _run_on_cluster(cluster, deployment, announcement, options, progress)
    finally:
        await cluster.close()


async def _run_on_cluster(
    cluster: "Cluster",
    deployment: Deployment,
    announcement: "_Announcement",
    options: LaunchOptions,
    progress: Progress,
) -> None:
    from controller.remote import RemoteController

    progress.note("starting the controller")
    controller = RemoteController.create(deployment, cluster)
    keep = False
    try:
        status = await _until_ready(controller, progress)
        url = _url(status)
        announcement.update(url=url)
        say(ready_text(status, url, _takes(status), deployment.config.model.path is None))
        keep = options.leave_running
        if not keep:
            say(STAYING)
            await _until_stopped(controller, status, progress)
    finally:
        if keep:
            announcement.keep()
        else:
            await controller.shut_down()


async def _until_ready(controller: Any, progress: Progress) -> SystemStatus:
    seen = 0
    while True:
        status: SystemStatus = await controller.follow(seen)
        seen = status.version
        progress.show(status)
        if status.state is SystemState.READY:
            return status
        if status.failed is not None:
            raise SystemFailed(f"{status.failed.id} cannot start: {status.failed.message}")


async def _until_stopped(controller: Any, status: SystemStatus, progress: Progress) -> None:
    """Show what happens until somebody ends the system."""
    while status.state is not SystemState.STOPPED:
        try:
            status = await controller.follow(status.version)
        except Unavailable:
            return  # `pdserve down` has ended the controller
        progress.show(status)


def _url(status: SystemStatus) -> str:
    report = status.routers[0].report
    assert report is not None, "a ready router has reported"
    return f"http://{report.address}"


def _takes(status: SystemStatus) -> str:
    report = status.routers[0].report
    return report.takes if report else ""


class _Announcement:
    """This system's file, kept up to date."""

    def __init__(self, system: running.RunningSystem) -> None:
        self.system = system
        self.is_kept = False
        running.announce(system)

    def update(self, **fields: str) -> None:
        self.system = replace(self.system, **fields)  # type: ignore[arg-type]
        running.announce(self.system)

    def keep(self) -> None:
        """The system outlives its launcher."""
        self.is_kept = True


@contextlib.asynccontextmanager
async def _announced(name: str, is_local: bool) -> AsyncIterator[_Announcement]:
    announcement = _Announcement(running.this_launcher(name, is_local))
    try:
        yield announcement
    finally:
        if not announcement.is_kept:
            running.withdraw(name)


@contextlib.asynccontextmanager
async def _interruptible(progress: Progress) -> AsyncIterator[None]:
    """Cancels the block at the first SIGINT or SIGTERM and raises Interrupted after it; more signals change
    nothing, because the end is on its way."""
    task = asyncio.current_task()
    assert task is not None
    loop = asyncio.get_running_loop()
    num_signals = 0

    def interrupt() -> None:
        nonlocal num_signals
        num_signals += 1
        if num_signals == 1:
            task.cancel()  # first, because nobody may be there any more to be told
            progress.note("stopping")

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        yield
    except asyncio.CancelledError:
        if not num_signals:
            raise
        task.uncancel()
        raise Interrupted from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
