"""The source's end of the hand-off: how any worker answers `Prefill`.

The life of one call here:

1. `PrefillOpen` arrives; who and what it means is checked; the job joins `PrefillSource.jobs`, QUEUED.
2. The engine loop of the worker takes the job when it is next in line and its blocks are reserved here;
   `Starting` asks the decode worker to reserve too. `Busy` puts the job back, `Reserved` makes it READY.
3. The loop computes chunk by chunk. Each finished run of blocks leaves as a `Segment` while the next
   chunk is computed, and those of the last chunk by groups of layers while its later layers are; at most
   `window` segments are unacknowledged.
4. The first token leaves at once, past all segments.
5. `Sealed` follows the last segment. The decode worker acknowledges, asks again for what arrived corrupt,
   and sends its End; ours answers it.
6. However the call ends, `serve` gives the job's blocks back: the named ones stay as prefix cache.

All the while the decode worker is told once a second that the call is alive (`Working`), and what it owes is
waited for with a bound: a message that is lost ends the call, never strands it.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.errors import (
    Draining,
    ErrorCode,
    FingerprintMismatch,
    PdserveError,
    ProtocolViolation,
    Replayed,
    StaleIncarnation,
    Stalled,
    StreamBroken,
    TransferCorrupt,
    error_from_info,
)
from pdserve.contract.ids import Incarnation
from pdserve.contract.messages import (
    SIGN_OF_LIFE_S,
    Ack,
    Busy,
    End,
    PrefillDown,
    PrefillOpen,
    Reserved,
    Sealed,
    Segment,
    Starting,
    Working,
)
from pdserve.contract.ports import Clock, LayersDone, MessageStream
from pdserve.contract.tracing import NO_TRACER, SpanKind, Tracer
from pdserve.contract.work import ModelInfo
from pdserve.handoff.bounds import check_prefill_open
from pdserve.handoff.digest import combine
from pdserve.handoff.ledger import BlockHold, BlockLedger
from pdserve.handoff.prefill_job import JobState, PrefillJob
from pdserve.handoff.prefill_trace import end_trace, names_of
from pdserve.handoff.shipping import Shipment
from pdserve.handoff.transports.base import SegmentSender
from pdserve.handoff.transports.negotiation import Transports
from pdserve.metrics import WorkerMetrics
from pdserve.tasks import task_scope


@dataclass(frozen=True, slots=True)
class SendingSettings:
    window_segments: int = 8
    """How many segments may be unacknowledged."""
    max_segment_bytes: int | None = None
    """None: what suits the transport."""
    answer_patience_s: float = 0.1
    """How long a decode worker may take to answer Starting before other requests are started meanwhile."""
    answer_timeout_s: float = 10.0
    """How long it may owe anything, that answer, an Ack or its End, before the call is given up."""
    max_resends: int = 3
    """How often one call may ask for segments again before it is given up as corrupt."""


class PrefillSource:
    """Serves the Prefill calls of one worker. `wake` is called whenever the engine loop may have work."""

    def __init__(
        self,
        transports: Transports,
        info: ModelInfo,
        incarnation: Incarnation,
        clock: Clock,
        metrics: WorkerMetrics,
        wake: Callable[[], None],
        settings: SendingSettings | None = None,
        tracer: Tracer = NO_TRACER,
    ) -> None:
        self.jobs: list[PrefillJob] = []  # all open calls, oldest first
        self.draining = False
        """Whoever calls is refused."""
        self._given_back = asyncio.Event()  # all calls are to end
        self._emptied = asyncio.Event()
        self._transports = transports
        self._info = info
        self._incarnation = incarnation
        self._clock = clock
        self._metrics = metrics
        self._wake = wake
        self._settings = settings or SendingSettings()
        self._tracer = tracer

    def max_segment_layers(self, sender: SegmentSender) -> int:
        """The size of segments in their unit, one layer of one block."""
        max_bytes = self._settings.max_segment_bytes or sender.max_segment_bytes
        return max_bytes // (self._info.block_bytes // self._info.num_layers)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens still to be computed for all open calls."""
        return sum(job.num_to_compute for job in self.jobs)

    @property
    def num_waiting_requests(self) -> int:
        """Open calls whose turn has not come, or whose decode worker has not answered yet."""
        return len(self.in_state(JobState.QUEUED)) + len(self.in_state(JobState.STARTING))

    @property
    def waiting_since(self) -> list[float]:
        """When each of these calls came."""
        waiting = (JobState.QUEUED, JobState.STARTING)
        return [job.queued_at for job in self.jobs if job.state in waiting]

    def in_state(self, state: JobState) -> list[PrefillJob]:
        """The jobs in `state`, oldest first."""
        return [job for job in self.jobs if job.state is state]

    @property
    def num_tokens_in_line(self) -> int:
        """Prompt tokens still to be computed of the jobs that are ready or will be in a moment."""
        started = [*self.in_state(JobState.READY), *self.in_state(JobState.STARTING)]
        return sum(job.num_to_compute for job in started if job.state is JobState.READY or not job.overdue)

    def start_next(self, ledger: BlockLedger) -> PrefillJob | None:
        """Reserve the whole prompt of the job whose turn it is; None when none waits or none fits.

        Called by the engine loop between steps. The most urgent waits for room rather than being passed:
        otherwise a long prompt would starve behind short ones. Nothing more is reserved for a decode worker
        that owes an answer.
        """
        now = self._clock.now()
        silent = {job.request.decode_worker_id for job in self.in_state(JobState.STARTING) if job.overdue}
        waiting = [
            job
            for job in self.in_state(JobState.QUEUED)
            if not job.resting and job.request.decode_worker_id not in silent
        ]
        if not waiting:
            return None
        job = min(waiting, key=lambda job: (job.request.priority, job.queued_at))
        hold = ledger.open(f"prefill {job.request.request_id}/{job.request.attempt}")
        num_cached = hold.adopt_prefix(job.root, job.request.tokens) * self._info.block_size
        if job.num_blocks - len(hold.block_ids) > ledger.num_available:
            hold.release()
            return None
        hold.grow_to(job.num_blocks)
        job.start(hold, num_cached, now)
        return job

    def follow_layers(self, ending: Sequence[PrefillJob]) -> LayersDone | None:
        """What a step is to tell that computes the prompts of `ending` to their ends: so their last KV leaves
        while later layers are computed. None when nobody need know."""
        if not ending:
            return None

        def layers_done(num_layers: int) -> None:
            for job in ending:
                if job in self.jobs:  # else its call ended during the step
                    job.layers_are_done(num_layers)

        return layers_done

    @property
    def holds(self) -> list[BlockHold]:
        """Of all jobs that have reserved."""
        return [job.hold for job in self.jobs if job.state is not JobState.QUEUED]

    def check_integrity(self) -> None:
        """Raises AssertionError when a job that has reserved holds nothing any more."""
        for job in self.jobs:
            name = f"{job.request.request_id}/{job.request.attempt}"
            released = job.state is not JobState.QUEUED and job.hold.released
            assert not released, f"the prefill of {name} is {job.state} with a hold that is released"

    def give_back(self) -> None:
        """End all calls: the routers place their requests elsewhere."""
        self._given_back.set()

    async def emptied(self) -> None:
        """Wait until no call is open."""
        while self.jobs:
            self._emptied.clear()
            await self._emptied.wait()

    async def serve(self, stream: MessageStream) -> None:
        """Handler of `Call.PREFILL`."""
        opened = await stream.receive()
        if not isinstance(opened, PrefillOpen):
            raise ProtocolViolation(f"a Prefill stream starts with PrefillOpen, not {type(opened).__name__}")
        self._check(opened)
        root = ChainRoot(opened.fingerprint, opened.cache_salt)
        job = PrefillJob(opened, root, self._info.block_size, self._info.num_layers, self._clock.now())
        span = self._tracer.begin("prefill worker", SpanKind.SERVER, opened.trace, names_of(opened))
        outcome = ErrorCode.CANCELLED.value
        try:
            with self._enrolled(job):
                await _PrefillCall(self, job, stream).run()
            outcome = "sealed"
        except StreamBroken:  # the decode worker has given up, or is gone
            raise
        except PdserveError as error:
            outcome = error.info.code.value
            raise
        finally:
            self._metrics.count_prefill_call(outcome)
            end_trace(span, job, outcome, self._clock.now())

    def _check(self, opened: PrefillOpen) -> None:
        if opened.source_incarnation != self._incarnation:
            raise StaleIncarnation("this worker was restarted since the router learned of it")
        if opened.fingerprint != self._info.fingerprint:
            raise FingerprintMismatch(
                f"the KV of {opened.decode_worker_id} ({opened.fingerprint}) is not that of this worker "
                f"({self._info.fingerprint}, blocks of {self._info.block_size} tokens): run the same model, "
                "revision, dtype, block_size and version of pdserve on both"
            )
        if any(_is_same_call(job.request, opened) for job in self.jobs):
            raise Replayed(f"attempt {opened.attempt} of {opened.request_id} has a Prefill call here already")
        check_prefill_open(opened, self._info)
        if self.draining:
            raise Draining("the prefill worker is draining")

    @contextlib.contextmanager
    def _enrolled(self, job: PrefillJob) -> Iterator[None]:
        self.jobs.append(job)
        self._wake()
        try:
            yield
        finally:
            self.jobs.remove(job)
            if job.state is not JobState.QUEUED:
                job.hold.release()
            if not self.jobs:
                self._emptied.set()
            self._wake()


