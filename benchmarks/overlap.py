"""How much of a KV transfer the computation hides, and what shipping costs the prefill.

    python -m benchmarks.overlap --json results.json
    python -m benchmarks.overlap --smoke

A prefill worker and two decode workers, each a process with one engine thread, serve a random 0.4B shape. One
decode worker receives by shared memory, the other over gRPC. This process is their router and sends one
request at a time, each with a prompt of its own; four kinds in turns, in an order that rotates:

- `shared_memory` and `grpc`: the decode worker has nothing of the prompt, all its KV travels.
- the same two `off`: the decode worker has computed the same prompt itself just before, so the prefill worker
  does exactly the same work, and nothing of it travels but the last block, which is never shared.

The prefill time is the prefill worker's own, from the start of a prompt to the end of its last step. What
splitting adds to it is the ratio of the medians with and without transfers. The end of the last forward pass
is taken for one message's way later than it was, because the workers' clocks differ.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.conditions import conditions
from benchmarks.engine import SHAPE, make_model
from benchmarks.worker_process import Started, WorkerPlan, running
from pdserve.contract.ids import Incarnation, RequestId, RouterId, SubmitNumber, WorkerId
from pdserve.contract.messages import (
    Failed,
    Frame,
    PrefillSource,
    Refused,
    RequestTimings,
    Role,
    SessionOpen,
    SessionReady,
    Submit,
)
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import TokenBytes, pack_tokens
from pdserve.engine.layer_groups import NUM_GROUPS
from pdserve.rpc.credentials import Credentials, DeploymentToken
from pdserve.rpc.grpc_rpc import GrpcRpc

TRANSPORTS = ("shared_memory", "grpc")
CHUNK_TOKENS = 64
"""What one thread computes of the 0.4B shape within a worker's default step budget of 0.2 s."""
NUM_CHUNKS = (4, 8)
NUM_WARM_UPS = 2


@dataclass(frozen=True, slots=True)
class Workers:
    prefill: Started
    decode: dict[str, Started]
    """By transport."""


