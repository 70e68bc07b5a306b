"""How fast KV moves between two processes on one host, per transport, against a plain memory copy.

The source is a second process. For every round each transport moves the same number of bytes, in segments
under a window as a Prefill call does, and one thread here copies as many bytes from memory to memory; they
alternate, so that a busy machine disturbs them alike. Verified bytes per second of wall time, from Reserved
to the last End; what opening the call takes before that is told beside it.

    python -m benchmarks.transports [--smoke] [--transports NAME ...] [--json FILE]
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from benchmarks.conditions import conditions
from pdserve.clock import LoopClock, SystemRng
from pdserve.contract.ids import BlockId, Incarnation, RequestId, WorkerId
from pdserve.contract.messages import Ack, End, PrefillOpen, Reserved, Segment, Starting, TransportOffer
from pdserve.contract.ports import Call, MessageStream
from pdserve.contract.work import LayerRange
from pdserve.engine.executor import ThreadExecutor
from pdserve.engine.fake_engine import FakeEngine
from pdserve.engine.kv_pool import KvLayout, KvPool
from pdserve.handoff.digest import digest
from pdserve.handoff.receiving import MAX_LINED_UP
from pdserve.handoff.transports.base import LocalSide, SegmentReceiver, SegmentSender
from pdserve.handoff.transports.negotiation import DEFAULT_ORDER, Transports
from pdserve.rpc.credentials import Credentials, DeploymentToken
from pdserve.rpc.grpc_rpc import GrpcRpc

# The 0.4B Llama shape in bf16: 24 layers, 2 KV heads of 64, blocks of 16 tokens.
LAYOUT = KvLayout(num_layers=24, block_size=16, num_kv_heads=2, head_dim=64, dtype=torch.bfloat16)
CREDENTIALS = Credentials(DeploymentToken("of both processes"))
TRANSPORTS = (*DEFAULT_ORDER, "process_group", *(["nixl"] if importlib.util.find_spec("nixl") else []))
WINDOW_SEGMENTS = 8


class Worker:
    """A pool full of noise and its transports."""

    def __init__(self, num_blocks: int) -> None:
        self.pool = KvPool(LAYOUT, num_blocks, torch.device("cpu"))
        self.pool.tensor.view(torch.int16).random_()
        self.rpc = GrpcRpc(CREDENTIALS)
        self.executor = ThreadExecutor(FakeEngine(1))
        side = LocalSide(self.pool, LAYOUT.num_layers, self.executor, self.rpc, LoopClock(), SystemRng())
        self.transports = Transports(side, TRANSPORTS)
        self.block_ids = [
            BlockId(block) for block in np.random.default_rng(os.getpid()).permutation(num_blocks)
        ]

    @property
    def num_bytes(self) -> int:
        return self.pool.num_blocks * self.pool.block_bytes

    async def close(self) -> None:
        await self.transports.close()
        await self.rpc.close()
        await self.executor.close()


# The source process


async def serve(num_blocks: int) -> None:
    """Serve until stdin closes; the first line of output is the address."""
    worker = Worker(num_blocks)

    async def serve_prefill(stream: MessageStream) -> None:
        await _ship_pool(worker, stream)

    handlers = {Call.PREFILL: serve_prefill, Call.KV: worker.transports.kv_handler}
    server = await worker.rpc.serve("127.0.0.1:0", handlers)
    print(server.address, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(1)
    await worker.close()


async def _ship_pool(worker: Worker, stream: MessageStream) -> None:
    opened = await stream.receive()
    assert isinstance(opened, PrefillOpen)
    accepted = worker.transports.choose(opened.transports)
    await stream.send(Starting(accepted.choice, 0))
    assert isinstance(await stream.receive(), Reserved)
    window = asyncio.Semaphore(WINDOW_SEGMENTS)
    acknowledging = asyncio.ensure_future(_acknowledge(stream, window))
    await _ship_segments(worker, stream, accepted.sender, window)
    await acknowledging
    await accepted.sender.close()
    await stream.send(End())


async def _ship_segments(
    worker: Worker, stream: MessageStream, sender: SegmentSender, window: asyncio.Semaphore
) -> None:
    blocks_per_segment = sender.max_segment_bytes // worker.pool.block_bytes
    for index, start in enumerate(range(0, worker.pool.num_blocks, blocks_per_segment)):
        await window.acquire()
        block_ids = worker.block_ids[start : start + blocks_per_segment]
        await stream.send(await sender.send(index, start, block_ids, LayerRange(0, LAYOUT.num_layers)))


async def _acknowledge(stream: MessageStream, window: asyncio.Semaphore) -> None:
    """Until the receiver's End."""
    while not isinstance(message := await stream.receive(), End):
        assert isinstance(message, Ack)
        window.release()


# The receiving process


async def fetch(worker: Worker, address: str, name: str) -> tuple[float, float]:
    """Move the source's whole pool once. Seconds to open the call, and for all from Reserved on."""
    began_at = time.perf_counter()
    stream = await worker.rpc.open(address, Call.PREFILL)
    offers = tuple(offer for offer in worker.transports.offers() if offer.name == name)
    await stream.send(_prefill_open(offers))
    starting = await stream.receive()
    assert isinstance(starting, Starting), starting
    receiver = await worker.transports.connect(starting.transport, address)
    opened_at = time.perf_counter()
    await stream.send(Reserved(0))
    await _receive_pool(worker, stream, receiver)
    ended_at = time.perf_counter()
    await receiver.close()
    return opened_at - began_at, ended_at - opened_at


