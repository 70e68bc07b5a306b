"""Who gets blocks of a decode worker, and who gives them up: `decode_worker.room` on attempts.

The decisions are the real ones (`decode_worker.scheduler`), and so are the ledger and the allocator below it.
"""

from collections.abc import Callable

from decode_worker.room import ASK_AGAIN_MS, MAX_ASK_AGAIN_MS, RoomSettings
from decode_worker.scheduler import choose_victim, may_reserve
from pdserve.contract.block_names import ChainRoot
from pdserve.handoff.ledger import BlockLedger
from simulator.attempt import Attempt, Phase
from simulator.events import Events

_RESERVED = (Phase.RECEIVING, Phase.PREFILLING, Phase.ARRIVED)


class Room:
    """The blocks of one worker and all attempts that live there."""

    def __init__(
        self,
        events: Events,
        ledger: BlockLedger,
        root: ChainRoot,
        block_tokens: int,
        preempt: Callable[[Attempt], None],
    ) -> None:
        """`preempt` ends an attempt and sends its request back to the router."""
        self.live: dict[Attempt, None] = {}  # oldest first
        self.waiting: dict[Attempt, None] = {}  # those in Phase.WAITING, oldest first
        self.num_running = 0
        self._events = events
        self._ledger = ledger
        self._root = root
        self._block_tokens = block_tokens
        self._preempt = preempt
        self._settings = RoomSettings()

    def enter(self, attempt: Attempt) -> None:
        """It waits, and holds what the prefix cache has of its prompt."""
        attempt.hold = self._ledger.open(f"decode {attempt.request.index}/{attempt.number}")
        self.live[attempt] = self.waiting[attempt] = None
        self._pin(attempt)

    def leave(self, attempt: Attempt) -> None:
        """It has ended: its blocks are free or stay as prefix cache."""
        attempt.held.release()
        attempt.hold = None
        attempt.phase = Phase.ENDED
        del self.live[attempt]
        self.waiting.pop(attempt, None)

    def reserve(self, attempt: Attempt, phase: Phase) -> bool:
        """Hold the whole prompt and go on to `phase`, or note that there was no room."""
        if not attempt.held.block_ids:
            self._pin(attempt)
        if self._must_let_pass(attempt) or not self._fits(attempt):
            if attempt.no_room_since is None:
                attempt.no_room_since = self._events.now
            return False
        attempt.held.unpin()
        self._pin(attempt)  # the prefix cache may have more of it by now
        attempt.held.grow_to(attempt.num_blocks_to_prefill)
        attempt.phase = phase
        del self.waiting[attempt]
        return True

    def ask_again_s(self, attempt: Attempt) -> float:
        """When a prefill worker is to try again."""
        num_before = 0
        for other in self.waiting:
            if other is attempt or ASK_AGAIN_MS * (1 + num_before) >= MAX_ASK_AGAIN_MS:
                break
            num_before += 1
        return min(ASK_AGAIN_MS * (1 + num_before), MAX_ASK_AGAIN_MS) / 1000

    def grow(self, attempt: Attempt) -> bool:
        """One more block for a running sequence; False when it had to be preempted itself."""
        while not self._ledger.num_available:
            if self._unpin_newest(None):
                continue
            victim = self._victim() or attempt
            self._preempt(victim)
            if victim is attempt:
                return False
        attempt.held.grow_to(len(attempt.held.block_ids) + 1)
        return True

    def _pin(self, attempt: Attempt) -> None:
        num_blocks = attempt.held.adopt_prefix(self._root, attempt.prompt_blocks)
        attempt.num_computed = num_blocks * self._block_tokens

    def _fits(self, attempt: Attempt) -> bool:
        missing = attempt.num_blocks_to_prefill - len(attempt.held.block_ids)
        reserve = self._settings.growth_reserve_blocks
        while not may_reserve(missing, self._ledger.num_available, self.num_running, reserve):
            if not self._unpin_newest(attempt):
                return False
        return True

    def _must_let_pass(self, attempt: Attempt) -> bool:
        latest = self._events.now - self._settings.starvation_s
        for other in self.waiting:
            if other is attempt:
                return False
            if other.no_room_since is not None and other.no_room_since <= latest:
                return True
        return False

    def _unpin_newest(self, than: Attempt | None) -> bool:
        for attempt in reversed(self.waiting):
            if attempt is than:
                return False
            if attempt.held.block_ids:
                attempt.held.unpin()
                return True
        return False

    def _victim(self) -> Attempt | None:
        reserved = [attempt for attempt in self.live if attempt.phase in _RESERVED]
        match choose_victim(len(reserved), self.num_running):
            case "reserved":
                return reserved[-1]
            case "running":
                return next(each for each in reversed(self.live) if each.phase is Phase.DECODING)
            case _:
                return None
