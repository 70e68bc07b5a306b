"""Who gets blocks, who gives them up, and what the next step computes. Pure."""

from collections.abc import Sequence

from pdserve.contract.work import StepCost
from pdserve.engine.chunking import PromptProgress, fill_step


def may_reserve(num_missing: int, num_available: int, num_running: int, growth_reserve: int) -> bool:
    """Whether a new request may reserve `num_missing` blocks: every running sequence keeps room to grow by
    `growth_reserve` blocks."""
    return num_available - growth_reserve * num_running >= num_missing


def choose_victim(num_reserved: int, num_running: int) -> str | None:
    """Whom to send back so that the running sequences can grow.

    "reserved": the newest of the requests that have reserved but do not run. "running": the newest running
    sequence. None: only the oldest is left, and it is never sent back.
    """
    if num_reserved:
        return "reserved"
    return "running" if num_running > 1 else None


class PrefillQuota:
    """Caps the share of a worker's time that goes into its own prompts while sequences run: a debt grows with
    the time that prompts took, and shrinks by `share` of all time."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._debt_s = 0.0

    def allows(self, num_decoding: int) -> bool:
        """Whether the next step may compute prompts beside `num_decoding` sequences."""
        return not num_decoding or self._debt_s <= 0

    def note_step(self, num_decoding: int, prefill_s: float, step_s: float) -> None:
        """A step of `step_s` has spent `prefill_s` on prompts. Time without running sequences is free."""
        owed_s = self._debt_s + prefill_s - self._share * step_s if num_decoding else 0.0
        self._debt_s = max(0.0, owed_s)


def plan_chunks(
    prompts: Sequence[PromptProgress],
    chunk_tokens: int,
    cost: StepCost,
    budget_s: float,
    num_decoding: int,
    num_context_tokens: int,
) -> list[int]:
    """How far each leading prompt gets in a step that also decodes `num_decoding` sequences."""
    spent_s = cost.predict_s(0, num_decoding, num_context_tokens)
    return fill_step(prompts, chunk_tokens, cost, budget_s, spent_s)
