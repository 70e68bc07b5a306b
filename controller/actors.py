"""Routers and workers as Ray actors: `pools.Processes` on a cluster."""

import asyncio
import contextlib
import math
import re
import secrets
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from controller.head import HeadWatch
from controller.integrity import IntegrityReport
from controller.plan import Deployment, ProcessPlan
from controller.pools import ProcessEnded, StartRefused
from controller.router_actor import RouterActor
from controller.status import ROUTER_POOL, ProcessReport, ProcessSpec
from controller.worker_actor import WorkerActor
from pdserve.config import FaultConfig, ResourcesConfig
from pdserve.contract.errors import ErrorCode, ErrorInfo
from pdserve.contract.messages import Members

NAMESPACE = "pdserve"
STOP_TIMEOUT_S = 5.0
"""How long a process may take to stop before it is killed."""
_SILENT_END = "connection error code"
"""In Ray's words for a process that went away and said nothing."""
_EXIT_DETAIL = re.compile(r"(?:Worker exit detail|The actor is dead because): (.*?)(?:\. |\n|$)")


def controller_name(system: str) -> str:
    return f"pdserve-controller/{system}"


def stop_leftovers(system: str) -> None:
    """Kill all routers and workers of a system that its controller has left behind."""
    for name in _actor_names(_system_prefix(system)):
        with contextlib.suppress(ValueError):  # it has ended since
            ray.kill(ray.get_actor(name, NAMESPACE), no_restart=True)


class RayProcesses:
    """Creates actors of one deployment, and finds those of an earlier controller by their names."""

    def __init__(self, controller: Any, head: HeadWatch) -> None:
        """`controller` is the handle that the actors report to."""
        self._controller = controller
        self._head = head

    def find(self, spec: ProcessSpec, deployment: Deployment) -> "RayProcess | None":
        for name in _actor_names(_prefix(spec, deployment)):
            with contextlib.suppress(ValueError):  # it has ended since
                return RayProcess(spec, ray.get_actor(name, NAMESPACE), _resources(spec, deployment))
        return None

    def left_behind(self, deployment: Deployment) -> list[ProcessSpec]:
        prefix = _system_prefix(deployment.config.name)
        ids = {name.removeprefix(prefix).partition("/")[0] for name in _actor_names(prefix)}
        return [ProcessSpec.of(process_id) for process_id in sorted(ids)]

    async def until_able(self) -> None:
        await self._head.until_there()

    def create(
        self, spec: ProcessSpec, deployment: Deployment, previous: ProcessReport | None
    ) -> "RayProcess":
        resources = _resources(spec, deployment)
        kind = RouterActor if spec.pool == ROUTER_POOL else WorkerActor
        plan = ProcessPlan(spec, deployment, _num_neighbours(deployment), resources.num_gpus, previous)
        options = _options(spec, deployment, resources)
        actor = ray.remote(kind).options(**options).remote(plan, self._controller)
        return RayProcess(spec, actor, resources)


