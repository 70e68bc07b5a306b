"""A worker's process: the engine, a `Worker` and its metrics page, as one Ray actor.

Nothing here imports torch before `start`: the number of threads has to be in the environment by then, and an
actor whose process waits for its turn stays small.
"""

import asyncio
import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from controller.addresses import advertised_host, bind_host, join, node_name
from controller.faults import allowed_faults, arm_configured
from controller.integrity import IntegrityReport
from controller.metrics_page import serve_metrics
from controller.plan import ProcessPlan
from controller.room import kv_memory
from controller.start_errors import start_error
from controller.status import ProcessReport
from controller.tracing import tracer_of
from pdserve.clock import LoopClock, SystemRng
from pdserve.config import FaultConfig
from pdserve.contract.errors import ConfigError, ErrorInfo
from pdserve.contract.ids import WorkerId
from pdserve.contract.messages import Member, Role
from pdserve.contract.ports import Engine, Rpc
from pdserve.contract.tracing import Tracer
from pdserve.engine_metrics import export_price
from pdserve.faults import FaultyEngine, FaultyRpc
from pdserve.logs import set_up_logging
from pdserve.rpc.addresses import require_private
from pdserve.rpc.credentials import Credentials
from router.listen import bind

if TYPE_CHECKING:
    from controller.worker import Worker, WorkerSettings
    from pdserve.engine.engine import ModelEngine
    from pdserve.engine.settings import EngineSettings

log = logging.getLogger(__name__)

LAST_WORDS_S = 1.0
"""How long a worker whose engine loop has failed or hangs lives on to say why."""


