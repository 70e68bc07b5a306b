"""The link between a prefill worker and a decode worker is cut, and nothing else."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace

from tests.faults.islands import SETTINGS, Islands, islands
from tests.faults.rehearsal import Case, Rehearsal, Run, rehearsal
from tests.ray_cluster import private_pdserve
from tests.small_models import SmallModel

CASE = Case(
    "cut",
    "the link between one prefill worker and the decode worker drops everything",
    num_requests=40,
)
UNDER_WAY_S = 0.15
"""After so long the first answers have begun and the last have not."""
_NODES = {
    "head": '{"head_node": 1}',
    "a": '{"prefill_node": 1}',
    "b": '{"prefill_node": 1, "decode_node": 1}',
}


@contextlib.contextmanager
def system_on_islands(model: SmallModel) -> Iterator[tuple[Rehearsal, Islands]]:
    """One prefill worker alone on node ``a``; another, and the decode worker, on ``b``. KV goes over gRPC."""

    def pool(replicas: int, resource: str) -> dict[str, object]:
        return {"replicas": replicas, "resources": {"custom": {resource: 1}}}

    sections = {
        "pools": {"prefill": pool(2, "prefill_node"), "decode": pool(1, "decode_node")},
        "router": {"http_port": 0, "resources": {"custom": {"head_node": 1}}},
        "network": {"transports": ["grpc"], "metrics_host": "0.0.0.0"},
        "ray": {"placement_timeout_s": 30},
    }
    with islands(_NODES) as cluster, private_pdserve() as pdserve:
        pdserve.env.update(SETTINGS)
        with rehearsal(pdserve, model, "--address", cluster.address, **sections) as system:
            yield system, cluster


async def cut_while_under_way(system: Rehearsal, cluster: Islands, seed: int = 0) -> Run:
    """The link is whole again only when all requests have been answered."""

    async def cut() -> None:
        await asyncio.sleep(UNDER_WAY_S)
        cluster.cut()

    return await system.run(replace(CASE, seed=seed), cut, cluster.heal)
