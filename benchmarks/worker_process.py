"""One worker as a process of its own, without Ray, for benchmarks that are their own router.

The parent writes one line of JSON to stdin (`WorkerPlan`; the deployment's token is in it, which must not be
in a command line) and reads one from stdout (`Started`). The worker stops when stdin ends.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import start_http_server

from controller.worker import Worker, WorkerSettings
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.ids import Incarnation, WorkerId
from pdserve.contract.messages import Role
from pdserve.engine import layer_groups
from pdserve.engine.engine import ModelEngine
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.settings import EngineSettings
from pdserve.rpc.credentials import Credentials, DeploymentToken
from pdserve.rpc.grpc_rpc import GrpcRpc


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    name: str
    role: Role
    engine: dict[str, Any]
    """Of `EngineSettings`."""
    transports: tuple[str, ...]
    num_layer_groups: int
    token: str


@dataclass(frozen=True, slots=True)
class Started:
    name: str
    address: str
    incarnation: Incarnation
    metrics_url: str


@contextmanager
def running(plan: WorkerPlan) -> Iterator[Started]:
    """A worker process, from when it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(asdict(plan)).encode() + b"\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{plan.name} did not start; what it wrote to stderr says why")
        yield Started(**json.loads(answer))
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


async def main(plan: WorkerPlan) -> None:
    layer_groups.NUM_GROUPS = plan.num_layer_groups
    engine = ModelEngine.load(EngineSettings(**plan.engine))
    rpc = GrpcRpc(Credentials(DeploymentToken(plan.token)))
    settings = WorkerSettings(transports=plan.transports)
    executor = ThreadExecutor(engine)
    worker = Worker(
        WorkerId(plan.name), Role(plan.role), engine, executor, rpc, LoopClock(), SystemRng(), settings
    )
    member = await worker.start("127.0.0.1:0")
    server, _ = start_http_server(0, "127.0.0.1", worker.registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    print(json.dumps(asdict(Started(plan.name, member.address, member.incarnation, url))), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent closes it
    await worker.stop()
    server.shutdown()


if __name__ == "__main__":
    asyncio.run(main(WorkerPlan(**json.loads(sys.stdin.readline()))))
