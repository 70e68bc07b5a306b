"""One Prefill call as the source's engine loop sees it: a prompt to compute and how far it is.

    QUEUED ----start----> STARTING --reserved--> READY --last chunk--> COMPUTED
       ^                      |
       +------put_back--------+      (the decode worker had no room: Busy)

The loop moves a job forward (`start`, `advance`, `sampled`); the call's coroutine in
`pdserve.handoff.sending` follows it by waiting for `changed`. The job ends with its call, in any state.
"""

import asyncio
from dataclasses import dataclass
from enum import StrEnum

from pdserve.contract.block_names import ChainRoot, blocks_for
from pdserve.contract.messages import FirstToken, PrefillOpen
from pdserve.contract.sampling import finish_reason
from pdserve.contract.tokens import num_tokens, slice_tokens
from pdserve.contract.work import SampledToken, SampleRequest, SequenceStep
from pdserve.handoff.ledger import BlockHold


class JobState(StrEnum):
    QUEUED = "queued"
    """Waits for its turn; holds no blocks."""
    STARTING = "starting"
    """Its blocks are reserved here; the decode worker has been asked to reserve too."""
    READY = "ready"
    """Reserved on both sides; takes part in steps."""
    COMPUTED = "computed"
    """All KV exists; segments may still be under way."""


_LEGAL_MOVES = {
    (JobState.QUEUED, JobState.STARTING),
    (JobState.STARTING, JobState.QUEUED),
    (JobState.STARTING, JobState.READY),
    (JobState.READY, JobState.COMPUTED),
}


@dataclass(frozen=True, slots=True)
class Shipment:
    """Whole blocks to send now, by their index in the sequence; `index` names the segment."""

    index: int
    first_block: int
    num_blocks: int


class PrefillJob:
    """The state of one Prefill call at its source."""

    def __init__(self, request: PrefillOpen, root: ChainRoot, block_size: int, queued_at: float) -> None:
        self.request = request
        self.root = root
        self.state = JobState.QUEUED
        self.changed = asyncio.Event()
        self.queued_at = queued_at
        self.started_at = queued_at
        self.computed_at = queued_at
        self.resting = False  # after Busy, until its call offers it again
        self.overdue = False  # STARTING, and the decode worker takes long to answer
        self.num_prompt = num_tokens(request.tokens)
        self.num_blocks = blocks_for(self.num_prompt, block_size)
        self.num_computed = 0
        self.num_cached = 0
        self.first_token: FirstToken | None = None
        self.ends_with_first_token = False
        self._block_size = block_size
        self._hold: BlockHold | None = None
        self._num_blocks_shipped = 0
        self._shipments: list[Shipment] = []
        self._again: list[int] = []  # segment indexes to be sent again
        self._unacknowledged: set[int] = set()

    @property
    def hold(self) -> BlockHold:
        assert self._hold is not None, "a queued job holds no blocks"
        return self._hold

    @property
    def num_to_compute(self) -> int:
        """Prompt tokens still to be computed."""
        return self.num_prompt - self.num_computed

    # The loop's side.

    def start(self, hold: BlockHold, num_cached: int, now: float) -> None:
        """The whole prompt is reserved here in `hold`; its first `num_cached` tokens need no computing."""
        self._move(JobState.STARTING)
        self.overdue = False
        self._hold, self.num_cached, self.num_computed = hold, num_cached, num_cached
        self.started_at = now

    def next_step(self, stop: int) -> SequenceStep:
        """The step that computes the prompt up to `stop`; the last one samples the first token."""
        request = self.request
        return SequenceStep(
            tokens=slice_tokens(request.tokens, self.num_computed, stop),
            start=self.num_computed,
            block_ids=self.hold.block_ids,
            sample=self._sample_request() if stop == self.num_prompt else None,
        )

    def advance(
        self, stop: int, sampled: SampledToken | None, eos_token_ids: tuple[int, ...], now: float
    ) -> None:
        """The prompt is computed up to `stop`; `sampled` is the first token, with the last chunk."""
        self.num_computed = stop
        self.hold.publish(self.root, self.request.tokens, stop)
        if stop == self.num_prompt:
            self._move(JobState.COMPUTED)
            self.computed_at = now
            if sampled is not None:
                self.first_token = FirstToken(sampled.token, sampled.logprobs)
                self.ends_with_first_token = self._is_last(sampled.token, eos_token_ids)
        self.changed.set()

    # The call's side.

    def reserved(self, first_missing_block: int) -> None:
        """The decode worker has reserved all blocks from `first_missing_block` on."""
        self._move(JobState.READY)
        self.hold.activate()
        self._num_blocks_shipped = first_missing_block
        self.changed.set()

    def put_back(self) -> None:
        """The decode worker is busy: give up the own reservation and rest."""
        self._move(JobState.QUEUED)
        self.resting = True
        self.hold.release()
        self._hold = None

    def acknowledge(self, index: int, ok: bool) -> None:
        """A segment was copied and verified, or must be sent again."""
        if ok:
            self._unacknowledged.discard(index)
        else:
            self._again.append(index)
        self.changed.set()

    def next_shipment(self, window: int, max_blocks: int) -> Shipment | None:
        """What to send now, at most `max_blocks`; None when nothing is ready or `window` segments are
        unacknowledged."""
        if self._again:
            return self._shipments[self._again.pop(0)]
        if len(self._unacknowledged) >= window or self.ends_with_first_token:
            return None
        num_ready = min(max_blocks, self._num_blocks_ready() - self._num_blocks_shipped)
        if num_ready <= 0:
            return None
        shipment = Shipment(len(self._shipments), self._num_blocks_shipped, num_ready)
        self._shipments.append(shipment)
        self._unacknowledged.add(shipment.index)
        self._num_blocks_shipped += num_ready
        return shipment

    @property
    def num_segments(self) -> int:
        return len(self._shipments)

    @property
    def all_shipped(self) -> bool:
        """Every segment has been handed to the transport at least once, or none is needed any more."""
        done = self.ends_with_first_token or self._num_blocks_shipped >= self.num_blocks
        return self.state is JobState.COMPUTED and done and not self._again

    def _num_blocks_ready(self) -> int:
        if self.num_computed == self.num_prompt:
            return self.num_blocks
        return self.num_computed // self._block_size

    def _is_last(self, token: int, eos_token_ids: tuple[int, ...]) -> bool:
        request = self.request
        assert request.sampling is not None, "a token was sampled that was not asked for"
        num_output = self.num_prompt - request.num_prompt_tokens + 1
        return finish_reason(request.sampling, token, num_output, eos_token_ids) is not None

    def _sample_request(self) -> SampleRequest | None:
        request = self.request
        if request.sampling is None:
            return None
        return SampleRequest(
            params=request.sampling,
            seed=request.seed,
            position=self.num_prompt,
            output_index=self.num_prompt - request.num_prompt_tokens,
            history=request.tokens if request.sampling.needs_history else b"",
            num_prompt_tokens=request.num_prompt_tokens,
        )

    def _move(self, to: JobState) -> None:
        assert (self.state, to) in _LEGAL_MOVES, f"a prefill job cannot go from {self.state} to {to}"
        self.state = to
        self.changed.set()
