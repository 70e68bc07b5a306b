"""A router's process: a `RouterFront` as one Ray actor.

The front is imported by the router's own process only, so that the controller starts quickly.
"""

import asyncio
import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from controller.addresses import node_name
from controller.faults import allowed_faults, arm_configured
from controller.integrity import IntegrityReport
from controller.plan import ProcessPlan
from controller.start_errors import start_error
from controller.status import ProcessReport
from pdserve.config import FaultConfig
from pdserve.contract.errors import ErrorInfo
from pdserve.contract.messages import Members
from pdserve.logs import set_up_logging

if TYPE_CHECKING:
    from controller.router_front import RouterFront

log = logging.getLogger(__name__)


class RouterActor:
    """Created by the controller; `start`, then `ended` until `stop`."""

    def __init__(self, plan: ProcessPlan, controller: Any) -> None:
        """`controller` is the handle of the controller's actor; a router tells it nothing on its own."""
        logs = plan.deployment.config.logs
        set_up_logging(plan.spec.id, logs.level, logs.format)
        self._plan = plan
        self._faults = allowed_faults(plan)
        self._front: RouterFront | None = None
        self._starting: asyncio.Task[ErrorInfo | None] | None = None
        self._stopped = asyncio.Event()

    async def ping(self) -> int:
        """Shows that the process lives; its id."""
        return os.getpid()

    async def start(self) -> ProcessReport | ErrorInfo:
        """Listen and report; what is wrong if that cannot be. Asked again, by a restarted controller, it
        reports how it is now."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return await self._starting or await self.report()

    async def report(self) -> ProcessReport:
        return self._front.report() if self._front else ProcessReport(os.getpid(), node_name())

    async def inspect(self) -> IntegrityReport:
        """Whether the router's books balance."""
        return self._front.inspect() if self._front else IntegrityReport((), ())

    async def arm(self, fault: FaultConfig) -> None:
        """Only where faults are allowed."""
        assert self._faults is not None, "faults are not allowed here"
        self._faults.arm(fault)

    async def set_members(self, members: Members) -> None:
        """Take over a membership; returns once every member can be used, or a newer membership has come."""
        assert self._front is not None, "the router has not been started"
        await self._front.set_members(members)

    async def ended(self) -> str:
        """Returns when the router has been stopped."""
        await self._stopped.wait()
        return "stopped"

    async def stop(self) -> None:
        if self._front is not None:
            await self._front.stop()
        self._stopped.set()

    async def _start(self) -> ErrorInfo | None:
        try:
            module = await asyncio.to_thread(importlib.import_module, "controller.router_front")
            front: RouterFront = module.RouterFront(self._plan, self._faults)
            await front.start()
            arm_configured(self._faults, self._plan)
        except Exception as error:  # whatever it is, the controller has to hear of it
            log.exception("cannot start")
            return start_error(error)
        self._front = front
        return None
