"""What the admin server shows of the fleet: one snapshot, made once for all who watch."""

import asyncio
import json
from collections.abc import AsyncGenerator, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client import Counter, Gauge

from pdserve.contract.messages import Role, WorkerState
from pdserve.contract.ports import Clock
from pdserve.contract.work import BlockCounts
from pdserve.tasks import cancel_and_wait
from router.admin.rates import Rates
from router.fleet import WorkerView
from router.recent_times import NUM_PERIODS, Percentiles
from router.router import Router

INTERVAL_S = 1.0
"""Between two snapshots."""
SAMPLES_PER_PERIOD = 10
WINDOW_S = NUM_PERIODS * SAMPLES_PER_PERIOD * INTERVAL_S
"""How far back the percentiles go."""

UNREACHABLE = "unreachable"
HUNG = "hung"


@dataclass(frozen=True, slots=True)
class WorkerSnapshot:
    """One worker as this router knows it. Before it has reported `blocks` is None, and all it has to do 0."""

    id: str
    role: str
    address: str
    state: str
    """A `WorkerState`, ``unreachable`` while this router has no connection, or ``hung``: its engine hangs."""
    waiting_requests: int
    waiting_tokens: int
    running_sequences: int
    context_tokens: int
    """Tokens of KV that the running sequences hold."""
    blocks: BlockCounts | None
    block_size: int
    steps_per_s: float
    output_tokens_per_s: float
    """Decode workers: tokens that came from it to this router."""
    prefill_tokens_per_s: float
    """How fast the last step was that only computed prompts; 0 before the first."""
    decode_step_s: float
    """How long the last step took that only decoded; 0 before the first."""
    report_age_s: float | None


@dataclass(frozen=True, slots=True)
class PoolSnapshot:
    """All workers of one role together."""

    role: str
    num_workers: int
    num_usable: int
    waiting_requests: int
    waiting_tokens: int
    running_sequences: int
    blocks: BlockCounts
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class RequestsSnapshot:
    """The requests of this router."""

    running: int
    """Admitted and not ended."""
    waiting: int
    """Of these, those that no worker has yet."""
    waiting_tokens: int
    ended_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class LatencySnapshot:
    """Requests of this router in the last `window_s` seconds."""

    window_s: float
    time_to_first_token: Percentiles
    inter_token: Percentiles
    end_to_end: Percentiles


