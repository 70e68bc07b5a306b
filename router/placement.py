"""Which workers serve a request. Pure: everything it looks at is an argument.

The rule, for prefill and decode workers alike: most prompt tokens held minus tokens queued. Near ties
rotate, so that equal workers share the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pdserve.contract.ids import WorkerId


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker that could take the request."""

    worker_id: WorkerId
    fingerprint: str
    held_tokens: int
    """Leading prompt tokens whose KV it holds."""
    queued_tokens: int
    """Tokens that it has to work through already, what was just sent there included."""

    @property
    def score(self) -> int:
        return self.held_tokens - self.queued_tokens


@dataclass(frozen=True, slots=True)
class Placement:
    """`prefill` None: the decode worker computes the prompt itself."""

    decode: WorkerId
    prefill: WorkerId | None
    reason: str


def choose(
    decode: Sequence[Candidate],
    prefill: Sequence[Candidate],
    unusable_pairs: frozenset[tuple[WorkerId, WorkerId]],
    turn: int,
) -> Placement | None:
    """Place a request; None when no decode worker can take it.

    `unusable_pairs` are (prefill, decode) pairs whose last hand-off failed a moment ago. `turn` counts
    placements and rotates ties.
    """
    best_decode = _best(decode, turn)
    if best_decode is None:
        return None
    sources = [
        candidate
        for candidate in prefill
        if candidate.fingerprint == best_decode.fingerprint
        and (candidate.worker_id, best_decode.worker_id) not in unusable_pairs
    ]
    best_prefill = _best(sources, turn)
    if best_prefill is None:
        why = _why_local(best_decode, prefill)
        return Placement(best_decode.worker_id, None, f"local: {why}; {_explain(best_decode)}")
    reason = f"split: {_explain(best_prefill)}; {_explain(best_decode)}"
    return Placement(best_decode.worker_id, best_prefill.worker_id, reason)


def _why_local(decode: Candidate, prefill: Sequence[Candidate]) -> str:
    if not prefill:
        return "no prefill worker"
    if all(candidate.fingerprint != decode.fingerprint for candidate in prefill):
        return f"no prefill worker has KV that fits {decode.worker_id} (model, revision, dtype, block size)"
    return "no prefill worker fits this decode worker now"


def _best(candidates: Sequence[Candidate], turn: int) -> Candidate | None:
    if not candidates:
        return None
    best_score = max(candidate.score for candidate in candidates)
    best = [candidate for candidate in candidates if candidate.score == best_score]
    return best[turn % len(best)]


def _explain(candidate: Candidate) -> str:
    return f"{candidate.worker_id} holds {candidate.held_tokens}, queues {candidate.queued_tokens}"