@dataclass(frozen=True, slots=True)
class Run:
    """One request."""

    timings: RequestTimings
    share_ahead: float
    """Of its KV bytes, those that were verified when its last forward pass ended."""
    first_to_second_token_s: float


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    rounds = 1 if arguments.smoke else arguments.rounds
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        measured = measure(Path(folder), NUM_CHUNKS, CHUNK_TOKENS, rounds, arguments.layer_groups)
    result = conditions("overlap") | {
        "model": {"shape": SHAPE, "dtype": "bfloat16"},
        "threads_per_worker": 1,
        "chunk_tokens": CHUNK_TOKENS,
        "layer_groups": arguments.layer_groups,
        "rounds": rounds,
        "prompts": measured,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")


def measure(
    model: Path, num_chunks: Sequence[int], chunk_tokens: int, rounds: int, num_layer_groups: int
) -> dict[str, Any]:
    """For prompts of so many chunks: what `_summary` says, by transport."""
    token = DeploymentToken.draw()
    with _workers(model, chunk_tokens, num_layer_groups, token) as workers:
        return asyncio.run(_measure(workers, num_chunks, chunk_tokens, rounds, token))


@contextmanager
def _workers(
    model: Path, chunk_tokens: int, num_layer_groups: int, token: DeploymentToken
) -> Iterator[Workers]:
    engine = {
        "model": str(model),
        "threads": 1,
        "kv_memory_bytes": 256 << 20,
        "chunk_tokens": chunk_tokens,
    }
    with ExitStack() as processes:

        def start(name: str, role: Role, transports: tuple[str, ...]) -> Started:
            plan = WorkerPlan(name, role, engine, transports, num_layer_groups, token.secret)
            return processes.enter_context(running(plan))

        prefill = start("prefill", Role.PREFILL, TRANSPORTS)
        decode = {name: start(f"decode-{name}", Role.DECODE, (name,)) for name in TRANSPORTS}
        yield Workers(prefill, decode)


async def _measure(
    workers: Workers, num_chunks: Sequence[int], chunk_tokens: int, rounds: int, token: DeploymentToken
) -> dict[str, Any]:
    rpc = GrpcRpc(Credentials(token))
    try:
        clients = {
            name: await _Client.connect(rpc, decode, workers.prefill)
            for name, decode in workers.decode.items()
        }
        return {
            f"{chunks} chunks, {chunks * chunk_tokens} tokens": await _alternate(
                clients, chunks * chunk_tokens, rounds
            )
            for chunks in num_chunks
        }
    finally:
        await rpc.close()


async def _alternate(clients: "dict[str, _Client]", num_tokens: int, rounds: int) -> dict[str, Any]:
    """All kinds in turns; the first rounds warm up and are not counted."""
    rng = random.Random(num_tokens)
    kinds = [(name, off) for name in clients for off in (False, True)]
    runs: dict[tuple[str, bool], list[Run]] = {kind: [] for kind in kinds}
    for number in range(NUM_WARM_UPS + rounds):
        for shift in range(len(kinds)):
            name, off = kinds[(number + shift) % len(kinds)]
            prompt = pack_tokens([rng.randrange(10, SHAPE["vocab_size"]) for _ in range(num_tokens)])
            if off:
                await clients[name].compute_locally(prompt)
            runs[name, off].append(await clients[name].fetch(prompt))
        print(f"{num_tokens} tokens, round {number}: {_line(runs)}", flush=True)
    return {
        name: _summary(runs[name, False][NUM_WARM_UPS:], runs[name, True][NUM_WARM_UPS:]) for name in clients
    }


class _Client:
    """This process' Session with one decode worker."""

    def __init__(self, decode: Started, prefill: Started, session: MessageStream) -> None:
        self._metrics_url = decode.metrics_url
        self._source = PrefillSource(
            WorkerId(prefill.name), prefill.address, Incarnation(prefill.incarnation)
        )
        self._session = session
        self._numbers = count(1)

    @classmethod
    async def connect(cls, rpc: GrpcRpc, decode: Started, prefill: Started) -> "_Client":
        session = await rpc.open(decode.address, Call.SESSION)
        await session.send(
            SessionOpen(RouterId("benchmark"), Incarnation(1), Incarnation(decode.incarnation))
        )
        assert isinstance(await session.receive(), SessionReady)
        return cls(decode, prefill, session)

    async def compute_locally(self, prompt: TokenBytes) -> None:
        """Let the decode worker compute the prompt itself; its prefix cache has it then."""
        await self._tokens(prompt, None, num_tokens=1)

    async def fetch(self, prompt: TokenBytes) -> Run:
        """Let it get the prompt's KV from the prefill worker, and generate two tokens."""
        before = await self._ratios()
        arrivals, timings = await self._tokens(prompt, self._source, num_tokens=2)
        return Run(timings, await self._ratios() - before, arrivals[1] - arrivals[0])

    async def _tokens(
        self, prompt: TokenBytes, source: PrefillSource | None, num_tokens: int
    ) -> tuple[list[float], RequestTimings]:
        """When each token came, and what the workers tell at the end."""
        number = SubmitNumber(next(self._numbers))
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        await self._session.send(
            Submit(number, RequestId(f"benchmark-{number}"), 1, prompt, b"", sampling, 0, source)
        )
        arrivals: list[float] = []
        while True:
            match await self._session.receive():
                case Frame(_, events, timings):
                    arrivals += [time.perf_counter()] * len(events)
                    if any(event.finish for event in events):
                        return arrivals, dict(timings)[number]
                case Refused(_, error) | Failed(_, error):
                    raise SystemExit(f"{error.code}: {error.message}")

    async def _ratios(self) -> float:
        """Sum over all requests of their shares that were there in time."""
        async with httpx.AsyncClient() as client:
            page = (await client.get(self._metrics_url)).text
        name = "pdserve_kv_transfer_ahead_ratio_sum"
        return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def _summary(on: Sequence[Run], off: Sequence[Run]) -> dict[str, Any]:
    prefill_on, prefill_off = ([run.timings.prefill_s for run in runs] for runs in (on, off))
    return {
        "bytes": on[0].timings.transfer_bytes,
        "share_ahead": _spread([run.share_ahead for run in on]),
        "hidden_ms": _spread([run.timings.transfer_hidden_s * 1e3 for run in on]),
        "exposed_ms": _spread([run.timings.transfer_exposed_s * 1e3 for run in on]),
        "prefill_s": _spread(prefill_on),
        "prefill_off_s": _spread(prefill_off),
        "added_to_prefill": round(median(prefill_on) / median(prefill_off) - 1, 4),
        "first_to_second_token_ms": _spread([run.first_to_second_token_s * 1e3 for run in on]),
        "first_to_second_token_off_ms": _spread([run.first_to_second_token_s * 1e3 for run in off]),
        "bytes_off": off[0].timings.transfer_bytes,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "runs": len(values),
    }


def _line(runs: dict[tuple[str, bool], list[Run]]) -> str:
    return ", ".join(
        f"{name}{' off' if off else ''} {done[-1].timings.prefill_s:.3f} s ({done[-1].share_ahead:.0%} ahead)"
        for (name, off), done in runs.items()
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How much of a KV transfer the computation hides.")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layer-groups", type=int, default=NUM_GROUPS, help="of the last chunk")
    parser.add_argument("--smoke", action="store_true", help="1 round; under 2 minutes on 2 cores")
    parser.add_argument("--json", metavar="FILE", help="also write the result there")
    return parser.parse_args()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
