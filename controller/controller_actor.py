"""The controller's process: `Controller` as a named, detached Ray actor.

When it dies Ray starts it again with the same arguments, and it finds its routers and workers by their names;
requests are served all the while. While Ray's head is away it starts nobody.
"""

import asyncio
from dataclasses import replace

import ray

from controller.actors import RayProcesses
from controller.admin import AdminAccess
from controller.controller import Controller
from controller.discovery import DiscoveryPage
from controller.head import HeadWatch
from controller.integrity import ProcessIntegrity
from controller.kept_deployment import KeptDeployment
from controller.plan import Deployment, ModelSource
from controller.rollout import require_same_text
from controller.status import SystemStatus
from pdserve.clock import LoopClock
from pdserve.config import DeployConfig, FaultConfig
from pdserve.contract.errors import ErrorInfo, PdserveError
from pdserve.logs import set_up_logging


class ControllerActor:
    """`Controller` as a Ray actor."""

    def __init__(self, deployment: Deployment) -> None:
        logs = deployment.config.logs
        set_up_logging("controller", logs.level, logs.format)
        self._deployment = deployment
        context = ray.get_runtime_context()
        self._page = DiscoveryPage(deployment)
        self._page.serve()
        head = HeadWatch(context.gcs_address, self._note_head)
        processes = RayProcesses(context.current_actor, head)
        kept = KeptDeployment(deployment)
        self._controller = Controller(kept.recall(), processes, LoopClock(), kept, self._page.update)
        self._watching = asyncio.create_task(head.run())

    async def tell(self, process_id: str, message: str) -> None:
        self._controller.tell(process_id, message)

    async def follow(self, seen: int) -> SystemStatus:
        return await self._controller.follow(seen)

    async def status(self) -> SystemStatus:
        return replace(await self._controller.status(), targets_url=self._page.url)

    async def admin_access(self) -> AdminAccess:
        """How to reach the routers' admin servers, with the secret that they ask for."""
        return AdminAccess.of(await self._controller.status(), self._deployment.admin_token)

    async def check_integrity(self) -> tuple[ProcessIntegrity, ...]:
        return await self._controller.check_integrity()

    async def scale(self, sizes: dict[str, int], deadline_s: float | None) -> SystemStatus | ErrorInfo:
        """The status from which on to follow it, or why it cannot be."""
        try:
            return await self._controller.scale(sizes, deadline_s)
        except PdserveError as error:
            return error.info

    async def drain(self, worker_id: str, deadline_s: float | None) -> int | ErrorInfo:
        """The id of the process that leaves, or why none does."""
        try:
            return await self._controller.drain(worker_id, deadline_s)
        except PdserveError as error:
            return error.info

    async def roll_out(
        self, config: DeployConfig, model: ModelSource, deadline_s: float | None
    ) -> SystemStatus | ErrorInfo:
        """The status from which on to follow it, or why it cannot be."""
        try:
            await asyncio.to_thread(require_same_text, self._controller.model, model)
            return await self._controller.roll_out(config, model, deadline_s)
        except PdserveError as error:
            return error.info

    async def arm(self, fault: FaultConfig) -> tuple[str, ...] | ErrorInfo:
        """The processes that will suffer it, or why none can."""
        try:
            return await self._controller.arm(fault)
        except PdserveError as error:
            return error.info

    async def shut_down(self) -> None:
        await self._controller.shut_down()

    def _note_head(self, is_there: bool) -> None:
        self._controller.note_head(is_there)