async def _receive_pool(worker: Worker, stream: MessageStream, receiver: SegmentReceiver) -> None:
    num_blocks = 0
    under_way: deque[tuple[int, asyncio.Task[bool]]] = deque()
    while num_blocks < worker.pool.num_blocks:
        segment = await stream.receive()
        assert isinstance(segment, Segment), segment
        block_ids = worker.block_ids[num_blocks : num_blocks + segment.num_blocks]
        under_way.append((segment.index, asyncio.create_task(receiver.receive(segment, block_ids))))
        num_blocks += segment.num_blocks
        await _answer(stream, under_way, num_left=1 + MAX_LINED_UP)
    await _answer(stream, under_way, num_left=0)
    await stream.send(End())
    assert isinstance(await stream.receive(), End)


async def _answer(
    stream: MessageStream, under_way: deque[tuple[int, asyncio.Task[bool]]], num_left: int
) -> None:
    """Acknowledge until only `num_left` copies are under way."""
    while len(under_way) > num_left:
        index, verified = under_way.popleft()
        assert await verified, "a segment arrived corrupt"
        await stream.send(Ack(index))


def _prefill_open(offers: tuple[TransportOffer, ...]) -> PrefillOpen:
    return PrefillOpen(
        request_id=RequestId("benchmark"),
        attempt=1,
        decode_worker_id=WorkerId("decode"),
        source_incarnation=Incarnation(0),
        fingerprint="",
        tokens=b"",
        num_prompt_tokens=0,
        transports=offers,
        sampling=None,
    )


@dataclass
class Rates:
    """Gigabytes per second of several rounds, and the seconds that opening each took."""

    rounds: list[float] = field(default_factory=list)
    opening_s: list[float] = field(default_factory=list)

    def add(self, opening_s: float, gb_per_s: float) -> None:
        self.opening_s.append(opening_s)
        self.rounds.append(gb_per_s)

    def summary(self, copy: "Rates") -> dict[str, float]:
        """Of the rounds; the ratio to `copy` is taken round by round."""
        ratios = [own / other for own, other in zip(self.rounds, copy.rounds, strict=True)]
        return {
            "opening_ms": round(1000 * statistics.median(self.opening_s), 2),
            "gb_per_s": round(statistics.median(self.rounds), 3),
            "min": round(min(self.rounds), 3),
            "max": round(max(self.rounds), 3),
            "ratio_to_copy": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
        }


async def measure(
    address: str, num_blocks: int, num_rounds: int, transports: Sequence[str]
) -> dict[str, Rates]:
    """Alternate what is compared; the first round warms up and is not counted."""
    worker = Worker(num_blocks)
    local = _LocalWork(worker)
    rates: dict[str, Rates] = {name: Rates() for name in ("copy", "digest", *transports)}
    for number in range(num_rounds + 1):
        for name, rate in rates.items():
            if name in transports:
                opening_s, seconds = await fetch(worker, address, name)
            else:
                opening_s, seconds = 0.0, await local.run(name)
            if number:
                rate.add(opening_s, worker.num_bytes / seconds / 1e9)
    await worker.close()
    return rates


class _LocalWork:
    """What one thread does to as many bytes in its own memory."""

    def __init__(self, worker: Worker) -> None:
        self._executor = worker.executor
        self._bytes = worker.pool.tensor.view(torch.uint8).numpy().reshape(-1)
        self._copy = np.zeros_like(self._bytes)
        self._jobs: dict[str, Callable[[], None]] = {"copy": self._copy_all, "digest": self._digest_all}

    async def run(self, name: str) -> float:
        """Its seconds."""
        started_at = time.perf_counter()
        await self._executor.copy(self._jobs[name])
        return time.perf_counter() - started_at

    def _copy_all(self) -> None:
        np.copyto(self._copy, self._bytes)

    def _digest_all(self) -> None:
        digest(self._bytes.data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--smoke", action="store_true", help="64 MiB and 3 rounds, for a few seconds")
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS, metavar="NAME")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    parser.add_argument("--serve", type=int, metavar="BLOCKS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        asyncio.run(serve(arguments.serve))
        return
    num_bytes, num_rounds = (64 << 20, 3) if arguments.smoke else (512 << 20, 9)
    rates = run(num_bytes // LAYOUT.block_bytes, num_rounds, arguments.transports)
    _report(rates, num_bytes, arguments.json)


def run(num_blocks: int, num_rounds: int, transports: Sequence[str] = TRANSPORTS) -> dict[str, Rates]:
    """Start the source, measure, stop it."""
    command = [sys.executable, "-m", "benchmarks.transports", "--serve", str(num_blocks)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as source:
        assert source.stdout is not None
        return asyncio.run(measure(source.stdout.readline().strip(), num_blocks, num_rounds, transports))


def _report(rates: dict[str, Rates], num_bytes: int, path: str | None) -> None:
    summaries = {name: rate.summary(rates["copy"]) for name, rate in rates.items()}
    print(f"{num_bytes >> 20} MiB per round, {len(rates['copy'].rounds)} rounds, {os.cpu_count()} cores")
    for name, summary in summaries.items():
        print(
            f"{name:14s} {summary['gb_per_s']:7.2f} GB/s ({summary['min']:.2f} to {summary['max']:.2f}), "
            f"{summary['ratio_to_copy']:.2f} of a plain copy ({summary['ratio_min']:.2f} to "
            f"{summary['ratio_max']:.2f}), opened in {summary['opening_ms']:.1f} ms"
        )
    if path:
        with open(path, "w") as file:
            content = {"conditions": conditions("transports"), "bytes_per_round": num_bytes}
            json.dump(
                {**content, "num_rounds": len(rates["copy"].rounds), "rates": summaries}, file, indent=2
            )


if __name__ == "__main__":
    main()
