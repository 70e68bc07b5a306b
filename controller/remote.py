"""The controller, as the launcher and the other commands see it through Ray."""

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from controller.actors import NAMESPACE, controller_name, stop_leftovers
from controller.admin import AdminAccess
from controller.controller_actor import ControllerActor
from controller.integrity import ProcessIntegrity
from controller.plan import Deployment, ModelSource
from controller.start_errors import LOGS
from controller.status import SystemStatus
from pdserve.config import DeployConfig, FaultConfig
from pdserve.contract.errors import ConfigError, ErrorInfo, NotFound, Unavailable, error_from_info

if TYPE_CHECKING:
    from controller.cluster import Cluster

SHUT_DOWN_TIMEOUT_S = 20.0
RETRY_S = 0.5
"""While Ray starts a controller again."""


class RemoteController:
    """Calls to one controller. Each raises Unavailable when it is gone for good."""

    def __init__(self, system: str, actor: Any, cluster: "Cluster") -> None:
        self._system = system
        self._actor = actor
        self._cluster = cluster

    @classmethod
    def create(cls, deployment: Deployment, cluster: "Cluster") -> "RemoteController":
        """Start it. Raises ConfigError when this cluster has one for a system of that name."""
        system = deployment.config.name
        options = {
            "name": controller_name(system),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "max_restarts": -1,
            "num_cpus": 0,
        }
        try:
            actor = ray.remote(ControllerActor).options(**options).remote(deployment)
        except ValueError as error:
            raise ConfigError(
                f"a system named {system!r} runs on this cluster already: end it with `pdserve down --name "
                f"{system}`, or choose another --name",
                param="name",
            ) from error
        return cls(system, actor, cluster)

    @classmethod
    def find(cls, system: str, cluster: "Cluster") -> "RemoteController":
        """Raises NotFound, or Unavailable when Ray's head does not answer."""
        try:
            return cls(system, ray.get_actor(controller_name(system), NAMESPACE), cluster)
        except ValueError as error:
            raise NotFound(
                f"no system named {system!r} runs on this cluster: start it with `pdserve up`"
            ) from error
        except RayError as error:
            raise Unavailable(f"Ray at {cluster.address} does not answer: {error}") from error

    async def follow(self, seen: int) -> SystemStatus:
        """The status as soon as its version is above `seen`: at once after the controller was restarted."""
        status = await self._ask("follow", seen)
        assert isinstance(status, SystemStatus)
        return status

    async def status(self) -> SystemStatus:
        status = await self._ask("status")
        assert isinstance(status, SystemStatus)
        return status

    async def admin_access(self) -> AdminAccess:
        access = await self._ask("admin_access")
        assert isinstance(access, AdminAccess)
        return access

    async def check_integrity(self) -> tuple[ProcessIntegrity, ...]:
        answers = await self._ask("check_integrity")
        assert isinstance(answers, tuple)
        return answers

    async def scale(self, sizes: dict[str, int], deadline_s: float | None) -> SystemStatus:
        """The status from which on to follow it. Raises the PdserveError that says why it cannot be."""
        answer = _or_raise(await self._ask("scale", sizes, deadline_s))
        assert isinstance(answer, SystemStatus)
        return answer

    async def drain(self, worker_id: str, deadline_s: float | None) -> int:
        """The id of the process that leaves. Raises the PdserveError that says why none does."""
        answer = _or_raise(await self._ask("drain", worker_id, deadline_s))
        assert isinstance(answer, int)
        return answer

    async def roll_out(
        self, config: DeployConfig, model: ModelSource, deadline_s: float | None
    ) -> SystemStatus:
        """The status from which on to follow it. Raises the PdserveError that says why it cannot be."""
        answer = _or_raise(await self._ask("roll_out", config, model, deadline_s))
        assert isinstance(answer, SystemStatus)
        return answer

    async def arm(self, fault: FaultConfig) -> tuple[str, ...]:
        """The processes that will suffer `fault`. Raises the PdserveError that says why none can."""
        answer = _or_raise(await self._ask("arm", fault))
        assert isinstance(answer, tuple)
        return answer

    async def shut_down(self) -> None:
        """End all processes of the system, whatever state it is in. Those on a local Ray without its head end
        with that Ray. On a cluster without its head they stop serving; raises Unavailable, because their
        processes stay."""
        with contextlib.suppress(Unavailable, TimeoutError):
            async with asyncio.timeout(SHUT_DOWN_TIMEOUT_S):
                await self._ask("shut_down")
        if await self._cluster.has_head():
            self._kill_all()
        elif not self._cluster.is_local:
            raise Unavailable(self._what_stays())

    def _kill_all(self) -> None:
        try:
            ray.kill(self._actor, no_restart=True)
            stop_leftovers(self._system)
        except RayError as error:
            if not self._cluster.is_local:
                raise Unavailable(self._what_stays()) from error

    def _what_stays(self) -> str:
        return (
            f"Ray's head at {self._cluster.address} does not answer, so routers and workers of "
            f"{self._system!r} were told to stop, but their processes stay: run `pdserve down --name "
            f"{self._system} --address {self._cluster.address}` when the head is back, or `ray stop` on the "
            "nodes"
        )

    async def _ask(self, method: str, *arguments: object) -> object:
        while True:
            try:
                answer: object = await getattr(self._actor, method).remote(*arguments)
            except ActorUnavailableError:
                await asyncio.sleep(RETRY_S)
                arguments = (0,) if method == "follow" else arguments
            except RayActorError as error:
                raise Unavailable(f"the controller of {self._system!r} is gone: {_why(error)}") from error
            except RayError as error:
                raise Unavailable(f"the controller of {self._system!r} failed: {error}") from error
            else:
                return answer


def _or_raise(answer: object) -> object:
    if isinstance(answer, ErrorInfo):
        raise error_from_info(answer)
    return answer


def _why(error: RayActorError) -> str:
    """The cause and what to do about it."""
    if "ModuleNotFoundError" in str(error):
        return "the cluster's nodes lack pdserve or a part of it: install the same version on all of them"
    return f"{LOGS} on the head node"
