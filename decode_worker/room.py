"""Which requests get blocks, and which give them up: the decode worker's admission and preemption.

A waiting request pins the cached prefix of its prompt; whoever needs room takes these pins first, the newest
request's before an older one's. A request reserves its whole prompt at once, and only while every running
sequence keeps room to grow. When a running sequence finds none, the newest reservation goes back to the
router, then the newest running sequence; the oldest never.
"""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from decode_worker.request import DecodeRequest, Phase, TokenSink
from decode_worker.scheduler import choose_victim, may_reserve
from pdserve.contract.ids import RequestId, SubmitNumber
from pdserve.contract.ports import Clock
from pdserve.handoff.ledger import BlockLedger
from pdserve.metrics import WorkerMetrics

ASK_AGAIN_MS = 20
MAX_ASK_AGAIN_MS = 400
"""When a prefill worker whose request finds no room is to ask again: this often for the oldest such request,
and at least this often for any."""


class LiveRequests:
    """All submissions that have not ended, oldest first."""

    def __init__(self) -> None:
        self._requests: dict[tuple[TokenSink, SubmitNumber], DecodeRequest] = {}
        self._attempts: set[tuple[RequestId, int]] = set()
        self._emptied = asyncio.Event()

    def __iter__(self) -> Iterator[DecodeRequest]:
        return iter(list(self._requests.values()))

    def __reversed__(self) -> Iterator[DecodeRequest]:
        return reversed(self._requests.values())

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, sink: TokenSink, number: SubmitNumber) -> DecodeRequest | None:
        return self._requests.get((sink, number))

    def add(self, request: DecodeRequest) -> None:
        self._requests[request.sink, request.number] = request
        self._attempts.add((request.submit.request_id, request.submit.attempt))

    def remove(self, request: DecodeRequest) -> None:
        del self._requests[request.sink, request.number]
        self._attempts.remove((request.submit.request_id, request.submit.attempt))
        if not self._requests:
            self._emptied.set()

    def has_attempt(self, request_id: RequestId, attempt: int) -> bool:
        """Whether this attempt is among them, whoever submitted it."""
        return (request_id, attempt) in self._attempts

    async def emptied(self) -> None:
        """Wait until there is none."""
        while self._requests:
            self._emptied.clear()
            await self._emptied.wait()

    def put_last(self, request: DecodeRequest) -> None:
        """As if it had come after all others."""
        self.remove(request)
        self.add(request)

    def in_phase(self, phase: Phase) -> list[DecodeRequest]:
        """The requests in `phase`, oldest first."""
        return [request for request in self._requests.values() if request.phase is phase]


@dataclass(frozen=True, slots=True)
class RoomSettings:
    growth_reserve_blocks: int = 1
    """Blocks kept free for each running sequence when a new request reserves."""
    starvation_s: float = 1.0
    """A request that has found no room for this long keeps younger ones from reserving before it."""


