"""The workers that could take a request, as the router believes them to be at this moment."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pdserve.contract.ids import WorkerId
from pdserve.contract.work import StepCost


class Candidate(NamedTuple):
    """One usable worker, what was just sent there included.

    A tuple, because one is made for every booking and report, and a frozen dataclass takes three times as
    long to make."""

    worker_id: WorkerId
    fingerprint: str
    owner_bit: int
    """Its bit in `Held`; 0 while the prefix index knows nothing of it."""
    pool_tokens: int
    """Most tokens that its KV pool can ever hold of one sequence."""
    free_tokens: int
    """Tokens of KV that it can still take: free and evictable blocks that nothing sent there will fill."""
    num_requests: int
    """That are there and have not ended."""
    queued_prefill_tokens: int
    """Prompt tokens that it has yet to compute."""
    running_sequences: int
    """Sequences that decode there, or will once their prompt is computed, there or elsewhere."""
    context_tokens: int
    """Tokens of KV of those sequences."""
    num_cached_blocks: int
    """Blocks that the prefix index knows there."""
    cost: StepCost
    """How long its steps take."""
    prefill_share: float = 1.0
    """Most of its time that prompts may take while sequences run beside them."""

    @property
    def queued_tokens(self) -> int:
        """Tokens that it has to work through already."""
        return self.queued_prefill_tokens + self.context_tokens

    @property
    def load_s(self) -> float:
        """Seconds in which it would compute every waiting prompt and one token of every sequence."""
        return self.cost.predict_s(self.queued_prefill_tokens, self.running_sequences, self.context_tokens)


class Held(NamedTuple):
    """Who holds, or is about to hold, how much of one prompt."""

    depths: Sequence[tuple[int, int]] = ()
    """(leading prompt tokens, bits of the workers that hold so many), the deepest first. A worker's first
    occurrence counts."""

    def tokens(self, candidate: Candidate) -> int:
        """Leading prompt tokens whose KV `candidate` holds."""
        bit = candidate.owner_bit
        for num_tokens, bits in self.depths:
            if bits & bit:
                return num_tokens
        return 0


class Pool:
    """The usable workers of one kind, the least loaded first. The fleet keeps it up to date."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._candidates: dict[WorkerId, Candidate] = {}
        self._order: list[tuple[float, WorkerId]] = []  # (load in seconds, worker), ascending
        for candidate in candidates:
            self.put(candidate)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Candidate]:
        return (self._candidates[worker_id] for _, worker_id in self._order)

    def get(self, worker_id: WorkerId) -> Candidate | None:
        return self._candidates.get(worker_id)

    def of(self, fingerprint: str) -> "Pool":
        """Those that serve the model of that fingerprint."""
        return Pool(each for each in self if each.fingerprint == fingerprint)

    def put(self, candidate: Candidate) -> None:
        """Add a worker, or replace what was believed of it."""
        self.remove(candidate.worker_id)
        self._candidates[candidate.worker_id] = candidate
        insort(self._order, (candidate.load_s, candidate.worker_id))

    def remove(self, worker_id: WorkerId) -> None:
        """Forget a worker, if it is there."""
        former = self._candidates.pop(worker_id, None)
        if former is not None:
            del self._order[bisect_left(self._order, (former.load_s, worker_id))]