@dataclass(frozen=True, slots=True)
class SloSnapshot:
    """How many of the requests that ended in the last `window_s` seconds of `LatencySnapshot` were good."""

    limits_s: Mapping[str, float]
    """What is asked for, by objective."""
    target: float
    """The share that is to be good."""
    num_counted: int
    num_good: int
    good_per_s: float
    """In the last seconds."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one router sees. Other routers of the system have requests of their own, which are not here."""

    router: str
    model: str
    takes: str
    """The most comfortable prompt that the model takes: ``chat``, ``text`` or ``tokens``."""
    ready: bool
    reason: str
    requests: RequestsSnapshot
    latency: LatencySnapshot
    slo: SloSnapshot
    pools: tuple[PoolSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class LiveState:
    """Takes a sample every INTERVAL_S from `start` to `close`, and tells whoever follows."""

    def __init__(self, router: Router, clock: Clock, model: str, takes: str) -> None:
        """`model` is what clients call it; `takes` as in `Snapshot`."""
        self._router = router
        self._clock = clock
        self._model = model
        self._takes = takes
        self._rates = Rates()
        self._num_samples = 0
        self._num_followers = 0
        self._event = ""  # the newest snapshot as a server-sent event; only made while somebody follows
        self._news = asyncio.Event()
        self._is_closed = False
        self._running: asyncio.Task[None] | None = None

    @property
    def num_followers(self) -> int:
        return self._num_followers

    def start(self) -> None:
        self._running = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Everybody who follows has seen the last."""
        self._is_closed = True
        self._news.set()
        if self._running is not None:
            await cancel_and_wait(self._running)

    def snapshot(self) -> Snapshot:
        readiness = self._router.readiness()
        workers = tuple(self._worker(view) for view in self._views())
        return Snapshot(
            router=str(self._router.identity.router_id),
            model=self._model,
            takes=self._takes,
            ready=readiness.ready,
            reason=readiness.reason,
            requests=self._requests(),
            latency=self._latency(),
            slo=self._slo(),
            pools=_pools(workers, readiness.workers),
            workers=workers,
        )

    async def events(self) -> AsyncGenerator[str, None]:
        """A server-sent event now and after every sample. Who reads slowly misses some."""
        self._num_followers += 1
        try:
            yield self._encode()
            while True:
                await self._news.wait()
                if self._is_closed:
                    return
                yield self._event
        finally:
            self._num_followers -= 1

    async def _run(self) -> None:
        while True:
            self._sample()
            if self._num_followers:
                self._event = self._encode()
            news, self._news = self._news, asyncio.Event()
            news.set()
            await self._clock.sleep(INTERVAL_S)

    def _sample(self) -> None:
        self._rates.sample(self._clock.now(), dict(self._counters()))
        self._num_samples += 1
        if self._num_samples % SAMPLES_PER_PERIOD == 0:
            self._router.recent.end_period()

    def _encode(self) -> str:
        return f"data: {json.dumps(self.snapshot().as_json(), separators=(',', ':'))}\n\n"

    def _views(self) -> list[WorkerView]:
        return [view for _, view in sorted(self._router.fleet.workers.items())]

    def _counters(self) -> Iterable[tuple[Hashable, float]]:
        metrics, recent = self._router.metrics, self._router.recent
        yield "ended", recent.end_to_end.num_ever
        yield "good", recent.good.num_good_ever
        yield "prompt tokens", _value(metrics.prompt_tokens)
        yield "output tokens", _value(metrics.output_tokens)
        for view in self._router.fleet.workers.values():
            yield (view.identity, "output tokens"), view.num_output_tokens
            if view.load is not None:
                yield (view.identity, "steps"), view.load.step

    def _requests(self) -> RequestsSnapshot:
        metrics = self._router.metrics
        return RequestsSnapshot(
            running=int(_value(metrics.running_requests)),
            waiting=int(_value(metrics.waiting_requests)),
            waiting_tokens=int(_value(metrics.waiting_tokens)),
            ended_per_s=self._rates.per_s("ended"),
            prompt_tokens_per_s=self._rates.per_s("prompt tokens"),
            output_tokens_per_s=self._rates.per_s("output tokens"),
        )

    def _latency(self) -> LatencySnapshot:
        recent = self._router.recent
        return LatencySnapshot(
            WINDOW_S,
            recent.time_to_first_token.percentiles(),
            recent.inter_token.percentiles(),
            recent.end_to_end.percentiles(),
        )

    def _slo(self) -> SloSnapshot:
        objectives, good = self._router.objectives, self._router.recent.good
        return SloSnapshot(
            limits_s={each.value: limit_s for each, limit_s in objectives.limits_s.items()},
            target=objectives.target,
            num_counted=good.num,
            num_good=good.num_good,
            good_per_s=self._rates.per_s("good"),
        )

    def _worker(self, view: WorkerView) -> WorkerSnapshot:
        load, hello = view.load, view.hello
        return WorkerSnapshot(
            id=str(view.member.worker_id),
            role=view.member.role.value,
            address=view.member.address,
            state=_state_of(view),
            waiting_requests=load.waiting_requests if load else 0,
            waiting_tokens=load.waiting_tokens if load else 0,
            running_sequences=load.running_sequences if load else 0,
            context_tokens=load.running_context_tokens if load else 0,
            blocks=load.blocks if load else None,
            block_size=hello.model.block_size if hello else 0,
            steps_per_s=self._rates.per_s((view.identity, "steps")),
            output_tokens_per_s=self._rates.per_s((view.identity, "output tokens")),
            prefill_tokens_per_s=load.prefill_tokens_per_s if load else 0.0,
            decode_step_s=load.decode_step_s if load else 0.0,
            report_age_s=self._clock.now() - view.reported_at if load else None,
        )


def _state_of(view: WorkerView) -> str:
    if not view.connected or view.load is None:
        return UNREACHABLE
    if view.hangs:
        return HUNG
    said = view.load.state
    return (view.member.state if said is WorkerState.READY else said).value


def _pools(workers: Sequence[WorkerSnapshot], num_usable: Mapping[str, int]) -> tuple[PoolSnapshot, ...]:
    roles = [role.value for role in Role if any(worker.role == role for worker in workers)]
    return tuple(
        _pool(role, [worker for worker in workers if worker.role == role], num_usable.get(role, 0))
        for role in roles
    )


def _pool(role: str, workers: Sequence[WorkerSnapshot], num_usable: int) -> PoolSnapshot:
    return PoolSnapshot(
        role=role,
        num_workers=len(workers),
        num_usable=num_usable,
        waiting_requests=sum(worker.waiting_requests for worker in workers),
        waiting_tokens=sum(worker.waiting_tokens for worker in workers),
        running_sequences=sum(worker.running_sequences for worker in workers),
        blocks=_add([worker.blocks for worker in workers if worker.blocks is not None]),
        output_tokens_per_s=sum(worker.output_tokens_per_s for worker in workers),
    )


def _add(counts: Sequence[BlockCounts]) -> BlockCounts:
    return BlockCounts(
        free=sum(each.free for each in counts),
        cached=sum(each.cached for each in counts),
        reserved=sum(each.reserved for each in counts),
        active=sum(each.active for each in counts),
    )


def _value(metric: Counter | Gauge) -> float:
    """Of a metric without labels."""
    (family,) = metric.collect()
    return float(family.samples[0].value)