def _is_same_call(known: PrefillOpen, opened: PrefillOpen) -> bool:
    return (known.decode_worker_id, known.request_id, known.attempt) == (
        opened.decode_worker_id,
        opened.request_id,
        opened.attempt,
    )


class _PrefillCall:
    """The coroutines of one call: one reads, one ships segments, one sends the first token."""

    def __init__(self, source: PrefillSource, job: PrefillJob, stream: MessageStream) -> None:
        self._source = source
        self._settings = source._settings
        self._job = job
        self._stream = stream
        self._sending = asyncio.Lock()
        self._is_asked = False  # Starting has been sent, and is not answered yet
        self._answered = asyncio.Event()  # Reserved or Busy has come
        self._finished = asyncio.Event()  # the decode worker's End has come
        self._rest_s = 0.0  # how long the decode worker asked us to wait when it was busy
        self._num_resends = 0
        self._is_sealed = False
        self._digests: dict[int, int] = {}  # segment index -> digest

    async def run(self) -> None:
        async with task_scope() as tasks:
            reader = tasks.create_task(self._read())
            life = tasks.create_task(self._show_life())
            recall = tasks.create_task(self._heed_recall())
            async with self._agreed_transport() as sender:
                first_token = tasks.create_task(self._send_first_token())
                await self._ship(sender)
                await first_token
                self._is_sealed = True
                await self._send(self._sealed())
                await self._ship_again_until_finished(sender)
            await reader
            life.cancel()
            recall.cancel()
            await self._send(End())

    @contextlib.asynccontextmanager
    async def _agreed_transport(self) -> AsyncIterator[SegmentSender]:
        """Wait for our turn until both sides have reserved; then the transport to ship with."""
        job = self._job
        accepted = self._source._transports.choose(job.request.transports)
        try:
            while job.state is not JobState.READY:
                await self._until(lambda: job.state is JobState.STARTING)
                self._answered.clear()
                self._is_asked = True
                await self._send(Starting(accepted.choice, job.num_cached))
                await self._answer()
                await self._wait_out_busy()
            yield accepted.sender
        finally:
            await accepted.sender.close()

    async def _answer(self) -> None:
        if await self._is_answered_within(self._settings.answer_patience_s):
            return
        self._job.overdue = True
        self._source._wake()
        if not await self._is_answered_within(self._settings.answer_timeout_s):
            raise self._silence("did not answer Starting")

    async def _is_answered_within(self, seconds: float) -> bool:
        try:
            async with self._source._clock.timeout(seconds):
                await self._answered.wait()
        except TimeoutError:
            return False
        return True

    async def _wait_out_busy(self) -> None:
        """A job that was put back is offered to the loop again when its time has come."""
        if self._job.state is JobState.QUEUED:
            await self._source._clock.sleep(self._rest_s)
            self._job.resting = False
            self._source._wake()

    async def _read(self) -> None:
        while True:
            match await self._stream.receive():
                case Reserved() | Busy() as answer if not self._is_asked:
                    self._source._metrics.count_stale(type(answer))
                case Reserved(first_missing_block):
                    self._is_asked = False
                    if not 0 <= first_missing_block <= self._job.num_blocks:
                        raise ProtocolViolation(
                            f"a prompt of {self._job.num_blocks} blocks cannot lack those from "
                            f"{first_missing_block} on"
                        )
                    self._job.reserved(first_missing_block)
                    self._count_prefix()
                    self._answered.set()
                    self._source._wake()
                case Busy(retry_after_ms):
                    self._is_asked = False
                    self._rest_s = retry_after_ms / 1000
                    self._job.put_back()
                    self._answered.set()
                    self._source._wake()
                case Ack(index, ok):
                    self._acknowledge(index, ok)
                case End(error):
                    if error is not None:
                        raise error_from_info(error)
                    if not self._is_sealed:
                        raise ProtocolViolation("the decode worker said End before the KV was sealed")
                    self._finished.set()
                    self._job.changed.set()
                    return
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} does not belong on a Prefill stream")

    def _count_prefix(self) -> None:
        """Once per call, however often the decode worker was busy before."""
        self._source._metrics.prefix_query_tokens.inc(self._job.num_prompt)
        self._source._metrics.prefix_hit_tokens.inc(self._job.num_cached)

    def _acknowledge(self, index: int, ok: bool) -> None:
        if index not in self._digests:
            raise ProtocolViolation(f"segment {index} was acknowledged before it was sent")
        if not ok:
            self._num_resends += 1
            self._source._metrics.segments_resent.inc()
            if self._num_resends > self._settings.max_resends:
                raise TransferCorrupt(f"segments arrived corrupt {self._num_resends} times")
        self._job.acknowledge(index, ok)

    async def _ship(self, sender: SegmentSender) -> None:
        job = self._job
        max_layers = self._source.max_segment_layers(sender)
        while not job.all_shipped:
            shipment = job.next_shipment(self._settings.window_segments, max_layers)
            if shipment is None:
                await self._change(owed="acknowledge a segment" if job.num_unacknowledged else None)
            else:
                await self._send(await self._segment(sender, shipment))

    async def _ship_again_until_finished(self, sender: SegmentSender) -> None:
        while not self._finished.is_set():
            if self._job.all_shipped:
                await self._change(owed="end the call")
            else:
                await self._ship(sender)

    async def _segment(self, sender: SegmentSender, shipment: Shipment) -> Segment:
        last = shipment.first_block + shipment.num_blocks
        segment = await sender.send(
            shipment.index,
            shipment.first_block,
            self._job.hold.block_ids[shipment.first_block : last],
            shipment.layers,
        )
        self._digests[shipment.index] = segment.digest
        return segment

    async def _send_first_token(self) -> None:
        await self._until(lambda: self._job.state is JobState.COMPUTED)
        if self._job.first_token is not None:
            await self._send(self._job.first_token)

    def _sealed(self) -> Sealed:
        job = self._job
        return Sealed(
            num_segments=job.num_segments,
            digest=combine(self._digests.values()),
            queue_s=job.started_at - job.queued_at,
            prefill_s=job.computed_at - job.started_at,
            since_computed_s=self._source._clock.now() - job.computed_at,
        )

    async def _send(self, message: PrefillDown) -> None:
        async with self._sending:
            await self._stream.send(message)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._change()

    async def _change(self, owed: str | None = None) -> None:
        """Wait for the job's next change. Several coroutines wait: each looks again after every change.
        Raises Stalled when none comes and it is the decode worker's turn, who has to do `owed`."""
        try:
            async with self._source._clock.timeout(self._settings.answer_timeout_s if owed else None):
                await self._job.changed.wait()
        except TimeoutError:
            raise self._silence(f"did not {owed}") from None
        self._job.changed.clear()

    async def _heed_recall(self) -> None:
        await self._source._given_back.wait()
        raise Draining("the prefill worker ends before the call does")

    async def _show_life(self) -> None:
        while True:
            await self._source._clock.sleep(SIGN_OF_LIFE_S)
            await self._send(Working())

    def _silence(self, what: str) -> Stalled:
        timeout_s = self._settings.answer_timeout_s
        return Stalled(f"{self._job.request.decode_worker_id} {what} within {timeout_s:g} s")
