"""A worker put together: engine, pool, streams and one replaceable role. Knows both rooms; no Ray."""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from prometheus_client import CollectorRegistry

from controller.departure import Departure
from controller.integrity import Holder, IntegrityReport, inspect
from decode_worker.loop import DecodeLoop, DecodeSettings
from decode_worker.streams import SessionServer
from pdserve.contract.block_names import ChainRoot
from pdserve.contract.ids import Incarnation, SubmitNumber, WorkerId
from pdserve.contract.messages import Hello, Member, PairTransport, Role, WorkerLoad, WorkerState
from pdserve.contract.ports import Call, Clock, Engine, EngineExecutor, Handler, Rng, Rpc, RpcServer
from pdserve.contract.tracing import NO_TRACER, Tracer
from pdserve.contract.work import BlockCounts, StepCost
from pdserve.engine.block_allocator import BlockAllocator
from pdserve.engine.step_pace import StepPace
from pdserve.engine.watchdog import WatchedExecutor
from pdserve.handoff.ledger import BlockHold, BlockLedger
from pdserve.handoff.sending import PrefillSource, SendingSettings
from pdserve.handoff.transports.base import LocalSide
from pdserve.handoff.transports.negotiation import DEFAULT_ORDER, Transports
from pdserve.metrics import WorkerMetrics
from pdserve.rpc.watch import WatchServer
from pdserve.tasks import cancel_and_wait, outlast
from prefill_worker.loop import PrefillLoop

FAREWELL_S = 0.5
"""How long a worker that has nothing left waits for its routers to read its last words."""


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    decode: DecodeSettings = field(default_factory=DecodeSettings)
    sending: SendingSettings = field(default_factory=SendingSettings)
    transports: tuple[str, ...] = DEFAULT_ORDER


class Loop(Protocol):
    """What PrefillLoop and DecodeLoop have in common."""

    num_steps: int
    prefill_tokens_per_s: float
    decode_step_s: float
    pace: StepPace

    @property
    def running_sequences(self) -> int: ...
    @property
    def running_context_tokens(self) -> int: ...
    @property
    def waiting_requests(self) -> int: ...
    @property
    def waiting_since(self) -> list[float]: ...
    async def run(self) -> None: ...
    async def over(self) -> None: ...