class Room:
    """Gives blocks to the requests of one worker."""

    def __init__(
        self,
        requests: LiveRequests,
        ledger: BlockLedger,
        block_size: int,
        clock: Clock,
        metrics: WorkerMetrics,
        preempt: Callable[[DecodeRequest], None],
        computes_for_others: Callable[[], bool],
        settings: RoomSettings,
    ) -> None:
        """`preempt` sends a request back to its router. `computes_for_others` says whether blocks are held
        for other workers' prompts; those come back by themselves."""
        self.kept_for: DecodeRequest | None = None
        """The only request that may reserve; None: every request."""
        self._requests = requests
        self._ledger = ledger
        self._block_size = block_size
        self._clock = clock
        self._metrics = metrics
        self._preempt = preempt
        self._computes_for_others = computes_for_others
        self._settings = settings

    def pin(self, request: DecodeRequest) -> None:
        """Hold what the prefix cache has of the prompt."""
        num_blocks = request.hold.adopt_prefix(request.root, request.prefill_tokens)
        request.num_computed = num_blocks * self._block_size
        request.timings = replace(request.timings, cached_prompt_tokens_decode=request.num_computed)

    def reserve(self, request: DecodeRequest) -> bool:
        """Hold the whole prompt, or note that there was no room."""
        if self.kept_for not in (None, request):
            return False
        if not request.hold.block_ids:
            self.pin(request)
        if self._must_let_pass(request) or not self._fits(request):
            request.no_room_since = request.no_room_since or self._clock.now()
            return False
        request.no_room_since = None
        self._pin_anew(request)
        self._metrics.prefix_query_tokens.inc(request.num_to_prefill)
        self._metrics.prefix_hit_tokens.inc(request.num_computed)
        request.hold.grow_to(request.num_blocks_to_prefill)
        return True

    def _pin_anew(self, request: DecodeRequest) -> None:
        """The prefix cache may have more of the prompt than when the request came."""
        request.hold.unpin()
        self.pin(request)

    def ask_again_ms(self, request: DecodeRequest) -> int:
        """When to try again to reserve. The more older ones wait, the later: else a long queue asks more
        often than it can be answered."""
        older = itertools.takewhile(lambda other: other is not request, self._requests)
        num_before = sum(other.phase is Phase.WAITING for other in older)
        return min(ASK_AGAIN_MS * (1 + num_before), MAX_ASK_AGAIN_MS)

    def grow_running(self) -> list[DecodeRequest]:
        """Give every running sequence the blocks of its next step, oldest first; those that got them."""
        for request in self._requests.in_phase(Phase.DECODING):
            if not request.ended and self._make_room(request):
                request.hold.grow_to(request.num_blocks_needed)
        return [
            request
            for request in self._requests.in_phase(Phase.DECODING)
            if len(request.hold.block_ids) >= request.num_blocks_needed
        ]

    def _fits(self, request: DecodeRequest) -> bool:
        """Whether the whole prompt can be held, if need be of blocks that younger ones only have pinned."""
        missing = request.num_blocks_to_prefill - len(request.hold.block_ids)
        num_running = len(self._requests.in_phase(Phase.DECODING))
        reserve = self._settings.growth_reserve_blocks
        while not may_reserve(missing, self._ledger.num_available, num_running, reserve):
            if not self._unpin_newest(request):
                return False
        return True

    def _must_let_pass(self, request: DecodeRequest) -> bool:
        """Whether an older request has found no room for too long."""
        if request is self.kept_for:
            return False
        latest = self._clock.now() - self._settings.starvation_s
        return any(
            other.no_room_since is not None and other.no_room_since <= latest
            for other in self._requests.in_phase(Phase.WAITING)
            if other is not request and other.arrived_at < request.arrived_at
        )

    def _make_room(self, request: DecodeRequest) -> bool:
        missing = request.num_blocks_needed - len(request.hold.block_ids)
        while missing > self._ledger.num_available:
            if self._unpin_newest():
                continue
            if self._ledger.num_retiring:
                return False  # these blocks come at once; nobody need be preempted for them
            victim = self._victim()
            if victim is None and self._computes_for_others():
                return False
            # Alone it still lacks room only when its own blocks keep twins from eviction: it starts again
            # with those twins as its prefix.
            self._preempt(victim or request)
            if victim is None or victim is request:
                return False
        return True

    def _unpin_newest(self, than: DecodeRequest | None = None) -> bool:
        """Let the newest waiting request, but only one younger than `than`, lose its claim on cached blocks;
        it looks again when it starts."""
        for request in reversed(self._requests):
            if request is than:
                return False
            if request.phase is Phase.WAITING and request.hold.block_ids:
                request.hold.unpin()
                return True
        return False

    def _victim(self) -> DecodeRequest | None:
        reserved = self._requests.in_phase(Phase.RECEIVING) + self._requests.in_phase(Phase.PREFILLING)
        running = self._requests.in_phase(Phase.DECODING)
        match choose_victim(len(reserved), len(running)):
            case "reserved":
                return max(reserved, key=lambda request: request.arrived_at)
            case "running":
                return running[-1]
            case _:
                return None
