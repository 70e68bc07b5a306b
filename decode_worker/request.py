"""One submission at a decode worker: few facts, the rest derived."""

import asyncio
from dataclasses import replace
from enum import StrEnum
from typing import Protocol

from decode_worker.request_trace import RequestTrace
from pdserve.contract.block_names import ChainRoot, blocks_for
from pdserve.contract.ids import SubmitNumber
from pdserve.contract.messages import Alone, Failed, Refused, RequestTimings, Submit, TokenEvent
from pdserve.contract.sampling import FinishReason, finish_reason
from pdserve.contract.tokens import num_tokens, pack_tokens, slice_tokens
from pdserve.contract.work import SampledToken, SampleRequest, SequenceStep
from pdserve.handoff.ledger import BlockHold

MAX_REPLAY_TOKENS = 256
"""Known output tokens that one step computes again at most."""


class TokenSink(Protocol):
    """Where a request's tokens go: one router's Session (`decode_worker.streams.RouterSession`)."""

    def emit(self, event: TokenEvent, timings: RequestTimings | None = None) -> None:
        """Part of the next frame."""
        ...

    def flush(self, step: int) -> None:
        """Send what was emitted, as one frame."""
        ...

    def answer(self, message: Refused | Failed | Alone) -> None: ...


class Phase(StrEnum):
    WAITING = "waiting"
    """Pins what the cache holds; nothing else is reserved. Split: queued at the prefill worker."""
    RECEIVING = "receiving"
    """The whole prompt is reserved; segments arrive."""
    PREFILLING = "prefilling"
    """The whole prompt is reserved; this worker computes it."""
    DECODING = "decoding"
    """Part of the running batch."""
    ENDED = "ended"
    """Holds nothing."""


_LEGAL_MOVES = {
    (Phase.WAITING, Phase.RECEIVING),
    (Phase.WAITING, Phase.PREFILLING),
    (Phase.RECEIVING, Phase.DECODING),
    (Phase.PREFILLING, Phase.DECODING),
    (Phase.WAITING, Phase.ENDED),
    (Phase.RECEIVING, Phase.ENDED),
    (Phase.PREFILLING, Phase.ENDED),
    (Phase.DECODING, Phase.ENDED),
}

_STAGES = {
    Phase.WAITING: "queue",
    Phase.RECEIVING: "transfer",
    Phase.PREFILLING: "prefill",
    Phase.DECODING: "decode",
}
"""What traces call the phases."""