class Worker:
    """One rank of one pool, from `start` to `stop`."""

    def __init__(
        self,
        worker_id: WorkerId,
        role: Role,
        engine: Engine,
        executor: EngineExecutor,
        rpc: Rpc,
        clock: Clock,
        rng: Rng,
        settings: WorkerSettings | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        settings = settings or WorkerSettings()
        self.worker_id = worker_id
        self.role = role
        self.incarnation = Incarnation(rng.random_bits(63))
        self.state = WorkerState.STARTING
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(role.value, self.registry, engine.roofline)
        self._info = engine.info
        self._executor = WatchedExecutor(executor, engine.cost, clock)
        self._clock = clock
        self._rpc = rpc
        self._clock = clock
        self._tracer = tracer
        self._server: RpcServer | None = None
        self._running: asyncio.Task[None] | None = None
        self._over = asyncio.Event()  # the loop has ended, or will never go on
        self._failure: BaseException | None = None  # why
        self._work = asyncio.Event()
        self._allocator = BlockAllocator(engine.info.num_blocks, engine.info.block_size)
        self.ledger = BlockLedger(self._allocator)
        side = LocalSide(engine.blocks, engine.info.num_layers, self._executor, rpc, clock, rng)
        self._transports = Transports(side, settings.transports)
        self.calls = PrefillSource(
            self._transports,
            engine.info,
            self.incarnation,
            clock,
            self.metrics,
            self._work.set,
            settings.sending,
            tracer,
        )
        self._sessions: SessionServer | None = None
        self.loop = self._make_loop(engine, clock, settings)
        self._departure = Departure(clock, self._give_back, self._emptied)
        share = settings.decode.local_prefill_share if role is Role.DECODE else 1.0
        hello = self._hello(engine.cost, share)
        self._watches = WatchServer(hello, self._allocator, self.load, clock)
        self._export_gauges()

    @property
    def transports_in_use(self) -> list[PairTransport]:
        """How KV came from each prefill worker the last time."""
        return self.loop.transports_in_use if isinstance(self.loop, DecodeLoop) else []

    @property
    def address(self) -> str:
        """host:port of the worker's streams; only after `start`."""
        assert self._server is not None, "the worker has not been started"
        return self._server.address

    async def start(self, address: str) -> Member:
        """Serve at `address` (port 0 picks one); what the controller tells the routers."""
        self._server = await self._rpc.serve(address, self._handlers(), self.metrics.count_refused_call)
        self._running = asyncio.create_task(self._run(self._server))
        self.state = WorkerState.READY
        return self.member()

    def member(self) -> Member:
        return Member(
            self.worker_id, self.address, self.incarnation, self.role, self._info.revision, self.state
        )

    def load(self, watcher: Incarnation) -> WorkerLoad:
        """What the worker has to do and to give, as told to `watcher`."""
        return WorkerLoad(
            state=self.state,
            waiting_requests=self.loop.waiting_requests,
            waiting_tokens=self._waiting_tokens(),
            running_sequences=self.loop.running_sequences,
            running_context_tokens=self.loop.running_context_tokens,
            blocks=self.ledger.counts(),
            step=self.loop.num_steps,
            last_submit=self._sessions.last_submit(watcher) if self._sessions else SubmitNumber(0),
            prefill_tokens_per_s=self.loop.prefill_tokens_per_s,
            decode_step_s=self.loop.decode_step_s,
            prefill_slowdown=self.loop.pace.prefill_slowdown,
            decode_slowdown=self.loop.pace.decode_slowdown,
        )

    def block_counts(self) -> BlockCounts:
        return self.ledger.counts()

    def drain(self, deadline_s: float) -> None:
        """Take no new work, finish what runs, and end: `ended` returns then. What is not finished after
        `deadline_s` goes back to its routers, which place it elsewhere. Asked again, the earliest deadline
        counts."""
        if self.state in (WorkerState.READY, WorkerState.DRAINING):
            self.state = WorkerState.DRAINING
            self.calls.draining = True
            if isinstance(self.loop, DecodeLoop):
                self.loop.draining = True
            self._departure.call(deadline_s)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Break all streams and end the loop; every hold is released."""
        self.state = WorkerState.STOPPED
        if self._server is not None:
            await self._server.stop(grace_s)
        if self._running is not None:
            await cancel_and_wait(self._running)
        await self._transports.close()
        await self._rpc.close()
        await self._executor.close()
        await self._tracer.close()

    async def ended(self) -> None:
        """Wait until the engine loop is over or will never go on, and raise why. `drain` and `stop` end it in
        good order."""
        await self._over.wait()
        if self._failure is not None:
            raise self._failure

    def check(self) -> None:
        """Raise what ended the loop, if it has ended, and AssertionError when the ledger does not balance."""
        if self._failure is not None:
            raise self._failure
        self.ledger.check_integrity()

    def inspect(self) -> IntegrityReport:
        """Check everything that owns something here, and name all who hold blocks."""
        owners = {
            "block allocator": self._allocator.check_integrity,
            "block ledger": self.ledger.check_integrity,
            "prefill calls": self.calls.check_integrity,
            "holds": self._check_holds,
        }
        if isinstance(self.loop, DecodeLoop):
            owners["live requests"] = self.loop.check_integrity
        holders = [Holder(hold.owner, _kind(hold), len(hold.block_ids)) for hold in self.ledger.holds]
        return inspect(owners, tuple(holders))

    def _check_holds(self) -> None:
        """Raises AssertionError when a hold belongs to no living call."""
        living = set(self.calls.holds) | set(self.loop.holds if isinstance(self.loop, DecodeLoop) else ())
        stray = [hold.owner for hold in self.ledger.holds if hold not in living and not hold.retiring]
        assert not stray, f"held by no living call: {', '.join(stray)}"

    async def _run(self, server: RpcServer) -> None:
        """The engine loop, until it has been drained. When it fails or its engine hangs, all streams break at
        once: nobody waits for a worker that will never step again."""
        looping = asyncio.create_task(self.loop.run())
        watching = asyncio.create_task(self._executor.watch())
        leaving = asyncio.create_task(self._departure.over())
        tasks = (looping, watching, leaving)
        has_left = False
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            self._failure = next(task for task in tasks if task.done()).exception()
            has_left = self._failure is None
            if has_left:
                self.state = WorkerState.STOPPED
            else:  # a death, which nobody is to excuse
                self._over.set()
            await server.stop(0.0)
            if has_left:  # who waits for the end may kill the process then
                await self._tracer.close()
        finally:
            if not has_left:
                self._over.set()
            for task in tasks:
                task.cancel()
            try:
                await outlast(*tasks)
            finally:
                for task in tasks:  # what fails after the first failure is no news
                    if task.done() and not task.cancelled():
                        task.exception()
                await self.loop.over()
                self._over.set()  # who has left in good order holds nothing any more

    def _give_back(self) -> None:
        self.calls.give_back()
        if isinstance(self.loop, DecodeLoop):
            self.loop.give_back()

    async def _emptied(self) -> None:
        """Nothing is left here, and the routers have been told so, those that still listen."""
        await self.calls.emptied()
        if isinstance(self.loop, DecodeLoop):
            await self.loop.emptied()
        if self._sessions is not None:
            with suppress(TimeoutError):
                async with self._clock.timeout(FAREWELL_S):
                    await self._sessions.flushed()

    def _make_loop(self, engine: Engine, clock: Clock, settings: WorkerSettings) -> Loop:
        if self.role is Role.PREFILL:
            return PrefillLoop(
                engine.info,
                engine.cost,
                self._executor,
                self.ledger,
                self.calls,
                clock,
                self.metrics,
                self._work,
                settings.decode.step_budget_s,
            )
        decode = settings.decode
        if self.role is Role.UNSPLIT:
            decode = replace(decode, local_prefill_share=1.0)
        loop = DecodeLoop(
            self.worker_id,
            engine.info,
            engine.cost,
            self._executor,
            self.ledger,
            self.calls,
            self._transports,
            self._rpc,
            clock,
            self.metrics,
            self._work,
            decode,
            self._tracer,
        )
        self._sessions = SessionServer(self.incarnation, loop, clock, self.metrics)
        return loop

    def _handlers(self) -> Mapping[Call, Handler]:
        handlers: dict[Call, Handler] = {
            Call.WATCH: self._watches.serve,
            Call.PREFILL: self.calls.serve,
            Call.KV: self._transports.kv_handler,
        }
        if self._sessions is not None:
            handlers[Call.SESSION] = self._sessions.serve
        return handlers

    def _hello(self, cost: StepCost, prefill_share: float) -> Hello:
        root = ChainRoot(self._info.fingerprint)
        return Hello(
            self.worker_id, self.incarnation, self.role, self._info, root.digest, cost, prefill_share
        )

    def _waiting_tokens(self) -> int:
        own = self.loop.waiting_tokens if isinstance(self.loop, DecodeLoop) else 0
        return own + self.calls.num_waiting_tokens

    def _oldest_waiting_s(self) -> float:
        now = self._clock.now()
        return now - min(self.loop.waiting_since, default=now)

    def _export_gauges(self) -> None:
        self.metrics.waiting_requests.set_function(lambda: self.loop.waiting_requests)
        self.metrics.oldest_waiting_seconds.set_function(self._oldest_waiting_s)
        self.metrics.backlog_tokens.set_function(self._waiting_tokens)
        self.metrics.active_sequences.set_function(lambda: self.loop.running_sequences)
        self.metrics.follow_blocks(self.ledger.counts)


def _kind(hold: BlockHold) -> str:
    return "retiring" if hold.retiring else hold.kind.value
