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
