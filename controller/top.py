"""`pdserve top`: what one router sees, in the terminal, as long as one likes to look."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence

import httpx
from pydantic import TypeAdapter

from controller.admin import AdminAccess, AdminServer
from controller.terminal import Screen, aligned, say
from pdserve.contract.errors import Unavailable
from pdserve.contract.messages import Role
from pdserve.contract.work import BlockCounts
from router.admin.state import PoolSnapshot, Snapshot, WorkerSnapshot
from router.recent_times import Percentiles

_SILENCE_S = 10.0
"""A router that says nothing for so long is not there; it should every second."""
_RETRY_S = 1.0
_DATA = "data: "
_SNAPSHOT = TypeAdapter(Snapshot)


async def show_once(access: AdminAccess, router_id: str | None) -> None:
    """One look, to stdout. Raises NotFound or Unavailable."""
    server = access.router(router_id)
    async with _client(access, server) as client:
        try:
            answer = await client.get("/admin/state")
            answer.raise_for_status()
        except httpx.HTTPError as error:
            raise _unavailable(server, error) from error
    say("\n".join(lines_of(_SNAPSHOT.validate_json(answer.content))))


async def follow(access: AdminAccess, router_id: str | None) -> None:
    """A new look every second, until Ctrl-C. Raises NotFound, and Unavailable when it does not begin."""
    server = access.router(router_id)
    seen: Snapshot | None = None
    async with _client(access, server) as client:
        with Screen() as screen:
            while True:
                try:
                    async for seen in _snapshots(client):
                        screen.show(lines_of(seen))
                except httpx.HTTPError as error:
                    if seen is None:
                        raise _unavailable(server, error) from error
                assert seen is not None, "a stream without an error begins with a snapshot"
                screen.show([f"{server.id} does not answer; trying again", "", *lines_of(seen)])
                await asyncio.sleep(_RETRY_S)


def lines_of(state: Snapshot) -> list[str]:
    """All of it, most important first, because a terminal may not have room for the end."""
    requests = state.requests
    head = f"{state.model} as {state.router} sees it: {state.reason}"
    load = (
        f"requests: {requests.running} running, {requests.waiting} waiting for a worker, "
        f"{_rate(requests.ended_per_s)} ended/s"
    )
    tokens = (
        f"tokens/s: {_rate(requests.prompt_tokens_per_s)} of prompts, "
        f"{_rate(requests.output_tokens_per_s)} of answers"
    )
    good = f"good by slo: {_rate(state.slo.good_per_s)} requests/s, {_good_share(state)}"
    tables = (_latency(state), _pools(state.pools), _workers(state.workers))
    return [head, load, tokens, good, *(line for table in tables for line in ["", *table])]


def _good_share(state: Snapshot) -> str:
    slo, minutes = state.slo, f"{state.latency.window_s / 60:.0f} minutes"
    if not slo.num_counted:
        return f"none ended in {minutes}"
    return f"{math.floor(100 * slo.num_good / slo.num_counted)}% of {slo.num_counted} in {minutes}"


def _latency(state: Snapshot) -> list[str]:
    latency = state.latency
    rows = [[f"LAST {latency.window_s / 60:.0f} MINUTES", "P50", "P90", "P99", "COUNT"]]
    for name, times in (
        ("first token", latency.time_to_first_token),
        ("between tokens", latency.inter_token),
        ("whole request", latency.end_to_end),
    ):
        rows.append([name, *_percentiles(times)])
    return aligned(rows, num_left=1)


def _percentiles(times: Percentiles) -> Iterator[str]:
    yield from (_duration(seconds) for seconds in (times.p50_s, times.p90_s, times.p99_s))
    yield str(times.count)


def _pools(pools: Sequence[PoolSnapshot]) -> list[str]:
    rows = [["POOL", "READY", "QUEUE", "TOKENS", "BATCH", "KV HELD", "TOKENS/S"]]
    for pool in pools:
        rows.append(
            [
                pool.role,
                f"{pool.num_usable}/{pool.num_workers}",
                str(pool.waiting_requests),
                str(pool.waiting_tokens),
                str(pool.running_sequences),
                _held(pool.blocks),
                _rate(pool.output_tokens_per_s),
            ]
        )
    return aligned(rows, num_left=1)


def _workers(workers: Sequence[WorkerSnapshot]) -> list[str]:
    rows = [["WORKER", "STATE", "QUEUE", "TOKENS", "BATCH", "KV HELD", "STEPS/S", "TOKENS/S", "LAST STEP"]]
    for worker in workers:
        rows.append(
            [
                worker.id,
                worker.state,
                str(worker.waiting_requests),
                str(worker.waiting_tokens),
                str(worker.running_sequences),
                "-" if worker.blocks is None else _held(worker.blocks),
                _rate(worker.steps_per_s),
                _rate(worker.output_tokens_per_s),
                _pace(worker),
            ]
        )
    return aligned(rows, num_left=2)


def _pace(worker: WorkerSnapshot) -> str:
    """How fast the last step of its kind was."""
    if worker.role == Role.PREFILL:
        return f"{worker.prefill_tokens_per_s:.0f} tokens/s" if worker.prefill_tokens_per_s else "-"
    return _duration(worker.decode_step_s or None)


def _held(blocks: BlockCounts) -> str:
    """The share of KV blocks that requests hold."""
    total = blocks.free + blocks.cached + blocks.reserved + blocks.active
    return f"{(blocks.reserved + blocks.active) / total:.0%}" if total else "-"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.1f} ms" if seconds < 0.01 else f"{seconds * 1000:.0f} ms"
    return f"{seconds:.2f} s"


def _rate(per_s: float) -> str:
    return f"{per_s:.1f}" if per_s < 10 else f"{per_s:.0f}"


async def _snapshots(client: httpx.AsyncClient) -> AsyncIterator[Snapshot]:
    async with client.stream("GET", "/admin/events") as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith(_DATA):
                yield _SNAPSHOT.validate_json(line.removeprefix(_DATA))


def _client(access: AdminAccess, server: AdminServer) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {access.token.secret}"}
    return httpx.AsyncClient(base_url=server.url, headers=headers, timeout=_SILENCE_S, trust_env=False)


def _unavailable(server: AdminServer, error: httpx.HTTPError) -> Unavailable:
    return Unavailable(
        f"the admin server of {server.id} at {server.url} does not answer ({error}): try again, or, where "
        "the router is on another machine, run this command there"
    )
