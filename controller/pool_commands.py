"""`pdserve scale`, `drain` and `rollout`: what an operator asks of the pools, and the way there."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from controller import running
from controller.commands import running_controller
from controller.model_files import resolve_model
from controller.plan import ModelSource
from controller.status import ProcessState, ProcessStatus, SystemStatus
from controller.terminal import Progress, say
from pdserve.config import DeployConfig
from pdserve.contract.errors import Unavailable

if TYPE_CHECKING:
    from controller.remote import RemoteController


async def scale(name: str, address: str | None, sizes: Mapping[str, int], deadline_s: float | None) -> None:
    """Returns when the pools have those sizes. Raises ConfigError, NotFound, or Unavailable when a worker
    cannot be started."""
    async with running_controller(name, address) as controller:
        status = await controller.scale(dict(sizes), deadline_s)
        status = await _follow(controller, status, have_their_size)
    have = " and ".join(f"{pool.ready} {pool.name}" for pool in status.pools[1:])
    say(f"{name} has {have} workers")


async def drain(name: str, address: str | None, worker_id: str, deadline_s: float | None) -> None:
    """Returns when the worker has left and, where one is wanted, another serves in its place. Raises
    NotFound, or Unavailable when that cannot be started."""
    async with running_controller(name, address) as controller:
        pid = await controller.drain(worker_id, deadline_s)
        status = await _follow(controller, await controller.status(), lambda s: has_left(s, worker_id, pid))
    is_replaced = any(process.id == worker_id for process in status.processes)
    say(f"{worker_id} was drained; " + ("another has taken its place" if is_replaced else "it is gone"))


async def roll_out(address: str | None, config: DeployConfig, deadline_s: float | None) -> None:
    """Returns when every worker of the system that `config` names is as it says. Raises ConfigError,
    NotFound, or Unavailable when one cannot be started so; then the rollout stops there."""
    model = model_of(config, address)
    async with running_controller(config.name, address) as controller:
        status = await controller.roll_out(config, model, deadline_s)
        status = await _follow(controller, status, is_rolled_out)
    say(f"all {len(status.workers)} workers of {config.name} have the new configuration")


def model_of(config: DeployConfig, address: str | None) -> ModelSource:
    """Which model `config` means for the system that it names. Where that is local its processes find it in a
    folder of this machine; whether it is, the system knows: the file need not tell where Ray is. Raises
    NotFound, ModelUnsupported or ConfigError."""
    is_local = address is None and running.require(config.name).is_local
    return resolve_model(config, fetch=is_local, takes_turns=True)


def is_rolled_out(status: SystemStatus) -> bool:
    """Whether every worker is made as it is to be. Raises Unavailable when one cannot be, or a router is
    missing for good, without which no worker is let go."""
    _require_hope(status.routers)
    return have_their_size(status) and all(
        process.report is not None and process.report.generation == status.generation
        for process in status.workers
    )


def have_their_size(status: SystemStatus) -> bool:
    """Whether every pool of workers has what it is to have. Raises Unavailable when that cannot be."""
    _require_hope(status.workers)
    return all(
        pool.ready == pool.desired == sum(process.pool == pool.name for process in status.workers)
        for pool in status.pools[1:]
    )


def has_left(status: SystemStatus, worker_id: str, pid: int) -> bool:
    """Whether process `pid` is gone and its place is filled, or gone too. Raises Unavailable when it cannot
    be filled."""
    there = [process for process in status.workers if process.id == worker_id]
    _require_hope(there)
    return all(
        process.state is ProcessState.READY and process.report is not None and process.report.pid != pid
        for process in there
    )


def _require_hope(processes: Sequence[ProcessStatus]) -> None:
    """Raises Unavailable when one of them has been given up."""
    for process in processes:
        if process.state is ProcessState.FAILED:
            raise Unavailable(f"{process.id} cannot be started: {process.message}")


async def _follow(
    controller: "RemoteController", status: SystemStatus, is_done: Callable[[SystemStatus], bool]
) -> SystemStatus:
    """Show what happens until it is done."""
    progress = Progress()
    while not is_done(status):
        status = await controller.follow(status.version)
        progress.show(status)
    return status
