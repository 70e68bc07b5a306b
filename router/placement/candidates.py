"""The workers that could take a request, as the router believes them to be at this moment."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from pdserve.contract.ids import WorkerId
from pdserve.contract.work import StepCost

_FEW = 8
"""So many owners are looked up one by one; of more, one is soon met among the least loaded."""


_NUM_STEPS = 64

_Place = tuple[float, int, WorkerId]
"""(load in seconds, number of the `put`, worker)."""


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
    chunk_tokens: int
    """It computes prompts in steps of so many tokens."""
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
        """What orders a pool: seconds for every waiting prompt, and for its sequences' rows in the next
        _NUM_STEPS steps, since they are in the way of whoever comes for longer than one."""
        cost = self.cost
        row_s = cost.per_decode_sequence_s * self.running_sequences
        row_s += cost.per_context_token_s * self.context_tokens
        return cost.per_prefill_token_s * self.queued_prefill_tokens + _NUM_STEPS * row_s


class Held(NamedTuple):
    """Who holds, or is about to hold, how much of one prompt."""

    depths: Sequence[tuple[int, int]] = ()
    """(leading prompt tokens, bits of the workers that hold so many), the deepest first. A worker's first
    occurrence counts."""
    here: Sequence[tuple[int, int]] | None = None
    """The same without KV that is on its way from another worker; None: there is none."""

    def tokens(self, candidate: Candidate) -> int:
        """Leading prompt tokens whose KV `candidate` holds."""
        return _leading(self.depths, candidate)

    def tokens_here(self, candidate: Candidate) -> int:
        """Those that `candidate` need not compute if it starts now: what is on its way comes too late."""
        return _leading(self.depths if self.here is None else self.here, candidate)


def _leading(depths: Sequence[tuple[int, int]], candidate: Candidate) -> int:
    bit = candidate.owner_bit
    for num_tokens, bits in depths:
        if bits & bit:
            return num_tokens
    return 0


class Pool:
    """The usable workers of one kind, the least loaded first; of equals the one that has been put there
    longest ago, so that idle workers take turns and all their caches fill. The fleet keeps it up to date."""

    def __init__(self, candidates: Iterable[Candidate] = ()) -> None:
        self._candidates: dict[WorkerId, Candidate] = {}
        self._order: list[_Place] = []  # ascending
        self._places: dict[WorkerId, _Place] = {}
        self._num_puts = 0
        self._by_bit: dict[int, Candidate] = {}  # owner bit -> who has it; none has bit 0
        self._bits = 0  # all of these
        for candidate in candidates:
            self.put(candidate)

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Candidate]:
        return (self._candidates[worker_id] for _, _, worker_id in self._order)

    def get(self, worker_id: WorkerId) -> Candidate | None:
        return self._candidates.get(worker_id)

    def of(self, fingerprint: str) -> "Pool":
        """Those that serve the model of that fingerprint."""
        return Pool(each for each in self if each.fingerprint == fingerprint)

    def least_loaded(self, num: int, least_pool_tokens: int) -> Iterator[Candidate]:
        """The `num` least loaded whose KV pool takes so many tokens, in that order."""
        return islice((each for each in self if each.pool_tokens >= least_pool_tokens), num)

    def least_loaded_of(self, bits: int, least_pool_tokens: int) -> Candidate | None:
        """The least loaded of the workers with these owner bits whose KV pool takes so many tokens."""
        bits &= self._bits
        only = self._by_bit.get(bits)
        if not bits or only is not None:
            return None if only is None or only.pool_tokens < least_pool_tokens else only
        if bits.bit_count() > _FEW:
            owners = (each for each in self if each.owner_bit & bits)
            return next((each for each in owners if each.pool_tokens >= least_pool_tokens), None)
        few = [self._by_bit[bit] for bit in _single_bits(bits)]
        fitting = [each for each in few if each.pool_tokens >= least_pool_tokens]
        return min(fitting, key=lambda each: each.load_s, default=None)

    def put(self, candidate: Candidate) -> None:
        """Add a worker, or replace what was believed of it."""
        worker_id = candidate.worker_id
        self.remove(worker_id)
        self._num_puts += 1
        place = (candidate.load_s, self._num_puts, worker_id)
        self._candidates[worker_id] = candidate
        if candidate.owner_bit:
            self._by_bit[candidate.owner_bit] = candidate
            self._bits |= candidate.owner_bit
        self._places[worker_id] = place
        insort(self._order, place)

    def remove(self, worker_id: WorkerId) -> None:
        """Forget a worker, if it is there."""
        place = self._places.pop(worker_id, None)
        if place is not None:
            del self._order[bisect_left(self._order, place)]
            bit = self._candidates.pop(worker_id).owner_bit
            self._by_bit.pop(bit, None)
            self._bits &= ~bit


def _single_bits(bits: int) -> Iterator[int]:
    while bits:
        bit = bits & -bits
        yield bit
        bits ^= bit
