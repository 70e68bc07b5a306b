"""One try to serve a request at a pair of workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from pdserve.contract.block_names import blocks_for
from pdserve.contract.ids import WorkerId
from pdserve.contract.tokens import TokenBytes, slice_tokens
from simulator.workload import Request

if TYPE_CHECKING:
    from pdserve.handoff.ledger import BlockHold


class Phase(StrEnum):
    """As in `decode_worker.request.Phase`."""

    WAITING = "waiting"
    RECEIVING = "receiving"
    PREFILLING = "prefilling"
    ARRIVED = "arrived"
    """All KV is there; it joins the batch with the next step."""
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Attempt:
    """Few facts, the rest derived. `num_known` output tokens were made by earlier attempts."""

    request: Request
    number: int
    num_known: int
    block_tokens: int
    prefill: WorkerId | None
    """None: the decode worker computes the prompt itself."""
    decode: WorkerId
    submit_number: int
    """Counts what the router has sent to that decode worker."""
    phase: Phase = Phase.WAITING
    hold: BlockHold | None = None
    """At the decode worker; None once it has ended."""
    num_computed: int = 0
    """Leading tokens with KV at the decode worker, as far as no step of the batch has computed them."""
    num_cached: int = 0
    """Prompt tokens that need no computing: cached where the prompt is computed."""
    no_room_since: float | None = None
    first_token_at: float | None = None
    joined_step: int = 0
    """The decode worker's step count when it joined the batch."""
    left_step: int | None = None

    @property
    def num_to_prefill(self) -> int:
        return self.request.num_prompt + self.num_known

    @property
    def num_to_decode(self) -> int:
        """Output tokens that decode steps make; the first one is made by the prefill."""
        return self.request.num_output - self.num_known - 1

    @property
    def num_blocks_to_prefill(self) -> int:
        return blocks_for(self.num_to_prefill, self.block_tokens)

    @property
    def prompt_blocks(self) -> TokenBytes:
        """The ids of the blocks that are prefilled, the last possibly partly filled."""
        return slice_tokens(self.request.block_ids, 0, self.num_blocks_to_prefill)

    @property
    def finish_step(self) -> int:
        """The step count of its decode worker when its last token is there."""
        return self.joined_step + self.num_to_decode

    def needs_next_block_of(self, other: Attempt) -> bool:
        """As `decode_worker.request.DecodeRequest.needs_next_block_of`."""
        num_blocks = other.num_computed // self.block_tokens + 1
        stop = num_blocks * self.block_tokens
        if stop >= self.num_to_prefill or stop > other.num_to_prefill:
            return False
        mine, others = self.request.block_ids, other.request.block_ids
        return slice_tokens(mine, 0, num_blocks) == slice_tokens(others, 0, num_blocks)

    def num_tokens_at(self, step: int) -> int:
        """Tokens with KV when the decode worker has counted `step` steps."""
        return self.num_to_prefill + step - self.joined_step

    def num_made_at(self, step: int) -> int:
        """Output tokens, those of earlier attempts included, at that moment."""
        return self.num_known + 1 + step - self.joined_step

    @property
    def held(self) -> BlockHold:
        assert self.hold is not None, f"request {self.request.index} has ended and holds nothing"
        return self.hold


@dataclass(slots=True)
class Course:
    """All that happened to one request."""

    request: Request
    attempts: list[Attempt] = field(default_factory=list)
    error: str | None = None