class WorkerActor:
    """Created by the controller; `start`, then `ended` until `stop`."""

    def __init__(self, plan: ProcessPlan, controller: Any) -> None:
        """`controller` is the handle of the controller's actor."""
        logs = plan.deployment.config.logs
        set_up_logging(plan.spec.id, logs.level, logs.format)
        self._plan = plan
        self._controller = controller
        self._faults = allowed_faults(plan)
        self._worker: Worker | None = None
        self._member: Member | None = None
        self._metrics_url = ""
        self._starting: asyncio.Task[ErrorInfo | None] | None = None

    async def ping(self) -> int:
        """Shows that the process lives; its id."""
        return os.getpid()

    async def start(self) -> ProcessReport | ErrorInfo:
        """Load, listen, and report; what is wrong if that cannot be. Asked again, by a restarted controller,
        it reports how it is now."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        return await self._starting or await self.report()

    async def report(self) -> ProcessReport:
        return ProcessReport(
            pid=os.getpid(),
            node=node_name(),
            address=self._member.address if self._member else "",
            metrics_url=self._metrics_url,
            kv_blocks=self._worker.block_counts() if self._worker else None,
            transports=tuple(self._worker.transports_in_use) if self._worker else (),
            member=replace(self._member, state=self._worker.state) if self._member and self._worker else None,
            generation=self._plan.deployment.generation,
        )

    async def inspect(self) -> IntegrityReport:
        """Whether the worker's books balance; nothing is checked before it has an engine."""
        return self._worker.inspect() if self._worker else IntegrityReport((), ())

    async def arm(self, fault: FaultConfig) -> None:
        """Only where faults are allowed."""
        assert self._faults is not None, "faults are not allowed here"
        self._faults.arm(fault)

    async def drain(self, deadline_s: float) -> None:
        """Take no new work, and end when what runs is finished or, at the deadline, given back."""
        assert self._worker is not None, "the worker has not been started"
        self._worker.drain(deadline_s)

    async def ended(self) -> str:
        """Returns when the worker is over, with the reason; only after `start`."""
        assert self._worker is not None, "the worker has not been started"
        try:
            await self._worker.ended()
        except Exception as error:  # whatever ended the loop, the process must not live on without it
            log.critical("the engine loop has failed or hangs", exc_info=error)
            asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)
            return f"its engine loop failed or hangs: {type(error).__name__}: {error}"
        return "stopped"

    async def stop(self) -> None:
        """Break all streams and end the loop."""
        if self._worker is not None:
            await self._worker.stop()

    async def _start(self) -> ErrorInfo | None:
        try:
            # What is wrong with the network or with packages is said before the model is loaded.
            credentials = self._plan.deployment.credentials()
            await self._require_protected(credentials)
            tracer = tracer_of(self._plan, LoopClock())
            engine = await asyncio.to_thread(self._load_engine)
            await self._serve(engine, credentials, tracer)
            arm_configured(self._faults, self._plan)
        except Exception as error:  # whatever it is, the controller has to hear of it
            log.exception("cannot start")
            return start_error(error)
        return None

    def _load_engine(self) -> "ModelEngine":
        set_thread_environment(*self._threads())
        self._tell("importing torch")
        from pdserve.engine.engine import ModelEngine

        return ModelEngine.load(self._engine_settings(), self._tell)

    async def _require_protected(self, credentials: Credentials) -> None:
        """Without TLS neither where this worker listens nor where it is found may be a public address. Raises
        UnprotectedAddress."""
        if credentials.tls is None:
            for host in (bind_host(self._plan.deployment), advertised_host(self._plan.deployment)):
                await require_private(host)

    async def _serve(self, engine: "ModelEngine", credentials: Credentials, tracer: Tracer) -> None:
        from controller.worker import Worker
        from pdserve.engine.executor import ThreadExecutor
        from pdserve.rpc.grpc_rpc import GrpcRpc

        self._tell("starting to listen")
        spec, clock = self._plan.spec, LoopClock()
        served: Engine = engine
        rpc: Rpc = GrpcRpc(credentials)
        if self._faults is not None:
            served, rpc = FaultyEngine(engine, self._faults), FaultyRpc(rpc, self._faults, clock)
        worker = Worker(
            WorkerId(spec.id),
            Role(spec.pool),
            served,
            ThreadExecutor(served),
            rpc,
            clock,
            SystemRng(),
            self._worker_settings(),
            tracer,
        )
        if self._faults is not None:
            self._faults.export(worker.registry)
        export_price(spec.pool, worker.registry, self._plan.deployment.pool(spec.pool).price_per_hour)
        self._member = await self._listen(worker)
        self._worker = worker
        self._metrics_url = serve_metrics(worker.registry, self._plan.deployment)

    async def _listen(self, worker: "Worker") -> Member:
        """Raises ConfigError naming the setting that has to change."""
        deployment = self._plan.deployment
        host = bind_host(deployment)
        first, last = deployment.config.network.worker_ports or (0, 0)
        for port in range(first, last + 1):
            with contextlib.suppress(ConfigError):  # it is taken, so the next
                member = await worker.start(join(host, port))
                real_port = int(member.address.rpartition(":")[2])
                return replace(member, address=join(advertised_host(deployment), real_port))
        bind(host, 0, "network.bind or network.address").close()  # raises where the host is what is wrong
        raise ConfigError(
            f"no port of network.worker_ports ({first}-{last}) is free on {host}: widen the range, or stop "
            "the processes that hold them",
            param="network.worker_ports",
        )

    def _threads(self) -> tuple[int, bool]:
        """How many threads, and whether the machine's workers together have more than it has cores."""
        cores = num_cores()
        threads = self._plan.deployment.config.engine.threads or max(1, cores // self._plan.num_neighbours)
        return threads, threads * self._plan.num_neighbours > cores

    def _engine_settings(self) -> "EngineSettings":
        from pdserve.engine.settings import EngineSettings

        deployment = self._plan.deployment
        model, engine = deployment.config.model, deployment.config.engine
        kv_bytes, kv_fraction = self._kv_memory()
        return EngineSettings(
            model=deployment.model.path,
            served_name=deployment.model.served_name,
            revision=deployment.model.revision,
            dtype=model.dtype,
            device=model.device,
            threads=self._threads()[0],
            block_size=engine.block_size,
            kv_memory_bytes=kv_bytes,
            kv_memory_fraction=kv_fraction,
            max_model_len=model.max_model_len,
            deterministic=engine.deterministic,
            trust_remote_code=model.trust_remote_code,
            chunk_tokens=engine.chunk_tokens,
            peak_tflops=engine.peak_tflops,
            peak_gb_per_s=engine.peak_gb_per_s,
        )

    def _kv_memory(self) -> tuple[int | None, float]:
        """Bytes, or None and the share of what is free after loading."""
        from pdserve.engine.checkpoint import find_checkpoint
        from pdserve.engine.host import available_bytes, find_device

        config, model = self._plan.deployment.config, self._plan.deployment.model
        device = find_device(config.model.device)
        is_gpu = device.type == "cuda"
        share = (is_gpu and min(1.0, self._plan.num_gpus)) or 1 / self._plan.num_neighbours
        weight_bytes = find_checkpoint(model.path, model.revision).loaded_bytes(config.model.dtype)
        return kv_memory(config.engine.kv_memory, is_gpu, share, available_bytes(device) - weight_bytes)

    def _worker_settings(self) -> "WorkerSettings":
        from controller.worker import WorkerSettings
        from decode_worker.loop import DecodeSettings
        from decode_worker.room import RoomSettings

        config = self._plan.deployment.config
        decode = DecodeSettings(
            config.engine.step_budget_ms / 1000,
            RoomSettings(config.engine.growth_reserve_blocks),
            config.engine.local_prefill_share,
        )
        return WorkerSettings(decode=decode, transports=config.network.transports)

    def _tell(self, message: str) -> None:
        self._controller.tell.remote(self._plan.spec.id, message)


def set_thread_environment(num_threads: int, is_crowded: bool) -> None:
    """For the libraries under torch, which read it once when they are loaded.

    On a crowded machine idle threads must sleep: a spinning team of them takes the cores of its neighbours.
    """
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(num_threads)
    if is_crowded:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def num_cores() -> int:
    """Cores that this process may use, a container's quota included."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(allowed, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota ("max")
        return allowed
