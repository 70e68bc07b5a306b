"""Who holds which KV blocks, and when they may be given back.

Every block that is not free or cached is in at least one `BlockHold`; a hold belongs to one call and dies
with it. Releasing a hold gives its blocks back at once, unless an engine step or a copy that touches them
is still running: then at the moment when the last of these has finished. So nobody ever computes on, or
copies from, a block that is somebody else's by then.

    hold life:   open -> adopt_prefix -> grow ... -> release
                                                       |- untouched: blocks given back now
                                                       |- in a step or a copy: retiring, given back after it
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Protocol

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.ids import BlockId
from pdserve.contract.tokens import TokenBytes, slice_tokens
from pdserve.contract.work import BlockCounts


class Blocks(Protocol):
    """What the ledger needs of the block allocator (`pdserve.engine.block_allocator`)."""

    num_blocks: int
    block_size: int

    @property
    def num_free(self) -> int: ...
    @property
    def num_cached(self) -> int: ...
    @property
    def num_referenced(self) -> int: ...
    @property
    def num_available(self) -> int: ...
    def match(self, root: ChainRoot, tokens: TokenBytes) -> list[BlockId]: ...
    def allocate(self, count: int) -> list[BlockId]: ...
    def release(self, block_ids: Sequence[BlockId]) -> None: ...
    def publish(
        self, block_id: BlockId, root: ChainRoot, parent: BlockId | None, tokens: TokenBytes
    ) -> bool: ...
    def check_integrity(self) -> None: ...


class HoldKind(StrEnum):
    RESERVED = "reserved"
    """For a request whose sequence does not run yet."""
    ACTIVE = "active"
    """For a running sequence or prefill."""


class BlockHold:
    """The blocks of one call, in the order of its sequence. Made by `BlockLedger.open`."""

    def __init__(self, ledger: "BlockLedger", owner: str, kind: HoldKind) -> None:
        self.owner = owner
        self.kind = kind
        self.block_ids: list[BlockId] = []
        self.released = False
        self._ledger = ledger
        self._num_named = 0
        self._num_users = 0

    def adopt_prefix(self, root: ChainRoot, tokens: TokenBytes) -> int:
        """Pin the longest verified cached prefix of `tokens`; the number of its blocks. Once, at first."""
        assert not self.block_ids, "a prefix goes before all other blocks"
        self._extend(self._ledger.blocks.match(root, tokens))
        self._num_named = len(self.block_ids)
        return self._num_named

    def unpin(self) -> None:
        """Give an adopted prefix back, to be adopted again later. Not in a step or a copy."""
        assert not self._num_users, f"{self.owner} unpins blocks that are in use"
        self._ledger.return_blocks(self)
        self._num_named = 0

    def grow_to(self, num_blocks: int) -> None:
        """Hold at least `num_blocks`. Raises the allocator's OutOfBlocks and then holds what it held."""
        missing = num_blocks - len(self.block_ids)
        if missing > 0:
            self._extend(self._ledger.blocks.allocate(missing))

    def publish(self, root: ChainRoot, tokens: TokenBytes | bytearray, num_proven_tokens: int) -> None:
        """Name every full block among the first `num_proven_tokens` tokens, so that others may reuse it."""
        block_size = self._ledger.blocks.block_size
        while (self._num_named + 1) * block_size <= num_proven_tokens:
            index = self._num_named
            parent = self.block_ids[index - 1] if index else None
            of_block = slice_tokens(tokens, index * block_size, (index + 1) * block_size)
            self._ledger.blocks.publish(self.block_ids[index], root, parent, of_block)
            self._num_named += 1

    def activate(self) -> None:
        """The sequence runs now."""
        self._ledger.change_kind(self, HoldKind.ACTIVE)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around a step or a copy that touches the blocks: they are not given back before it has ended."""
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            if self.released and not self._num_users:
                self._ledger.give_back(self)

    @property
    def retiring(self) -> bool:
        """Released, but a step or copy still touches the blocks."""
        return self.released and self._num_users > 0

    def release(self) -> None:
        """The call has ended. Idempotent."""
        if not self.released:
            self.released = True
            if not self._num_users:
                self._ledger.give_back(self)

    def _extend(self, block_ids: Sequence[BlockId]) -> None:
        assert not self.released, f"{self.owner} grows after its release"
        self.block_ids.extend(block_ids)
        self._ledger.note_held(self, block_ids)


class BlockLedger:
    """All holds of one worker. `blocks allocated == sum over holds` at any moment."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks
        self._holds: set[BlockHold] = set()
        self._active_refs: dict[BlockId, int] = {}  # block -> how many ACTIVE holds have it

    def open(self, owner: str, kind: HoldKind = HoldKind.RESERVED) -> BlockHold:
        """A new, empty hold of `owner`, which is only a name for humans."""
        hold = BlockHold(self, owner, kind)
        self._holds.add(hold)
        return hold

    @property
    def num_available(self) -> int:
        """Blocks that could be allocated now: free, or cached and evictable."""
        return self.blocks.num_available

    @property
    def num_retiring(self) -> int:
        """Blocks in released holds, to be given back when the step or copy that touches them has ended."""
        return sum(len(hold.block_ids) for hold in self._holds if hold.retiring)

    def counts(self) -> BlockCounts:
        active = len(self._active_refs)
        return BlockCounts(
            free=self.blocks.num_free,
            cached=self.blocks.num_cached,
            reserved=self.blocks.num_referenced - active,
            active=active,
        )

    @property
    def holds(self) -> list[BlockHold]:
        """All that are not given back yet, in the order of their owners' names."""
        return sorted(self._holds, key=lambda hold: hold.owner)

    def owners(self) -> list[str]:
        """Who holds blocks, or will give them back after a running step or copy."""
        return sorted(hold.owner for hold in self._holds)

    def check_integrity(self) -> None:
        """Raises AssertionError when blocks and holds do not balance."""
        self.blocks.check_integrity()
        held = {block for hold in self._holds for block in hold.block_ids}
        assert len(held) == self.blocks.num_referenced, (
            f"{self.blocks.num_referenced} blocks are referenced, {len(held)} are in holds of {self.owners()}"
        )
        active: dict[BlockId, int] = {}
        for block in _blocks_of(hold for hold in self._holds if hold.kind is HoldKind.ACTIVE):
            active[block] = active.get(block, 0) + 1
        assert active == self._active_refs, "the count of active blocks is off"

    # Called by BlockHold only.

    def note_held(self, hold: BlockHold, block_ids: Sequence[BlockId]) -> None:
        if hold.kind is HoldKind.ACTIVE:
            for block in block_ids:
                self._active_refs[block] = self._active_refs.get(block, 0) + 1

    def change_kind(self, hold: BlockHold, kind: HoldKind) -> None:
        self._forget_active(hold)
        hold.kind = kind
        self.note_held(hold, hold.block_ids)

    def give_back(self, hold: BlockHold) -> None:
        self.return_blocks(hold)
        self._holds.discard(hold)

    def return_blocks(self, hold: BlockHold) -> None:
        self._forget_active(hold)
        self.blocks.release(hold.block_ids)
        hold.block_ids = []

    def _forget_active(self, hold: BlockHold) -> None:
        if hold.kind is HoldKind.ACTIVE:
            for block in hold.block_ids:
                left = self._active_refs[block] - 1
                if left:
                    self._active_refs[block] = left
                else:
                    del self._active_refs[block]


def _blocks_of(holds: Iterable[BlockHold]) -> Iterator[BlockId]:
    return (block for hold in holds for block in hold.block_ids)
