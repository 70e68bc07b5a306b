"""What each process is told when it is created. Travels from the controller to its actor."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from controller.status import ROUTER_POOL, ProcessReport, ProcessSpec
from pdserve.config import DeployConfig, PoolConfig, ResourcesConfig
from pdserve.contract.errors import ConfigError
from pdserve.contract.messages import Role
from pdserve.rpc.credentials import AdminToken, Credentials, DeploymentToken, TlsIdentity

_STAYS_SPLIT = (
    "prefill=0 would let decode workers compute all prompts: keep one, or start with --prefill 0 for unsplit "
    "workers"
)
_STAYS_UNSPLIT = "the workers of this system are unsplit: scale decode, or start anew with --prefill to split"


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
    start_id: str = field(default_factory=lambda: secrets.token_hex(8))
    """As above; tells this start of a system from another one of the same name."""
    generation: int = 0
    """Counts rollouts. A worker of an earlier generation is to be replaced."""
    rollout_deadline_s: float | None = None
    """Within which such a worker is to leave; None: as configured."""

    @property
    def is_local(self) -> bool:
        """Everything runs on this machine, on a Ray of its own."""
        return self.config.ray.address is None

    @property
    def num_workers(self) -> int:
        return self.config.pools.prefill.replicas + self.config.pools.decode.replicas

    @property
    def pool_names(self) -> list[str]:
        """Routers first: they start fastest."""
        return [ROUTER_POOL, *(role.value for role in self._roles())]

    def num_wanted(self, pool: str) -> int:
        """Processes that the pool is to have."""
        return self.config.router.replicas if pool == ROUTER_POOL else self.pool(pool).replicas

    def specs(self) -> list[ProcessSpec]:
        """All processes that are wanted, in the order of the pools."""
        return [
            ProcessSpec(f"{pool}-{i}", pool, i)
            for pool in self.pool_names
            for i in range(self.num_wanted(pool))
        ]

    def resized(self, sizes: Mapping[str, int]) -> "Deployment":
        """With other numbers of workers; `sizes` has them by pool, ``prefill`` and ``decode`` as in the
        configuration. Raises ConfigError where there can be no such system."""
        pools = self.config.pools
        for name, size in sizes.items():
            if name not in ("prefill", "decode"):
                raise ConfigError(f"there is no pool {name!r} of workers: scale prefill or decode")
            if name == "prefill" and (size > 0) is not self.config.is_split:
                raise ConfigError(_STAYS_UNSPLIT if size else _STAYS_SPLIT, param="pools.prefill.replicas")
            if size < 0 or (name == "decode" and size == 0):
                raise ConfigError(
                    f"{name}={size}: somebody has to generate tokens",
                    param=f"pools.{name}.replicas",
                )
            pool = getattr(pools, name).model_copy(update={"replicas": size})
            pools = pools.model_copy(update={name: pool})
        return replace(self, config=self.config.model_copy(update={"pools": pools}))

    def pools_of(self, sizes: Mapping[str, int]) -> list[str]:
        """The pools of workers that `sizes` has by the configuration's names."""
        names = {Role.PREFILL: "prefill", Role.DECODE: "decode", Role.UNSPLIT: "decode"}
        return [role.value for role in self._roles() if names[role] in sizes]

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
