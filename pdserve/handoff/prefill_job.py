"""One Prefill call as the source's engine loop sees it: a prompt to compute and how far it is.

    QUEUED ----start----> STARTING --reserved--> READY --last chunk--> COMPUTED
       ^                      |
       +------put_back--------+      (the decode worker had no room: Busy)

The loop moves a job forward (`start`, `layers_are_done`, `advance`); the call's coroutine in
`pdserve.handoff.sending` follows it by waiting for `changed`, and sends what the job has ready
(`next_shipment`). The job ends with its call, in any state.
"""

import asyncio
from enum import StrEnum

from pdserve.contract.block_names import ChainRoot, blocks_for
from pdserve.contract.messages import FirstToken, PrefillOpen
from pdserve.contract.sampling import finish_reason
from pdserve.contract.tokens import num_tokens, slice_tokens
from pdserve.contract.work import SampledToken, SampleRequest, SequenceStep
from pdserve.handoff.ledger import BlockHold
from pdserve.handoff.shipping import Shipment, Shipping


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


class PrefillJob:
    """The state of one Prefill call at its source."""

    def __init__(
        self, request: PrefillOpen, root: ChainRoot, block_size: int, num_layers: int, queued_at: float
    ) -> None:
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
        self._num_layers = num_layers
        self._hold: BlockHold | None = None
        self._shipping = Shipping(self.num_blocks, num_layers)

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

    def layers_are_done(self, num_layers: int) -> None:
        """The step that runs computes the prompt to its end, and is through with layers [0, `num_layers`).
        Where it is known to sample the request's last token, nobody needs them."""
        if not self._samples_the_last_token:
            self._shipping.layers_are_ready(num_layers)
            self.changed.set()

    def advance(
        self, stop: int, sampled: SampledToken | None, eos_token_ids: tuple[int, ...], now: float
    ) -> None:
        """The prompt is computed up to `stop`; `sampled` is the first token, with the last chunk."""
        self.num_computed = stop
        self.hold.publish(self.root, self.request.tokens, stop)
        if stop < self.num_prompt:
            self._shipping.blocks_are_ready(stop // self._block_size)
        else:
            self._complete(sampled, eos_token_ids, now)
        self.changed.set()

    # The call's side.

    def reserved(self, first_missing_block: int) -> None:
        """The decode worker has reserved all blocks from `first_missing_block` on."""
        self._move(JobState.READY)
        self.hold.activate()
        self._shipping.skip(first_missing_block)
        self._shipping.blocks_are_ready(self.num_computed // self._block_size)
        self.changed.set()

    def put_back(self) -> None:
        """The decode worker is busy: give up the own reservation and rest."""
        self._move(JobState.QUEUED)
        self.resting = True
        self.hold.release()
        self._hold = None

    def acknowledge(self, index: int, ok: bool) -> None:
        """A segment was copied and verified, or must be sent again."""
        self._shipping.acknowledge(index, ok)
        self.changed.set()

    def next_shipment(self, window: int, max_block_layers: int) -> Shipment | None:
        """What to send now; see `Shipping.next`."""
        return self._shipping.next(window, max_block_layers)

    @property
    def num_unacknowledged(self) -> int:
        """Segments that were sent and neither acknowledged nor asked for again."""
        return self._shipping.num_unacknowledged

    @property
    def num_segments(self) -> int:
        return self._shipping.num_segments

    @property
    def all_shipped(self) -> bool:
        """Every segment has been handed to the transport at least once, or none is needed any more."""
        return self.state is JobState.COMPUTED and self._shipping.is_idle

    def _complete(self, sampled: SampledToken | None, eos_token_ids: tuple[int, ...], now: float) -> None:
        self._move(JobState.COMPUTED)
        self.computed_at = now
        self._shipping.layers_are_ready(self._num_layers)
        if sampled is not None:
            self.first_token = FirstToken(sampled.token, sampled.logprobs)
            self.ends_with_first_token = self._is_last(sampled.token, eos_token_ids)
        if self.ends_with_first_token:
            self._shipping.give_up()

    def _is_last(self, token: int, eos_token_ids: tuple[int, ...]) -> bool:
        sampling = self.request.sampling
        assert sampling is not None, "a token was sampled that was not asked for"
        return finish_reason(sampling, token, self._num_output_with_first_token, eos_token_ids) is not None

    @property
    def _num_output_with_first_token(self) -> int:
        """What follows the request's own prompt here was output of an earlier attempt."""
        return self.num_prompt - self.request.num_prompt_tokens + 1

    @property
    def _samples_the_last_token(self) -> bool:
        """Whatever it is. A token that is not sampled here is not the last."""
        sampling = self.request.sampling
        return sampling is not None and self._num_output_with_first_token >= sampling.max_tokens

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