class RayProcess:
    """One actor. Implements `pools.Process`."""

    def __init__(self, spec: ProcessSpec, actor: Any, resources: ResourcesConfig) -> None:
        self._spec = spec
        self._actor = actor
        self._resources = resources

    async def placed(self) -> None:
        await self._ask(self._actor.ping)

    def shortage(self) -> str:
        return describe_shortage(self._spec, self._resources, ray.nodes(), _free_by_node())

    async def start(self) -> ProcessReport:
        answer = await self._ask(self._actor.start)
        if isinstance(answer, ErrorInfo):
            raise (ProcessEnded if answer.code is ErrorCode.INTERNAL else StartRefused)(answer.message)
        assert isinstance(answer, ProcessReport)
        return answer

    async def ended(self) -> str:
        try:
            return str(await self._ask(self._actor.ended))
        except ProcessEnded as error:
            return str(error)

    async def report(self) -> ProcessReport:
        report = await self._ask(self._actor.report)
        assert isinstance(report, ProcessReport)
        return report

    async def inspect(self) -> IntegrityReport:
        report = await self._ask(self._actor.inspect)
        assert isinstance(report, IntegrityReport)
        return report

    async def arm(self, fault: FaultConfig) -> None:
        await self._ask(self._actor.arm, fault)

    async def drain(self, deadline_s: float) -> None:
        await self._ask(self._actor.drain, deadline_s)

    async def set_members(self, members: Members) -> None:
        await self._ask(self._actor.set_members, members)

    async def stop(self) -> None:
        with contextlib.suppress(ProcessEnded, TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._ask(self._actor.stop)

    def kill(self) -> None:
        ray.kill(self._actor, no_restart=True)

    async def _ask(self, method: Any, *arguments: object) -> object:
        try:
            answer: object = await method.remote(*arguments)
        except RayActorError as error:
            raise ProcessEnded(_how_it_ended(error)) from error
        except RayError as error:
            raise ProcessEnded(_last_line(error)) from error
        return answer


def describe_shortage(
    spec: ProcessSpec,
    wanted: ResourcesConfig,
    nodes: list[dict[str, Any]],
    free_by_node: dict[str, dict[str, float]],
) -> str:
    """Why none of `nodes` takes `spec` now; empty when one could (its process is only slow to start)."""
    needs = ray_resources(wanted)
    alive = [node for node in nodes if node["Alive"]]
    if any(_fits(needs, free_by_node.get(node["NodeID"], {})) for node in alive):
        return ""
    ever = any(_fits(needs, node["Resources"]) for node in alive)
    asks = ", ".join(f"{name} {amount:g}" for name, amount in needs.items()) or "a node"
    key = (
        "router" if spec.pool == ROUTER_POOL else f"pools.{'prefill' if spec.pool == 'prefill' else 'decode'}"
    )
    why = "all nodes that have it are full" if ever else "no node has that"
    return (
        f"{spec.id} cannot be placed: it asks for {asks}, and {why} ({len(alive)} nodes): lower "
        f"{key}.resources, start fewer processes, or add a node"
    )


def ray_resources(wanted: ResourcesConfig) -> dict[str, float]:
    """By Ray's own names; what is zero left out."""
    named = {"CPU": wanted.num_cpus, "GPU": wanted.num_gpus, "memory": float(wanted.memory), **wanted.custom}
    return {name: amount for name, amount in named.items() if amount}


def _system_prefix(system: str) -> str:
    return f"pdserve/{system}/"


def _prefix(spec: ProcessSpec, deployment: Deployment) -> str:
    return f"{_system_prefix(deployment.config.name)}{spec.id}/"


def _options(spec: ProcessSpec, deployment: Deployment, resources: ResourcesConfig) -> dict[str, Any]:
    env = deployment.env(spec)
    return {
        # A dead actor's name is not free at once, so no two have the same.
        "name": _prefix(spec, deployment) + secrets.token_hex(4),
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "max_restarts": 0,
        "num_cpus": resources.num_cpus,
        "num_gpus": resources.num_gpus,
        "memory": resources.memory or None,
        "resources": dict(resources.custom) or None,
        "runtime_env": {"env_vars": env} if env else None,
    }


def _resources(spec: ProcessSpec, deployment: Deployment) -> ResourcesConfig:
    """As configured. On a local Ray the workers share the GPUs that are there, because Ray hides GPUs from
    whoever asks for none."""
    resources = deployment.resources(spec)
    device = deployment.config.model.device
    if not deployment.is_local or spec.pool == ROUTER_POOL or resources.num_gpus or device == "cpu":
        return resources
    num_gpus = ray.cluster_resources().get("GPU", 0.0)
    share = min(1.0, math.floor(100 * num_gpus / deployment.num_workers) / 100)
    return resources.model_copy(update={"num_gpus": share})


def _num_neighbours(deployment: Deployment) -> int:
    num_nodes = 1 if deployment.is_local else len([n for n in ray.nodes() if n["Alive"]])
    return max(1, math.ceil(deployment.num_workers / num_nodes))


def _actor_names(prefix: str) -> list[str]:
    found = ray.util.list_named_actors(all_namespaces=True)
    ours = [actor["name"] for actor in found if actor["namespace"] == NAMESPACE]
    return [name for name in ours if name.startswith(prefix)]


def _fits(needs: dict[str, float], has: dict[str, float]) -> bool:
    return all(has.get(name, 0.0) >= amount for name, amount in needs.items())


def _free_by_node() -> dict[str, dict[str, float]]:
    from ray._private.state import available_resources_per_node  # not public, and nothing public says it

    free: dict[str, dict[str, float]] = available_resources_per_node()
    return free


def _how_it_ended(error: RayActorError) -> str:
    if _SILENT_END in str(error):
        return "its process was killed (as the kernel does when memory runs out) or crashed"
    if isinstance(error, ActorUnavailableError):
        return "its process went away, and Ray has not heard how"
    found = _EXIT_DETAIL.search(str(error))
    return f"its process died: {found[1].strip()}" if found else _last_line(error)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
