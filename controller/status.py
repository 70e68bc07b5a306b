"""What routers, workers and the whole system say about themselves."""

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from pdserve.contract.messages import Member, PairTransport
from pdserve.contract.work import BlockCounts

ROUTER_POOL = "router"


class ProcessState(StrEnum):
    """Of one router or worker."""

    PENDING = "pending"
    """Ray has not found a node for it yet."""
    STARTING = "starting"
    """Its process lives and loads."""
    READY = "ready"
    DRAINING = "draining"
    """A worker that takes no new work and ends when what it has is finished or given back."""
    LOST = "lost"
    """It died and will be started again."""
    FAILED = "failed"
    """It cannot be started; the message says why."""
    STOPPED = "stopped"


class SystemState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    """Every router reaches every worker."""
    DEGRADED = "degraded"
    """It was ready; now a process is missing."""
    FAILED = "failed"
    """It never became ready, and cannot."""
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One router or worker that is wanted."""

    id: str
    pool: str
    """``router`` or a worker's role."""
    index: int
    """Of this process in its pool, from 0."""

    @classmethod
    def of(cls, process_id: str) -> "ProcessSpec":
        """The one with that id."""
        pool, _, index = process_id.rpartition("-")
        return cls(process_id, pool, int(index))


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """What a living router or worker says about itself."""

    pid: int
    node: str
    """The node's name."""
    address: str = ""
    """Workers: host:port of the streams. Routers: host:port of the HTTP API. Empty before it listens."""
    metrics_url: str = ""
    grpc_address: str = ""
    """Routers: host:port of the gRPC API, if there is one."""
    kv_blocks: BlockCounts | None = None
    """Workers, once the engine is loaded."""
    transports: tuple[PairTransport, ...] = ()
    """Decode workers: how KV came from each prefill worker the last time."""
    member: Member | None = None
    """Workers, once they listen."""
    admin_address: str = ""
    """Routers: host:port of the admin server, if there is one."""
    takes: str = ""
    """Routers: the most comfortable prompt that the model takes: ``chat``, ``text`` or ``tokens``."""
    model: str = ""
    """Routers: under which name the model is served."""
    epoch: int = -1
    """Routers: of the membership that it uses."""
    generation: int = 0
    """Workers: of the deployment by which they were made."""


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """One router or worker as the controller sees it."""

    id: str
    pool: str
    state: ProcessState
    message: str
    """What it is doing, or why it is not."""
    num_restarts: int
    report: ProcessReport | None

    def as_json(self) -> dict[str, Any]:
        report = self.report
        fields: dict[str, Any] = {
            "id": self.id,
            "pool": self.pool,
            "pid": report.pid if report else None,
            "node": report.node if report else None,
            "address": (report.address or None) if report else None,
            "metrics_url": (report.metrics_url or None) if report else None,
            "state": self.state.value,
            "message": self.message,
            "restarts": self.num_restarts,
        }
        if self.pool == ROUTER_POOL:
            has_url = report is not None and report.address
            fields["url"] = f"http://{report.address}" if report and has_url else None
            fields["grpc_address"] = (report.grpc_address or None) if report else None
            fields["admin_address"] = (report.admin_address or None) if report else None
        else:
            counts = report.kv_blocks if report else None
            fields["kv_blocks"] = asdict(counts) if counts else None
            fields["kv_transports"] = [asdict(pair) for pair in report.transports] if report else []
        return fields


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """How many processes a pool is to have, and has."""

    name: str
    desired: int
    ready: int
    draining: int


@dataclass(frozen=True, slots=True)
class SystemStatus:
    """The whole system. `version` grows with every change."""

    version: int
    name: str
    state: SystemState
    model: str
    processes: tuple[ProcessStatus, ...] = field(default=())
    pools: tuple[PoolStatus, ...] = field(default=())
    generation: int = 0
    """Of the deployment that is wanted; workers of an earlier one are about to be replaced."""
    targets_url: str = ""
    """Where Prometheus finds all processes (HTTP service discovery)."""
    has_head: bool = True
    """Ray's head answers, so processes can be started."""
    news: tuple[ProcessStatus, ...] = field(default=())
    """For a follower: every state and message that a process has had since the follower looked last, oldest
    first. Some last for no longer than a turn of the controller's loop."""

    @property
    def routers(self) -> list[ProcessStatus]:
        return [process for process in self.processes if process.pool == ROUTER_POOL]

    @property
    def workers(self) -> list[ProcessStatus]:
        return [process for process in self.processes if process.pool != ROUTER_POOL]

    @property
    def failed(self) -> ProcessStatus | None:
        """The first process that cannot be started."""
        return next((process for process in self.processes if process.state is ProcessState.FAILED), None)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "state": self.state.value,
            "model": self.model,
            "targets_url": self.targets_url or None,
            "pools": [asdict(pool) for pool in self.pools],
            "routers": [process.as_json() for process in self.routers],
            "workers": [process.as_json() for process in self.workers],
        }
