"""A decode worker: the real decisions, and steps that are formulas."""

from collections.abc import Callable, Mapping
from typing import Protocol

from decode_worker.scheduler import PrefillQuota, plan_chunks
from pdserve.contract.block_names import ChainRoot
from pdserve.contract.ids import SubmitNumber, WorkerId
from pdserve.contract.messages import RequestTimings, Role, WorkerLoad, WorkerState
from pdserve.engine.block_allocator import BlockAllocator
from pdserve.engine.chunking import PromptProgress, chunk_tokens_within
from pdserve.handoff.ledger import BlockLedger
from simulator.attempt import Attempt, Phase
from simulator.batch import Batch, StepLog
from simulator.events import Event, Events
from simulator.prefill import Link, PrefillWorker
from simulator.room import Room
from simulator.stretch import Stretch
from simulator.timing import Timing


class Listener(Protocol):
    """The router, as a worker sees it."""

    def first_token(self, attempt: Attempt) -> None: ...
    def kv_has_come(self, attempt: Attempt, timings: RequestTimings) -> None: ...
    def finished(self, attempt: Attempt) -> None: ...
    def preempted(self, attempt: Attempt) -> None: ...


class DecodeWorker:
    """Also an unsplit worker: then every prompt is its own."""

    def __init__(
        self,
        worker_id: WorkerId,
        role: Role,
        timing: Timing,
        block_tokens: int,
        root: ChainRoot,
        local_prefill_share: float,
        sources: Mapping[WorkerId, PrefillWorker],
        listener: Listener,
        events: Events,
    ) -> None:
        self.worker_id = worker_id
        self.role = role
        self.prefill_share = local_prefill_share
        self.log = StepLog()
        self.link = Link()
        self.allocator = BlockAllocator(timing.pool_tokens // block_tokens, 1)
        self.ledger = BlockLedger(self.allocator)
        self.num_preemptions = 0
        self._timing = timing
        self._block_tokens = block_tokens
        self._root = root
        self._sources = sources
        self._listener = listener
        self._events = events
        self._room = Room(events, self.ledger, root, block_tokens, self._preempt)
        self._batch = Batch(block_tokens)
        self._quota = PrefillQuota(local_prefill_share)
        self._chunk_tokens = chunk_tokens_within(timing.step_budget_s, timing.cost, timing.chunk_tokens)
        self._arrived: list[Attempt] = []
        self._prefilling: list[Attempt] = []
        self._own_prompts: dict[Attempt, None] = {}  # not computed to their end yet
        self._stretch: Stretch | None = None
        self._end: Event | None = None
        self._last_submit = 0
        self._prefill_tokens_per_s = 0.0
        self._decode_step_s = 0.0

    # What the router and the prefill workers ask for.

    def submit(self, attempt: Attempt) -> None:
        self._last_submit = attempt.submit_number
        self._catch_up()
        self._room.enter(attempt)
        if attempt.prefill is None:
            self._own_prompts[attempt] = None
            self._wake()
        else:
            source = self._sources[attempt.prefill]
            self._events.after(self._timing.message_s, lambda: source.open(attempt, self))

    def reserve(self, attempt: Attempt) -> float | None:
        """Room for the whole prompt: None when there is, else the seconds after which to ask again."""
        self._catch_up()
        if self._room.reserve(attempt, Phase.RECEIVING):
            return None
        return self._room.ask_again_s(attempt)

    def first_token(self, attempt: Attempt) -> None:
        """From the prefill worker."""
        if attempt.phase is Phase.ENDED:
            return
        self._emit_first(attempt)
        if not attempt.num_to_decode:
            self._catch_up()
            self._finish(attempt)

    def sealed(self, attempt: Attempt, timings: RequestTimings) -> None:
        """All KV is there and verified; `timings` tell how it travelled."""
        if attempt.phase is not Phase.RECEIVING:
            return
        attempt.num_computed = attempt.num_to_prefill
        self._publish(attempt)
        attempt.phase = Phase.ARRIVED
        self._arrived.append(attempt)
        self._events.after(self._timing.message_s, lambda: self._listener.kv_has_come(attempt, timings))
        self._wake()

    # What the worker tells.

    @property
    def is_busy(self) -> bool:
        return bool(self._room.live)

    def load(self) -> WorkerLoad:
        """As `controller.worker.Worker.load`."""
        steps = self._stretch.step_at(self._events.now) if self._stretch else 0
        return WorkerLoad(
            state=WorkerState.READY,
            waiting_requests=len(self._room.live) - self._room.num_running,
            waiting_tokens=sum(each.num_to_prefill - each.num_computed for each in self._own_prompts),
            running_sequences=self._room.num_running,
            running_context_tokens=self._batch.num_context_tokens + steps * self._room.num_running,
            blocks=self.ledger.counts(),
            step=self._batch.step + steps,
            last_submit=SubmitNumber(self._last_submit),
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            decode_step_s=self._decode_step_s,
            prefill_slowdown=1.0,
            decode_slowdown=1.0,
        )

    def check_empty(self) -> None:
        """Raises AssertionError unless everything has ended and every block came back."""
        self.ledger.check_integrity()
        assert not self.ledger.holds, f"{self.worker_id} still holds blocks"
        assert not self._room.live, f"{self.worker_id} still has requests"
        left = (self._batch.size, self._batch.num_context_tokens)
        assert left == (0, 0), f"{self.worker_id} still decodes {left[0]} sequences of {left[1]} tokens"

    # The loop.

    def _wake(self) -> None:
        """There is something new: it takes part from the next step on."""
        if self._stretch is None:
            self._begin()
        elif self._stretch.num_steps > 1:
            self._plan(self._stretch.cut(self._events.now), lambda: self._decoded())

    def _begin(self) -> None:
        """The next step, and as many after it as will be alike."""
        self._stretch = None
        self._join()
        self._admit()
        self._grow(self._batch.step)
        if not self._prefill_step() and self._batch.size:
            self._decode_steps()

    def _join(self) -> None:
        for attempt in self._arrived:
            if attempt.phase is Phase.ARRIVED:  # else it was preempted meanwhile
                self._add(attempt)
        self._arrived.clear()

    def _admit(self) -> None:
        for attempt in list(self._room.waiting):
            if attempt.prefill is None and not any(map(attempt.needs_next_block_of, self._prefilling)):
                if not self._room.reserve(attempt, Phase.PREFILLING):
                    return
                attempt.num_cached = attempt.num_computed
                self._prefilling.append(attempt)

    def _prefill_step(self) -> bool:
        """A step with chunks of own prompts beside the batch; False when there are none to compute now."""
        if not self._prefilling or not self._quota.allows(self._batch.size):
            return False
        progress = [PromptProgress(each.num_computed, each.num_to_prefill) for each in self._prefilling]
        stops = plan_chunks(
            progress,
            self._chunk_tokens,
            self._timing.cost,
            self._timing.step_budget_s,
            self._batch.size,
            self._batch.num_context_tokens,
        )
        chunks = list(zip(self._prefilling, stops, strict=False))
        prefill_s = sum(self._timing.prefill_s(each.num_computed, stop) for each, stop in chunks)
        seconds = prefill_s + self._timing.decode_s(self._batch.size, self._batch.num_context_tokens)
        self._plan(
            Stretch(self._events.now, seconds, 0.0, 1), lambda: self._computed(chunks, prefill_s, seconds)
        )
        return True

    def _decode_steps(self) -> None:
        size = self._batch.size
        num_steps = self._batch.next_finish() - self._batch.step
        if self._prefilling or self.ledger.num_available < size:
            num_steps = 1  # the quota, or who has room to grow, may change with every step
        first_s = self._timing.decode_s(size, self._batch.num_context_tokens)
        growth_s = self._timing.cost.per_context_token_s * size
        steps = Stretch(self._events.now, first_s, growth_s, min(num_steps, self._block_tokens))
        self._plan(steps, lambda: self._decoded())

    def _plan(self, stretch: Stretch, then: Callable[[], None]) -> None:
        if self._end is not None:
            self._end.cancel()
        self._stretch = stretch
        self._end = self._events.at(stretch.ends_at, then)

    def _decoded(self) -> None:
        stretch = self._close()
        self._decode_step_s = stretch.last_s
        self._quota.note_step(self._batch.size, 0.0, stretch.elapsed_s(stretch.num_steps))
        self._end_finished()
        self._begin()

    def _computed(self, chunks: list[tuple[Attempt, int]], prefill_s: float, seconds: float) -> None:
        num_decoding = self._batch.size
        self._close()
        self._quota.note_step(num_decoding, prefill_s, seconds)
        if not num_decoding:
            num_tokens = sum(stop - attempt.num_computed for attempt, stop in chunks)
            self._prefill_tokens_per_s = num_tokens / seconds
        self._end_finished()
        for attempt, stop in chunks:
            if attempt.phase is Phase.PREFILLING:  # else it was preempted meanwhile
                self._advance(attempt, stop)
        self._begin()

    def _close(self) -> Stretch:
        """The stretch has ended."""
        stretch = self._stretch
        assert stretch is not None
        if self._batch.size:
            self._grow(self._batch.step + stretch.num_steps - 1)
        self.log.stretches.append(stretch)
        self._batch.advance(stretch.num_steps)
        self._stretch = self._end = None
        return stretch

    def _advance(self, attempt: Attempt, stop: int) -> None:
        attempt.num_computed = stop
        self._publish(attempt)
        if stop < attempt.num_to_prefill:
            return
        self._prefilling.remove(attempt)
        del self._own_prompts[attempt]
        self._emit_first(attempt)
        if attempt.num_to_decode:
            self._add(attempt)
        else:
            self._finish(attempt)

    # The life of one attempt.

    def _add(self, attempt: Attempt) -> None:
        attempt.held.activate()
        self._batch.add(attempt)
        self._room.num_running += 1

    def _end_finished(self) -> None:
        for attempt in self._batch.take_finished():
            attempt.num_computed = attempt.num_tokens_at(self._batch.step)
            self._room.num_running -= 1
            self._finish(attempt)

    def _finish(self, attempt: Attempt) -> None:
        self._publish(attempt)
        self._room.leave(attempt)
        self._events.after(self._timing.message_s, lambda: self._listener.finished(attempt))

    def _emit_first(self, attempt: Attempt) -> None:
        attempt.first_token_at = self._events.now
        self._events.after(self._timing.message_s, lambda: self._listener.first_token(attempt))

    def _publish(self, attempt: Attempt) -> None:
        """Name its full blocks. Those of the answer all at its end: nobody else has them in the trace."""
        attempt.held.publish(
            self._root, attempt.request.block_ids, attempt.num_computed // self._block_tokens
        )

    def _preempt(self, attempt: Attempt) -> None:
        """Send it back to the router with what it has made so far."""
        self.num_preemptions += 1
        if attempt.phase is Phase.DECODING:
            num_steps = self._stretch.step_at(self._events.now) if self._stretch else 0
            left_step = self._batch.step + num_steps
            attempt.num_computed = attempt.num_tokens_at(left_step)
            self._batch.remove(attempt, left_step)
            self._room.num_running -= 1
        if attempt.phase is Phase.PREFILLING:
            self._prefilling.remove(attempt)
        self._own_prompts.pop(attempt, None)
        if attempt.phase is Phase.RECEIVING and attempt.prefill is not None:
            self._sources[attempt.prefill].cancel(attempt)
        self._publish(attempt)
        self._room.leave(attempt)
        self._events.after(self._timing.message_s, lambda: self._listener.preempted(attempt))

    def _catch_up(self) -> None:
        """Give the running sequences the blocks that their steps up to now have needed."""
        if self._stretch is not None:
            self._grow(self._batch.step + self._stretch.step_at(self._events.now))

    def _grow(self, step: int) -> None:
        while (attempt := self._batch.next_to_grow(step)) is not None:
            self._room.grow(attempt)
