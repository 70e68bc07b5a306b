"""Who holds which block of the KV pool, and which unheld blocks are still worth keeping.

A block is in one of three states:

    free         unnamed, held by nobody
    referenced   held by one or more sequences, calls or copies; named once it is full and published
    cached       named, held by nobody; evicted when room is needed

Named blocks form trees: a block's parent is the physical block that holds the tokens before it. A block
must not lose its name while a named descendant is in use, and a parent must not go before its children.
Both follow from one number per block, its pins:

    pins(block) = references to it + its named children that have pins

A named block without pins is evictable. A block gets its last pin off only after all its children did, and
joins the end of the eviction queue at that moment; a child that gets a pin takes its whole ancestry out of
the queue. So in the queue children always stand before their parents, and the block at its head is both the
least recently used one and a leaf. Nothing is ever searched.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pdserve.contract.block_names import ChainRoot, max_shared_blocks, name_blocks
from pdserve.contract.ids import BlockHash, BlockId
from pdserve.contract.tokens import BYTES_PER_TOKEN, TokenBytes, num_tokens, slice_tokens

NameBlocks = Callable[[TokenBytes, int, int], list[BlockHash]]
"""(tokens, block size, parent name or root seed) -> names of the full blocks."""


class OutOfBlocks(Exception):
    """Fewer blocks are free or evictable than were asked for. Nothing was taken."""

    def __init__(self, needed: int, available: int):
        super().__init__(f"{needed} KV blocks needed, {available} free or evictable")
        self.needed = needed
        self.available = available


class BlockAllocator:
    """References, names and eviction order of the `num_blocks` rows of one KV pool.

    Pure and deterministic. Every method but `all_names` and `check_integrity` costs O(blocks it touches),
    amortised over the pins that it takes and drops.
    """

    def __init__(self, num_blocks: int, block_size: int, name_blocks: NameBlocks = name_blocks):
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs blocks and tokens in them, got {num_blocks=}, {block_size=}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._name_blocks = name_blocks
        self._free = [BlockId(row) for row in reversed(range(num_blocks))]  # a stack: row 0 goes first
        self._references = [0] * num_blocks
        self._pins = [0] * num_blocks
        self._generations = [0] * num_blocks  # how often the row has lost a name
        self._named: dict[BlockId, _Named] = {}
        self._by_name: dict[BlockHash, BlockId] = {}
        self._evictable: OrderedDict[BlockId, None] = OrderedDict()  # least recently used first
        self._twins: dict[BlockId, _Twin] = {}  # unnamed copy -> the named block with the same content
        self._num_cached = 0
        self._changes = _NameChanges()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Named blocks held by nobody; those that a held descendant pins are among them."""
        return self._num_cached

    @property
    def num_referenced(self) -> int:
        return self.num_blocks - len(self._free) - self._num_cached

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` can give now: the free and the evictable ones."""
        return len(self._free) + len(self._evictable)

    @property
    def num_names(self) -> int:
        return len(self._by_name)

    @property
    def xor_names(self) -> int:
        """Xor of all names, 0 when there are none."""
        return self._changes.xor

    def all_names(self) -> list[BlockHash]:
        """Every name, in the order in which they were given; parents stand before their children."""
        return list(self._by_name)

    def take_changes(self) -> tuple[list[BlockHash], list[BlockHash]]:
        """Names (stored, removed) since the last call, net: what came and went, or went and came back, is
        in neither."""
        return self._changes.take()

    def match(self, root: ChainRoot, tokens: TokenBytes) -> list[BlockId]:
        """The longest cached prefix of `tokens`, with one reference taken on each block.

        Leaves at least the last token to be computed. Names find the blocks; token ids, physical parents
        and the root's digest prove them, so a collision of names only makes the match shorter.
        """
        block_ids = self._find(root, tokens)
        self.share(block_ids)
        return block_ids

    def peek(self, root: ChainRoot, tokens: TokenBytes) -> int:
        """How many blocks `match` would return. Changes nothing."""
        return len(self._find(root, tokens))

    def allocate(self, count: int) -> list[BlockId]:
        """`count` unnamed blocks with one reference each, free ones first, then evicted ones.

        Raises OutOfBlocks, and takes nothing, when there are not enough.
        """
        if count > self.num_available:
            raise OutOfBlocks(count, self.num_available)
        block_ids = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block_id in block_ids:
            self._references[block_id] = self._pins[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[BlockId]) -> None:
        """Take one more reference on each block. Raises ValueError for a free one."""
        for block_id in block_ids:
            if not self._references[block_id]:
                self._revive(block_id)
            self._references[block_id] += 1
            self._pin(block_id)

    def release(self, block_ids: Iterable[BlockId]) -> None:
        """Drop one reference on each block. The last one makes a named block cached, as the most recently
        used, and any other free. Raises ValueError when there is no reference to drop."""
        for block_id in block_ids:
            if not self._references[block_id]:
                raise ValueError(f"block {block_id} is released but held by nobody; it was released twice")
            self._references[block_id] -= 1
            if block_id in self._named:
                self._release_named(block_id)
            else:
                self._release_unnamed(block_id)

    def publish(self, block_id: BlockId, root: ChainRoot, parent: BlockId | None, tokens: TokenBytes) -> bool:
        """Give a full, referenced block its name, so that others can match it. Says whether it has it now.

        `parent` holds the tokens before `tokens`; None starts a chain. A name belongs to one block: when
        another one has it already, this one stays unnamed and False is returned. When that other block has
        the same content, it stands in as the parent of what is published after this one, for as long as it
        keeps its name; without a named parent or such a stand-in False is returned as well.

        Raises ValueError when the block is not held, `tokens` is not one full block, or `root` or an
        earlier publication of this block contradicts.
        """
        if not self._references[block_id]:
            raise ValueError(f"block {block_id} is published but held by nobody")
        if len(tokens) != self.block_size * BYTES_PER_TOKEN:
            raise ValueError(f"a block of {self.block_size} tokens got {num_tokens(tokens)} to be named by")
        named_parent = None if parent is None else self._stand_in(parent)
        if parent is not None and named_parent is None:
            return False
        record = self._describe(root, named_parent, tokens)
        if block_id in self._named:
            return self._confirm(block_id, record)
        return self._give_name(block_id, record)

    def check_integrity(self) -> None:
        """Raise AssertionError naming the first thing that is wrong. O(num_blocks)."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        for row in range(self.num_blocks):
            self._check_row(BlockId(row), free)
        self._check_names()
        self._check_pins()
        self._check_eviction_order()

    def _find(self, root: ChainRoot, tokens: TokenBytes) -> list[BlockId]:
        limit = max_shared_blocks(num_tokens(tokens), self.block_size)
        stride = self.block_size * BYTES_PER_TOKEN
        shared = slice_tokens(tokens, 0, limit * self.block_size)
        found: list[BlockId] = []
        parent: BlockId | None = None
        for index, name in enumerate(self._name_blocks(shared, self.block_size, root.seed)):
            block_id = self._by_name.get(name)
            content = shared[index * stride : (index + 1) * stride]
            if block_id is None or not self._proves(block_id, root, parent, content):
                break
            found.append(block_id)
            parent = block_id
        return found

    def _proves(self, block_id: BlockId, root: ChainRoot, parent: BlockId | None, tokens: TokenBytes) -> bool:
        """Whether the named block holds `tokens` after `parent`, in the chain of `root`."""
        record = self._named[block_id]
        return (
            record.tokens == tokens
            and record.parent == parent
            and record.parent_generation == self._generation(parent)
            and record.root_digest == root.digest
        )

    def _generation(self, block_id: BlockId | None) -> int:
        return 0 if block_id is None else self._generations[block_id]

    def _revive(self, block_id: BlockId) -> None:
        if block_id not in self._named:
            raise ValueError(f"block {block_id} is shared but free; its last holder has released it")
        self._num_cached -= 1

    def _release_named(self, block_id: BlockId) -> None:
        if not self._references[block_id]:
            self._num_cached += 1
        self._unpin(block_id)

    def _release_unnamed(self, block_id: BlockId) -> None:
        self._pins[block_id] -= 1
        if not self._references[block_id]:
            self._twins.pop(block_id, None)
            self._free.append(block_id)

    def _pin(self, block_id: BlockId | None) -> None:
        """Add a pin. The first one of a named block leaves the eviction queue and pins the parent."""
        while block_id is not None:
            self._pins[block_id] += 1
            if self._pins[block_id] > 1:
                return
            del self._evictable[block_id]
            block_id = self._named[block_id].parent

    def _unpin(self, block_id: BlockId | None) -> None:
        """Drop a pin of a named block. The last one joins the eviction queue and unpins the parent."""
        while block_id is not None:
            self._pins[block_id] -= 1
            if self._pins[block_id]:
                return
            self._evictable[block_id] = None
            block_id = self._named[block_id].parent

    def _evict(self) -> BlockId:
        """Take the name off the least recently used evictable block. It has no children and no pins."""
        block_id, _ = self._evictable.popitem(last=False)
        record = self._named.pop(block_id)
        del self._by_name[record.name]
        self._generations[block_id] += 1
        self._num_cached -= 1
        self._changes.remove(record.name)
        return block_id

    def _stand_in(self, block_id: BlockId) -> BlockId | None:
        """The named block with this block's content: itself, or the twin while that keeps its name."""
        if block_id in self._named:
            return block_id
        twin = self._twins.get(block_id)
        if twin is None or self._generations[twin.block_id] != twin.generation:
            return None
        return twin.block_id

    def _describe(self, root: ChainRoot, parent: BlockId | None, tokens: TokenBytes) -> "_Named":
        parent_name = root.seed if parent is None else self._named[parent].name
        if parent is not None and self._named[parent].root_digest != root.digest:
            raise ValueError(f"parent block {parent} belongs to a chain with another root")
        (name,) = self._name_blocks(tokens, self.block_size, parent_name)
        return _Named(name, bytes(tokens), parent, self._generation(parent), root.digest)

    def _confirm(self, block_id: BlockId, record: "_Named") -> bool:
        if self._named[block_id] != record:
            raise ValueError(f"block {block_id} is already named for other tokens or after another parent")
        return True

    def _give_name(self, block_id: BlockId, record: "_Named") -> bool:
        holder = self._by_name.get(record.name)
        if holder is not None:
            if self._named[holder] == record:
                self._twins[block_id] = _Twin(holder, self._generations[holder])
            return False
        self._by_name[record.name] = block_id
        self._named[block_id] = record
        self._twins.pop(block_id, None)
        self._pin(record.parent)
        self._changes.store(record.name)
        return True

    def _check_row(self, block_id: BlockId, free: set[BlockId]) -> None:
        held = self._references[block_id] > 0
        named = block_id in self._named
        assert self._references[block_id] >= 0, f"block {block_id} has negative references"
        assert (block_id in free) == (not held and not named), f"block {block_id} is lost or free while used"
        twin_allowed = held and not named
        assert twin_allowed or block_id not in self._twins, f"block {block_id} is a twin but not a held copy"

    def _check_names(self) -> None:
        names = {record.name: block_id for block_id, record in self._named.items()}
        assert names == self._by_name, "names and named blocks disagree"
        xor = 0
        for name in names:
            xor ^= name
        assert xor == self.xor_names, "the running xor of names is wrong"
        cached = sum(not self._references[block_id] for block_id in self._named)
        assert cached == self._num_cached, f"{cached} blocks are cached but {self._num_cached} are counted"

    def _check_pins(self) -> None:
        pins = list(self._references)
        for block_id, record in self._named.items():
            if record.parent is None:
                continue
            assert record.parent in self._named, f"block {block_id} outlived its parent {record.parent}"
            generation = self._generations[record.parent]
            assert record.parent_generation == generation, f"block {block_id} names an older parent"
            pins[record.parent] += self._pins[block_id] > 0
        assert pins == self._pins, "pins are not references plus pinned children"
        unpinned = {block_id for block_id in self._named if not pins[block_id]}
        assert unpinned == set(self._evictable), "the eviction queue is not the named blocks without pins"

    def _check_eviction_order(self) -> None:
        passed: set[BlockId] = set()
        for block_id in self._evictable:
            parent = self._named[block_id].parent
            assert parent not in passed, f"block {parent} would be evicted before its child {block_id}"
            passed.add(block_id)


@dataclass(frozen=True, slots=True)
class _Named:
    """What proves that a block is what its name says."""

    name: BlockHash
    tokens: TokenBytes
    parent: BlockId | None
    parent_generation: int
    root_digest: bytes


@dataclass(frozen=True, slots=True)
class _Twin:
    """The named block with the content of an unnamed one, valid while it is of this generation."""

    block_id: BlockId
    generation: int


class _NameChanges:
    """Running xor of the names, and what has changed since it was last asked for."""

    def __init__(self) -> None:
        self.xor = 0
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def store(self, name: BlockHash) -> None:
        self._note(name, self._stored, self._removed)

    def remove(self, name: BlockHash) -> None:
        self._note(name, self._removed, self._stored)

    def take(self) -> tuple[list[BlockHash], list[BlockHash]]:
        changes = list(self._stored), list(self._removed)
        self._stored.clear()
        self._removed.clear()
        return changes

    def _note(self, name: BlockHash, into: dict[BlockHash, None], undoes: dict[BlockHash, None]) -> None:
        self.xor ^= name
        if name in undoes:
            del undoes[name]
        else:
            into[name] = None
