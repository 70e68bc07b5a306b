"""Which prompts are computed in the next step, and which job is made ready next. Pure."""

from collections.abc import Sequence

from pdserve.contract.work import StepCost
from pdserve.engine.chunking import PromptProgress, fill_step


def plan_chunks(
    prompts: Sequence[PromptProgress], chunk_tokens: int, cost: StepCost, budget_s: float
) -> list[int]:
    """How far each leading prompt gets in the next step; prompts come in the order of their turn."""
    return fill_step(prompts, chunk_tokens, cost, budget_s, spent_s=cost.fixed_s)


def wants_more(num_tokens_in_line: int, chunk_tokens: int) -> bool:
    """Whether another job should be made ready: while less than two chunks are in line, so that the
    reservation round trip of the next job hides behind the chunk that is being computed, and decode
    memory does not lie reserved for longer than that."""
    return num_tokens_in_line < 2 * chunk_tokens