class DecodeRequest:
    """0 <= num_computed <= num_tokens; `tokens` is the prompt and all output tokens so far."""

    def __init__(
        self,
        sink: TokenSink,
        submit: Submit,
        root: ChainRoot,
        hold: BlockHold,
        block_size: int,
        deterministic: bool,
        now: float,
        trace: RequestTrace,
    ) -> None:
        self.sink = sink
        self.trace = trace
        self.submit = submit
        self.root = root
        self.hold = hold
        self.phase = Phase.WAITING
        self.arrived_at = now
        self.deadline_at = None if submit.deadline_ms is None else now + submit.deadline_ms / 1000
        self.no_room_since: float | None = None
        """Since when it has been told that there is no room."""
        self.tokens = bytearray(submit.prompt_tokens + submit.known_output_tokens)
        self.num_prompt = num_tokens(submit.prompt_tokens)
        self.num_computed = 0
        self.finish: FinishReason | None = None
        self.timings = RequestTimings()
        self._told: RequestTimings | None = None
        self._prefill_began_at = now
        self.fetch: asyncio.Task[None] | None = None
        self._block_size = block_size
        # Exactness: known output tokens are computed in the shape in which they were computed first.
        self.num_to_prefill = self.num_prompt if deterministic else num_tokens(self.tokens)

    @property
    def number(self) -> SubmitNumber:
        return self.submit.number

    @property
    def num_tokens(self) -> int:
        return num_tokens(self.tokens)

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included."""
        return self.num_tokens - self.num_prompt

    @property
    def num_known_output(self) -> int:
        """Output tokens that earlier attempts have delivered."""
        return num_tokens(self.submit.known_output_tokens)

    @property
    def prefill_samples(self) -> bool:
        """Whether the token after the prefilled ones is still unknown."""
        return self.num_to_prefill == self.num_prompt + self.num_known_output

    @property
    def prefill_tokens(self) -> bytes:
        return slice_tokens(self.tokens, 0, self.num_to_prefill)

    @property
    def num_held_blocks(self) -> int:
        """Leading full blocks whose KV is in the pool."""
        return self.num_computed // self._block_size

    @property
    def num_blocks_to_prefill(self) -> int:
        return blocks_for(self.num_to_prefill, self._block_size)

    @property
    def num_blocks_needed(self) -> int:
        """To compute every token that is known now."""
        return blocks_for(self.num_tokens, self._block_size)

    @property
    def ended(self) -> bool:
        return self.phase is Phase.ENDED

    def move(self, to: Phase) -> None:
        assert (self.phase, to) in _LEGAL_MOVES, f"a request cannot go from {self.phase} to {to}"
        self.trace.stage_ends(_STAGES[self.phase])
        self.phase = to

    def needs_next_block_of(self, other: "DecodeRequest") -> bool:
        """Whether the prompt of `other` is computed, and its next block is one that this prompt has, too."""
        stop = (other.num_held_blocks + 1) * self._block_size
        if stop >= self.num_to_prefill or stop > other.num_to_prefill or self.root != other.root:
            return False
        return slice_tokens(self.tokens, 0, stop) == slice_tokens(other.tokens, 0, stop)

    def start_prefill(self, now: float) -> None:
        """The whole prompt is reserved: this worker computes it."""
        self.move(Phase.PREFILLING)
        self.timings = replace(self.timings, queue_s=now - self.arrived_at)
        self._prefill_began_at = now

    def end_prefill(self, now: float) -> None:
        """This worker has computed the prompt."""
        self.timings = replace(self.timings, prefill_s=now - self._prefill_began_at)
        self.start_decoding()

    def start_decoding(self) -> None:
        """All KV of the prompt is here: join the running batch."""
        self.move(Phase.DECODING)
        self.hold.activate()

    @property
    def decode_stop(self) -> int:
        """How far the next decode step computes."""
        return min(self.num_tokens, self.num_computed + MAX_REPLAY_TOKENS)

    def prefill_step(self, stop: int) -> SequenceStep:
        """Compute the prompt up to `stop`; samples when that is all that was known."""
        samples = stop == self.num_to_prefill and self.prefill_samples
        return SequenceStep(
            tokens=slice_tokens(self.tokens, self.num_computed, stop),
            start=self.num_computed,
            block_ids=self.hold.block_ids,
            sample=self.sample_request(stop) if samples else None,
        )

    def decode_step(self) -> SequenceStep:
        """Compute what is not computed yet, ordinarily the one token sampled last, and sample the next."""
        stop = self.decode_stop
        return SequenceStep(
            tokens=slice_tokens(self.tokens, self.num_computed, stop),
            start=self.num_computed,
            block_ids=self.hold.block_ids,
            sample=self.sample_request(stop) if stop == self.num_tokens else None,
            as_decode=True,
        )

    def sample_request(self, position: int) -> SampleRequest:
        params = self.submit.sampling
        return SampleRequest(
            params=params,
            seed=self.submit.seed,
            position=position,
            output_index=position - self.num_prompt,
            history=slice_tokens(self.tokens, 0, position) if params.needs_history else b"",
            num_prompt_tokens=self.num_prompt,
        )

    def computed(self, stop: int) -> None:
        """KV for all tokens before `stop` is in the pool: name the full blocks."""
        self.num_computed = stop
        self.hold.publish(self.root, self.tokens, stop)

    def news(self) -> RequestTimings | None:
        """The timings, when they have changed since this was asked last."""
        if self.timings is self._told:
            return None
        self._told = self.timings
        return self.timings

    def append(self, sampled: SampledToken, eos_token_ids: tuple[int, ...]) -> None:
        """The next output token."""
        self.tokens += pack_tokens((sampled.token,))
        self.finish = finish_reason(self.submit.sampling, sampled.token, self.num_output, eos_token_ids)
