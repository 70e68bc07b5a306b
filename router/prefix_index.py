"""Which worker holds the KV of which prefix. Exact, fed by the workers' Watch streams. Pure.

One bit per worker incarnation, one integer of owner bits per block name. The names lie in 256 dicts by
their top bits, because a single dict of millions of entries stops the event loop for seconds when it
grows. A worker's end clears its bit in `_alive` at once; its bits in the entries are swept out later, one
dict at a time, and only then is the bit given to another worker.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import xor

from pdserve.contract.ids import BlockHash, Incarnation

_NUM_SHARDS = 256
_SHARD_SHIFT = 56  # the top 8 of 64 bits


@dataclass(slots=True)
class _Slot:
    """What one worker incarnation has reported."""

    bit: int
    num_names: int = 0
    xor_names: int = 0


@dataclass(slots=True)
class _Retired:
    """A bit that may be used again once all shards before `next_shard` wraps around are swept."""

    bit: int
    next_shard: int = field(default=0)


class PrefixIndex:
    """Block name -> the workers that hold it."""

    def __init__(self) -> None:
        self._shards: list[dict[BlockHash, int]] = [{} for _ in range(_NUM_SHARDS)]
        self._slots: dict[Incarnation, _Slot] = {}
        self._owners: dict[int, Incarnation] = {}  # bit -> worker
        self._free_bits: list[int] = []
        self._num_bits = 0
        self._alive = 0
        self._retired: list[_Retired] = []

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
        for name in names:
            shard = self._shards[name >> _SHARD_SHIFT]
            owners = shard.get(name, 0)
            if not owners & slot.bit:
                shard[name] = owners | slot.bit
                slot.num_names += 1
                slot.xor_names ^= name

    def remove(self, worker: Incarnation, names: Iterable[BlockHash]) -> None:
        slot = self._slots[worker]
        for name in names:
            shard = self._shards[name >> _SHARD_SHIFT]
            owners = shard.get(name, 0)
            if owners & slot.bit:
                slot.num_names -= 1
                slot.xor_names ^= name
                _set_owners(shard, name, owners & ~slot.bit)

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
        found: list[tuple[int, int]] = []
        holders = self._alive
        for depth, name in enumerate(names):
            still = self._shards[name >> _SHARD_SHIFT].get(name, 0) & holders
            if still != holders:
                if depth:
                    found.append((depth, holders & ~still))
                holders = still
                if not holders:
                    break
        if holders and names:
            found.append((len(names), holders))
        found.reverse()
        return found

    def sweep(self) -> None:
        """Clear dead workers' bits in one shard each. Called now and then; never more than 1/256 of the
        index in one call and worker."""
        for retired in self._retired:
            shard = self._shards[retired.next_shard]
            for name in [name for name, owners in shard.items() if owners & retired.bit]:
                _set_owners(shard, name, shard[name] & ~retired.bit)
            retired.next_shard += 1
        self._free_bits += [retired.bit for retired in self._retired if retired.next_shard == _NUM_SHARDS]
        self._retired = [retired for retired in self._retired if retired.next_shard < _NUM_SHARDS]

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


def _set_owners(shard: dict[BlockHash, int], name: BlockHash, owners: int) -> None:
    if owners:
        shard[name] = owners
    else:
        del shard[name]
