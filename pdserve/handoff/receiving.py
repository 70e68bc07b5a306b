"""The decode worker's end of the hand-off: one `Prefill` call.

The life of one fetch:

1. What the decode worker already holds of the prompt is pinned by the caller; `PrefillOpen` is sent.
2. At `Starting` the listener reserves the whole prompt, or cannot: `Reserved` or `Busy`. After `Busy` the
   source asks again later.
3. Each `Segment` is copied into the own blocks by our own hand, digested there and acknowledged; it may be
   some layers only. The next copy is lined up while one goes on. Blocks that are whole, with all their
   predecessors, may enter the prefix cache at once.
4. `FirstToken` is passed on as soon as it is read; it never waits for a copy.
5. When `Sealed` has come and every segment is verified, nothing writes to the blocks any more and the
   listener is told: now the sequence may start.
6. `End` goes both ways. However the call ends, when `run` has returned nothing of it is left.

The source says something every second (`Working` when there is nothing else): a call whose source is silent
is given up.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.errors import ProtocolViolation, StreamBroken, TransferCorrupt, error_from_info
from pdserve.contract.messages import (
    SILENCE_S,
    Ack,
    Busy,
    End,
    FirstToken,
    PrefillOpen,
    Reserved,
    Sealed,
    Segment,
    Starting,
    TransportChoice,
    Working,
)
from pdserve.contract.ports import Call, Clock, MessageStream, Rpc
from pdserve.contract.tokens import num_tokens
from pdserve.handoff.ledger import BlockHold
from pdserve.handoff.proof import Proof
from pdserve.handoff.transfer_times import TransferTimes
from pdserve.handoff.transports.base import SegmentReceiver
from pdserve.handoff.transports.negotiation import Transports
from pdserve.metrics import WorkerMetrics
from pdserve.tasks import TaskScope, task_scope

MAX_WAITING_SEGMENTS = 1024
"""Far more than any source may have unacknowledged."""


MAX_LINED_UP = 1
"""Copies that wait behind the one that goes on, before the one that is about to: enough that the transfer
thread never waits for us, and so few that the copies of several prompts take turns."""


@dataclass(slots=True)
class FetchStats:
    """What one fetch moved. Seconds and bytes."""

    transport: str = ""
    """Empty before the source has chosen one."""
    transport_reason: str = ""
    """Why that one and none before it in the order."""
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    """Sum over segments: from taking the announcement to the verified copy."""
    transfer_hidden_s: float = 0.0
    transfer_exposed_s: float = 0.0
    """See `Overlap`; known when everything is verified."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    """As seen from here, until the source tells its own with Sealed."""
    cached_tokens_at_source: int = 0


class FetchListener(Protocol):
    """What the decode worker does as a fetch goes on. Called on the event loop; must not block."""

    def reserve(self) -> int | Busy:
        """Hold blocks for the whole prompt. The number of leading blocks whose KV is here already, or, when
        there is no room now, when to ask again."""
        ...

    def first_token(self, first: FirstToken, stats: FetchStats) -> None: ...

    def over(self) -> bool:
        """Whether the request has ended, for instance with its first token; then nothing more is needed."""
        ...

    def sealed(self, stats: FetchStats) -> None:
        """Every block of the prompt is verified in the own pool."""
        ...


class _Copy(NamedTuple):
    """A segment that is being copied."""

    segment: Segment
    begun_at: float
    verified: asyncio.Task[bool]


class PrefillFetch:
    """One attempt to get a prompt's KV from `address` into the blocks of `hold`."""

    def __init__(
        self,
        address: str,
        request: PrefillOpen,
        root: ChainRoot,
        hold: BlockHold,
        listener: FetchListener,
        rpc: Rpc,
        transports: Transports,
        clock: Clock,
        metrics: WorkerMetrics,
        block_size: int,
        num_layers: int,
    ) -> None:
        self._address = address
        self._request = request
        self._root = root
        self._hold = hold
        self._listener = listener
        self._rpc = rpc
        self._transports = transports
        self._clock = clock
        self._metrics = metrics
        self._block_size = block_size
        self._num_layers = num_layers
        self.stats = FetchStats()
        self._segments: asyncio.Queue[Segment | Sealed] = asyncio.Queue()  # Sealed behind all of them
        self._copies: asyncio.Queue[_Copy] = asyncio.Queue(MAX_LINED_UP)  # begun, and not answered
        self._asked_again: set[int] = set()  # segments that did not match
        self._last_copy_at = 0.0  # ended
        self._proof = Proof(0, num_layers, 0)  # until the prompt is reserved
        self._times = TransferTimes()
        self._stage_began_at = 0.0  # of waiting for our turn, then of the computation
        self._has_first_token = False
        self._sealed: Sealed | None = None
        self._computed_at = 0.0  # the prompt's last forward pass ended, known once Sealed has come
        self._proven = asyncio.Event()  # all of it is verified

    async def run(self) -> None:
        """Fetch. Raises the PdserveError that ended the call otherwise."""
        self._stage_began_at = self._clock.now()
        stream = await self._rpc.open(self._address, Call.PREFILL)
        try:
            await stream.send(self._request)
            choice, num_held = await self._until_room(stream)
            self._proof = Proof(len(self._hold.block_ids), self._num_layers, num_held)
            async with self._receiver(choice) as receiver:
                # in_use: whatever happens, blocks are given back only after the receiver has stopped writing.
                with self._hold.in_use():
                    await stream.send(Reserved(num_held))
                    await self._receive(stream, receiver)
                self._listener.sealed(self.stats)
                await stream.send(End())
                await self._until_end(stream)
        finally:
            stream.cancel()

    async def _next(self, stream: MessageStream) -> object:
        """The source's next message but signs of life. Raises StreamBroken when it is silent for too long."""
        while True:
            try:
                async with self._clock.timeout(SILENCE_S):
                    message = await stream.receive()
            except TimeoutError:
                raise StreamBroken(f"{self._address} said nothing for {SILENCE_S:g} s") from None
            if not isinstance(message, Working):
                return message

    async def _until_room(self, stream: MessageStream) -> tuple[TransportChoice, int]:
        """Until the source is about to start and the whole prompt is reserved here: the transport, and how
        many leading blocks are here already."""
        while True:
            match await self._next(stream):
                case Starting(transport, cached_tokens):
                    answer = self._listener.reserve()
                    if isinstance(answer, int):
                        self.stats.transport = transport.name
                        self.stats.transport_reason = transport.reason
                        self.stats.cached_tokens_at_source = cached_tokens
                        self.stats.queue_s = self._end_stage()
                        return transport, answer
                    await stream.send(answer)
                case End(error) if error is not None:
                    raise error_from_info(error)
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} came before Reserved")

    @contextlib.asynccontextmanager
    async def _receiver(self, choice: TransportChoice) -> AsyncIterator[SegmentReceiver]:
        receiver = await self._transports.connect(choice, self._address)
        try:
            yield receiver
        finally:
            await receiver.close()

    async def _receive(self, stream: MessageStream, receiver: SegmentReceiver) -> None:
        """Until Sealed has come and every segment is verified."""
        async with task_scope() as tasks:
            reader = tasks.create_task(self._read(stream))
            copier = tasks.create_task(self._copy_segments(stream, receiver, tasks))
            answerer = tasks.create_task(self._answer_segments(stream))
            await self._proven.wait()
            for task in (reader, copier, answerer):
                task.cancel()

    async def _read(self, stream: MessageStream) -> None:
        """Nothing here waits for a copy."""
        while True:
            match await self._next(stream):
                case Segment() as segment:
                    self._announce(segment)
                case FirstToken() as first:
                    self._pass_on(first)
                case Sealed() if self._sealed is not None:
                    self._metrics.count_stale(Sealed)
                case Sealed() as sealed:
                    self._require_possible(sealed)
                    self._sealed = sealed
                    self._computed_at = self._clock.now() - sealed.since_computed_s
                    self._segments.put_nowait(sealed)
                    self._conclude()
                case End(error) if error is not None:
                    raise error_from_info(error)
                case End():
                    raise ProtocolViolation("the source ended the call before every segment was verified")
                case other:
                    raise ProtocolViolation(f"{type(other).__name__} came after Reserved")

    def _announce(self, segment: Segment) -> None:
        if not 0 <= segment.index < self._max_segments:
            raise ProtocolViolation(f"segment {segment.index} came, of at most {self._max_segments}")
        if self._segments.qsize() >= MAX_WAITING_SEGMENTS:
            raise ProtocolViolation(f"more than {MAX_WAITING_SEGMENTS} segments came without an answer")
        self._segments.put_nowait(segment)

    def _require_possible(self, sealed: Sealed) -> None:
        if not 0 <= sealed.num_segments <= self._max_segments:
            raise ProtocolViolation(
                f"the source sealed {sealed.num_segments} segments, of at most {self._max_segments}"
            )

    @property
    def _max_segments(self) -> int:
        """Each brings at least one layer of one block."""
        return len(self._hold.block_ids) * self._num_layers

    def _pass_on(self, first: FirstToken) -> None:
        if self._has_first_token:
            self._metrics.count_stale(FirstToken)
        else:
            self._has_first_token = True
            self.stats.prefill_s = self._end_stage()
            self._listener.first_token(first, self.stats)

    def _end_stage(self) -> float:
        """How long it took. The next one begins."""
        now = self._clock.now()
        seconds, self._stage_began_at = now - self._stage_began_at, now
        return seconds

    async def _until_end(self, stream: MessageStream) -> None:
        """Nothing but End matters any more: what was said twice is dropped."""
        while not isinstance(message := await self._next(stream), End):
            self._metrics.count_stale(type(message))
        if message.error is not None:
            raise error_from_info(message.error)

    async def _copy_segments(
        self, stream: MessageStream, receiver: SegmentReceiver, tasks: TaskScope
    ) -> None:
        while True:
            message = await self._segments.get()
            if isinstance(message, Sealed) or self._proof.is_under_way(message.index):
                await self._copies.join()  # what is under way decides
            match message:
                case Sealed(num_segments):
                    for index in set(range(num_segments)) - self._asked_again:
                        if not self._proof.has(index):  # it never came
                            await stream.send(Ack(index, ok=False))
                case Segment(index) if self._proof.has(index):  # said twice: the answer may have been lost
                    self._metrics.count_repeated_segment(self.stats.transport)
                    await stream.send(Ack(index))
                case Segment() as segment:
                    await self._copies.put(self._begin_copy(segment, receiver, tasks))

    def _begin_copy(self, segment: Segment, receiver: SegmentReceiver, tasks: TaskScope) -> _Copy:
        self._proof.begin(segment)
        last = segment.first_block + segment.num_blocks
        copy = receiver.receive(segment, self._hold.block_ids[segment.first_block : last])
        return _Copy(segment, self._clock.now(), tasks.create_task(copy))

    async def _answer_segments(self, stream: MessageStream) -> None:
        while True:
            copy = await self._copies.get()
            ok = await copy.verified
            self._note_copy(copy, ok)
            await stream.send(Ack(copy.segment.index, ok))
            if ok:
                self._prove(copy.segment)
                self._conclude()
            else:
                self._proof.fail(copy.segment)
                self._asked_again.add(copy.segment.index)
            self._copies.task_done()

    def _note_copy(self, copy: _Copy, ok: bool) -> None:
        begun_at = max(copy.begun_at, self._last_copy_at)  # not while it waited for the one before it
        ended_at = self._last_copy_at = self._clock.now()
        num_bytes = copy.segment.num_bytes
        self._metrics.observe_segment(self.stats.transport, num_bytes, ended_at - begun_at, ok)
        if ok:
            self.stats.transfer_bytes += num_bytes
            self.stats.transfer_s += ended_at - begun_at
            self._times.add(begun_at, ended_at, num_bytes)

    def _prove(self, segment: Segment) -> None:
        self._proof.add(segment)
        num_proven_tokens = self._proof.num_proven_blocks * self._block_size
        self._hold.publish(self._root, self._request.tokens, min(num_proven_tokens, self._num_tokens))

    @property
    def _num_tokens(self) -> int:
        return num_tokens(self._request.tokens)

    def _conclude(self) -> None:
        """Note that everything is here, if it is."""
        sealed = self._sealed
        if sealed is None or self._proof.num_segments < sealed.num_segments:
            return
        if self._proof.digest != sealed.digest:
            raise TransferCorrupt("the sealed digest does not match the segments")
        if not self._proof.is_whole and not self._listener.over():
            raise ProtocolViolation("the source sealed fewer blocks than the prompt has")
        self.stats.queue_s, self.stats.prefill_s = sealed.queue_s, sealed.prefill_s
        self._note_overlap()
        self._proven.set()

    def _note_overlap(self) -> None:
        overlap = self._times.overlap(self._computed_at, self._clock.now())
        if overlap is not None:
            self.stats.transfer_hidden_s = overlap.hidden_s
            self.stats.transfer_exposed_s = overlap.exposed_s
            self._metrics.observe_overlap(
                self.stats.transport, overlap.hidden_s, overlap.exposed_s, overlap.share_ahead
            )
