"""What each process is told when it is created. Travels from the controller to its actor."""

from dataclasses import dataclass, field

from controller.status import ROUTER_POOL, ProcessReport, ProcessSpec
from pdserve.config import DeployConfig, PoolConfig, ResourcesConfig
from pdserve.contract.messages import Role
from pdserve.rpc.credentials import AdminToken, Credentials, DeploymentToken, TlsIdentity


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where every process finds the model."""

    path: str
    """A folder, or a hub id."""
    revision: str | None
    served_name: str


@dataclass(frozen=True, slots=True)
class Deployment:
    """A configuration and what the launcher has found out about it."""

    config: DeployConfig
    model: ModelSource
    allow_faults: bool = False
    """`pdserve up --allow-faults`."""
    token: DeploymentToken = field(default_factory=DeploymentToken.draw)
    """Drawn once: a restarted controller is created with the same deployment, and hands it to every router
    and worker that it creates."""
    admin_token: AdminToken = field(default_factory=AdminToken.draw)
    """As above, for the routers' admin servers."""

    @property
    def is_local(self) -> bool:
        """Everything runs on this machine, on a Ray of its own."""
        return self.config.ray.address is None

    @property
    def num_workers(self) -> int:
        return self.config.pools.prefill.replicas + self.config.pools.decode.replicas

    def specs(self) -> list[ProcessSpec]:
        """All processes that are wanted, routers first: they start fastest."""
        pools = [(ROUTER_POOL, self.config.router.replicas)]
        pools += [(role.value, self.pool(role.value).replicas) for role in self._roles()]
        return [ProcessSpec(f"{pool}-{i}", pool, i) for pool, count in pools for i in range(count)]

    def pool(self, name: str) -> PoolConfig:
        """Of a worker's role."""
        return self.config.pools.prefill if name == Role.PREFILL else self.config.pools.decode

    def resources(self, spec: ProcessSpec) -> ResourcesConfig:
        is_router = spec.pool == ROUTER_POOL
        return self.config.router.resources if is_router else self.pool(spec.pool).resources

    def credentials(self) -> Credentials:
        """Those of a process on this node. Raises ConfigError that names the file of network.tls."""
        return Credentials(self.token, TlsIdentity.read(self.config.network.tls))

    def env(self, spec: ProcessSpec) -> dict[str, str]:
        return {} if spec.pool == ROUTER_POOL else self.pool(spec.pool).env

    def _roles(self) -> tuple[Role, ...]:
        return (Role.PREFILL, Role.DECODE) if self.config.is_split else (Role.UNSPLIT,)


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process of a deployment."""

    spec: ProcessSpec
    deployment: Deployment
    num_neighbours: int
    """How many workers share the machine, this one included; at least 1."""
    num_gpus: float = 0.0
    """What Ray has given it; a fraction where workers share a GPU."""
    previous: ProcessReport | None = None
    """Of the process that it replaces: a router comes back at the same ports."""
