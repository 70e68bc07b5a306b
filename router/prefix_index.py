"""Which worker holds the KV of which prefix. Exact, fed by the workers' Watch streams. Pure.

One bit per worker incarnation, one integer of owner bits per block name. Equal integers are one object, so
that hundreds of workers cost no more memory a block than one. The names lie in 256 dicts by their top bits,
because a single dict of millions of entries stops the event loop for seconds when it grows; the dicts differ
in size by up to a factor of two, evenly, so that they do not grow all at once either. A worker's end clears
its bit in `_alive` at once; its bits in the entries are swept out later, one dict at a time, and only then is
the bit given to another worker.

Workers evict a prefix from its end, so who holds a block holds all before it: lookups bisect over the depth.
Where a probe shows that it is not so, all blocks are walked.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from operator import xor

from pdserve.contract.ids import BlockHash, Incarnation

_NUM_SHARDS = 256
_SLICE_SHIFT = 48
_NUM_SLICES = 1 << (64 - _SLICE_SHIFT)
"""Names by their top 16 bits; a shard has a number of such slices."""
_MAX_MASKS = 1 << 16
"""How many sets of owners are remembered as one object each. More are forgotten, which costs memory only."""
_FEW_BLOCKS = 8
"""Prompts so short are walked."""


@dataclass(slots=True)
class _Slot:
    """What one worker incarnation has reported."""

    bit: int
    num_names: int = 0
    xor_names: int = 0


@dataclass(slots=True)
class _Retired:
    """A bit that may be used again once so many more shards are swept."""

    bit: int
    num_shards_left: int = _NUM_SHARDS


class PrefixIndex:
    """Block name -> the workers that hold it."""

    def __init__(self) -> None:
        self._shards: list[dict[BlockHash, int]] = [{} for _ in range(_NUM_SHARDS)]
        self._shard_of = [self._shards[index] for index in _shard_of_slices()]  # top bits -> shard
        self._masks: dict[int, int] = {}  # owner bits -> the one object for them
        self._slots: dict[Incarnation, _Slot] = {}
        self._owners: dict[int, Incarnation] = {}  # bit -> worker
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._alive = 0
        self._retired: list[_Retired] = []
        self._next_shard = 0  # to be swept

    @property
    def num_names(self) -> int:
        return sum(len(shard) for shard in self._shards)

    def add_worker(self, worker: Incarnation) -> None:
        """Start with no names for `worker`; what it had reported before is forgotten."""
        self.remove_worker(worker)
        bit = self._free_bits.pop() if self._free_bits else self._new_bit()
        self._slots[worker] = _Slot(bit)
        self._owners[bit] = worker
        self._alive |= bit

    def remove_worker(self, worker: Incarnation) -> None:
        """The worker's names do not count any more. Its entries are swept later."""
        slot = self._slots.pop(worker, None)
        if slot is not None:
            self._alive &= ~slot.bit
            del self._owners[slot.bit]
            self._retired.append(_Retired(slot.bit))

    def store(self, worker: Incarnation, names: Iterable[BlockHash]) -> None:
        slot = self._slots[worker]
        bit, shard_of = slot.bit, self._shard_of
        added, xor_names = 0, slot.xor_names
        for name in names:
            shard = shard_of[name >> _SLICE_SHIFT]
            owners = shard.get(name)
            if owners is None:
                shard[name] = bit
            elif owners & bit:
                continue
            else:
                shard[name] = self._one(owners | bit)
            added += 1
            xor_names ^= name
        slot.num_names += added
        slot.xor_names = xor_names

    def remove(self, worker: Incarnation, names: Iterable[BlockHash]) -> None:
        slot = self._slots[worker]
        for name in names:
            shard = self._shard_of[name >> _SLICE_SHIFT]
            owners = shard.get(name, 0)
            if owners & slot.bit:
                slot.num_names -= 1
                slot.xor_names ^= name
                self._set_owners(shard, name, owners & ~slot.bit)

    def agrees(self, worker: Incarnation, num_names: int, xor_names: int) -> bool:
        """Whether this index knows exactly the names that the worker says it holds."""
        slot = self._slots[worker]
        return slot.num_names == num_names and slot.xor_names == xor_names

    def bit_of(self, worker: Incarnation) -> int:
        """The worker's bit in what `holders` returns; 0 for one that is not known."""
        slot = self._slots.get(worker)
        return 0 if slot is None else slot.bit

    def num_names_of(self, worker: Incarnation) -> int:
        """How many blocks a worker holds; 0 for one that is not known."""
        slot = self._slots.get(worker)
        return 0 if slot is None else slot.num_names

    def holders(self, names: Sequence[BlockHash]) -> list[tuple[int, int]]:
        """Who holds how many leading blocks of a prompt: (blocks, bits of the workers that hold just so
        many), the deepest first. Workers that hold none are left out."""
        if not names or not self._alive:
            return []
        owners = [self._alive_owners(names[0]), self._alive_owners(names[-1])]
        found = None if len(names) <= _FEW_BLOCKS else self._bisect(names, *owners)
        return self._walk(names) if found is None else found

    def _bisect(self, names: Sequence[BlockHash], first: int, last: int) -> list[tuple[int, int]] | None:
        """`holders`, from the owners of the first and last block, by looking between blocks whose owners
        differ. None when somebody holds a block and not one before it."""
        found = [(len(names), last)] if last else []
        spans = [(0, first, len(names) - 1, last)]  # between these blocks; the deepest is looked at first
        while spans:
            low, low_owners, high, high_owners = spans.pop()
            if high_owners & ~low_owners:
                return None
            if low_owners == high_owners:
                continue
            if high - low == 1:
                found.append((high, low_owners & ~high_owners))
                continue
            middle = (low + high) // 2
            owners = self._alive_owners(names[middle])
            spans.append((low, low_owners, middle, owners))
            spans.append((middle, owners, high, high_owners))
        return found

    def _walk(self, names: Sequence[BlockHash]) -> list[tuple[int, int]]:
        """`holders`, block by block."""
        found: list[tuple[int, int]] = []
        holders = self._alive
        for depth, name in enumerate(names):
            still = self._alive_owners(name) & holders
            if still != holders:
                if depth:
                    found.append((depth, holders & ~still))
                holders = still
                if not holders:
                    break
        else:
            found.append((len(names), holders))
        found.reverse()
        return found

    def _alive_owners(self, name: BlockHash) -> int:
        return self._shard_of[name >> _SLICE_SHIFT].get(name, 0) & self._alive

    def sweep(self) -> None:
        """Clear all dead workers' bits in one shard. Called now and then; one call never looks at more than
        about 1/256 of the index, however many have died."""
        if not self._retired:
            return
        dead = 0
        for retired in self._retired:
            dead |= retired.bit
            retired.num_shards_left -= 1
        shard = self._shards[self._next_shard]
        self._next_shard = (self._next_shard + 1) % _NUM_SHARDS
        for name in [name for name, owners in shard.items() if owners & dead]:
            self._set_owners(shard, name, shard[name] & ~dead)
        self._free_bits += [retired.bit for retired in self._retired if not retired.num_shards_left]
        self._retired = [retired for retired in self._retired if retired.num_shards_left]

    def check_integrity(self) -> None:
        """Raises AssertionError unless the entries add up to what is counted for each worker. O(entries)."""
        for worker, slot in self._slots.items():
            names = [name for shard in self._shards for name, owners in shard.items() if owners & slot.bit]
            assert len(names) == slot.num_names, (
                f"worker {worker:016x} has {len(names)} entries, {slot.num_names} are counted"
            )
            assert reduce(xor, names, 0) == slot.xor_names, (
                f"worker {worker:016x} has other names than counted"
            )
        alive = sum(slot.bit for slot in self._slots.values())
        assert alive == self._alive, "a worker that is gone counts as alive"

    def _new_bit(self) -> int:
        self._num_bits += 1
        return 1 << (self._num_bits - 1)

    def _set_owners(self, shard: dict[BlockHash, int], name: BlockHash, owners: int) -> None:
        if owners:
            shard[name] = self._one(owners)
        else:
            del shard[name]

    def _one(self, owners: int) -> int:
        """The one object for these owner bits."""
        if len(self._masks) >= _MAX_MASKS:
            self._masks.clear()
        return self._masks.setdefault(owners, owners)


def _shard_of_slices() -> list[int]:
    """Slice -> shard. Shard i has about 2 ** (i / _NUM_SHARDS) as many slices as the first: however many
    names there are, the next dict grows a while after the last one."""
    weights = [2 ** (index / _NUM_SHARDS) for index in range(_NUM_SHARDS)]
    ends = [round(end * _NUM_SLICES / sum(weights)) for end in accumulate(weights)]
    return [index for index, (start, end) in enumerate(pairwise([0, *ends])) for _ in range(start, end)]
