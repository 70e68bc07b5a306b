"""The running batch of a decode worker, counted in steps instead of tokens."""

import heapq
from dataclasses import dataclass, field

import numpy as np

from simulator.attempt import Attempt, Phase
from simulator.stretch import Stretch

Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


class Batch:
    """The sequences in `Phase.DECODING`.

    To add one, to remove one and to find who is next to grow or to finish costs O(log n), and a step nothing
    at all: of each sequence only the step at which it joined is kept.
    """

    def __init__(self, block_tokens: int) -> None:
        self.step = 0
        """Steps that have ended."""
        self.size = 0
        self.num_context_tokens = 0
        """Tokens with KV of all sequences."""
        self._block_tokens = block_tokens
        self._num_added = 0
        self._finishing: list[tuple[int, int, Attempt]] = []  # (step count at its last token, order, who)
        self._growing: list[tuple[int, int, Attempt]] = []  # (step that needs a new block, order, who)

    def add(self, attempt: Attempt) -> None:
        """It is part of every step from the next on."""
        attempt.phase = Phase.DECODING
        attempt.joined_step = self.step
        self.size += 1
        self.num_context_tokens += attempt.num_to_prefill
        self._num_added += 1
        heapq.heappush(self._finishing, (attempt.finish_step, self._num_added, attempt))
        growing_step = self.step + -attempt.num_to_prefill % self._block_tokens
        heapq.heappush(self._growing, (growing_step, self._num_added, attempt))

    def remove(self, attempt: Attempt, left_step: int) -> None:
        """It has made its last token when `left_step` steps have ended."""
        attempt.left_step = left_step
        self.size -= 1
        self.num_context_tokens -= attempt.num_tokens_at(self.step)

    def advance(self, num_steps: int) -> None:
        self.step += num_steps
        self.num_context_tokens += num_steps * self.size

    def next_finish(self) -> int:
        """The step count at which the first of its sequences has its last token."""
        self._drop_gone(self._finishing)
        return self._finishing[0][0]

    def take_finished(self) -> list[Attempt]:
        """The sequences that have their last token, removed from the batch."""
        finished = []
        while self.size and self.next_finish() <= self.step:
            attempt = heapq.heappop(self._finishing)[2]
            self.remove(attempt, self.step)
            attempt.phase = Phase.ENDED
            finished.append(attempt)
        return finished

    def next_to_grow(self, step: int) -> Attempt | None:
        """A sequence that needs another block to take part in step `step`, counted from 0; None when all have
        what they need. It counts as served."""
        self._drop_gone(self._growing)
        if not self._growing or self._growing[0][0] > step:
            return None
        at, order, attempt = self._growing[0]
        heapq.heapreplace(self._growing, (at + self._block_tokens, order, attempt))
        return attempt

    def _drop_gone(self, heap: list[tuple[int, int, Attempt]]) -> None:
        while heap and heap[0][2].phase is not Phase.DECODING:
            heapq.heappop(heap)


@dataclass(slots=True)
class StepLog:
    """When the steps of one worker's batch ended, as stretches."""

    stretches: list[Stretch] = field(default_factory=list)

    def ends(self) -> Numbers:
        """[num_steps] seconds: when each step ended."""
        if not self.stretches:
            return np.empty(0)
        counts = np.array([each.num_steps for each in self.stretches])
        began = np.repeat([each.began_at for each in self.stretches], counts)
        first = np.repeat([each.first_s for each in self.stretches], counts)
        growth = np.repeat([each.growth_s for each in self.stretches], counts)
        begins = np.repeat(np.cumsum(counts) - counts, counts)
        done = np.arange(len(began)) - begins + 1.0
        return np.asarray(began + done * first + growth * (done * (done - 1) / 2))
