"""The link between a prefill worker and a decode worker is cut, and nothing else."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import httpx

from tests.faults.islands import SETTINGS, Islands, islands
from tests.faults.rehearsal import Case, Rehearsal, Run, rehearsal, sample_sum
from tests.ray_cluster import private_pdserve
from tests.small_models import SmallModel

CASE = Case(
    "cut",
    "the link between one prefill worker and the decode worker drops everything",
    num_requests=40,
)
START_TIMEOUT_S = 120.0
"""Three nodes of Ray and five actors start on the cores of one machine."""
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
        pdserve.start_timeout_s = START_TIMEOUT_S
        with rehearsal(pdserve, model, "--address", cluster.address, **sections) as system:
            yield system, cluster


async def cut_while_under_way(system: Rehearsal, cluster: Islands, seed: int = 0) -> Run:
    """From the first answer's begin until all are there. It has happened when requests had to be placed
    again."""

    async def cut() -> None:
        cluster.cut()

    before = await num_recoveries(system)
    run = await system.run(replace(CASE, seed=seed), cut, cluster.heal)
    run.happened = await num_recoveries(system) > before
    return run


async def num_recoveries(system: Rehearsal, labels: str = "") -> float:
    """How often requests have been placed again; with `labels`, only those, as in ``{cause="stalled"}``."""
    (router,) = (await system.status())["routers"]
    async with httpx.AsyncClient(timeout=30.0) as http:
        page = await http.get(router["metrics_url"])
    return sample_sum(page.text, f"pdserve_router_recoveries_total{labels}")
