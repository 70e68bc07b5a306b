"""The block allocator against a brute-force model of what it promises."""

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pdserve.contract.block_names import ChainRoot, name_blocks
from pdserve.contract.ids import BlockHash, BlockId
from pdserve.contract.tokens import TokenBytes, pack_tokens
from pdserve.engine.block_allocator import BlockAllocator, NameBlocks, OutOfBlocks

BLOCK_SIZE = 2
ROOT = ChainRoot("model")
OTHER_ROOT = ChainRoot("model", salt="another tenant")


def tokens_of(*token_ids: int) -> TokenBytes:
    return pack_tokens(token_ids)


def blocks_of(tokens: TokenBytes) -> list[TokenBytes]:
    """The full blocks of a prompt."""
    stride = BLOCK_SIZE * 4
    return [tokens[end - stride : end] for end in range(stride, len(tokens) + 1, stride)]


def fill(allocator: BlockAllocator, tokens: TokenBytes, root: ChainRoot = ROOT) -> list[BlockId]:
    """Hold all full blocks of a prompt, matched or newly named."""
    block_ids = allocator.match(root, tokens)
    contents = blocks_of(tokens)
    block_ids += allocator.allocate(len(contents) - len(block_ids))
    publish_all(allocator, block_ids, contents, root)
    return block_ids


def publish_all(
    allocator: BlockAllocator, block_ids: list[BlockId], contents: list[TokenBytes], root: ChainRoot = ROOT
) -> list[bool]:
    parents = [None, *block_ids]
    rows = zip(block_ids, parents, contents, strict=False)
    return [allocator.publish(block_id, root, parent, content) for block_id, parent, content in rows]


def colliding(num_names: int) -> NameBlocks:
    """The real names, crowded into `num_names` different ones."""

    def crowded(tokens: TokenBytes, block_size: int, parent: int) -> list[BlockHash]:
        names: list[BlockHash] = []
        for block in blocks_of(tokens):
            (name,) = name_blocks(block, block_size, parent)
            parent = name % num_names
            names.append(BlockHash(parent))
        return names

    return crowded


def test_new_pool_gives_its_rows_in_order() -> None:
    allocator = BlockAllocator(4, BLOCK_SIZE)
    assert allocator.allocate(4) == [0, 1, 2, 3]
    assert (allocator.num_free, allocator.num_referenced, allocator.num_available) == (0, 4, 0)


def test_a_failed_allocation_takes_nothing_and_says_what_was_missing() -> None:
    allocator = BlockAllocator(4, BLOCK_SIZE)
    allocator.allocate(1)
    with pytest.raises(OutOfBlocks) as failure:
        allocator.allocate(4)
    assert (failure.value.needed, failure.value.available) == (4, 3)
    assert allocator.num_free == 3


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 6, 7])
def test_match_leaves_a_token_to_compute(num_tokens: int) -> None:
    allocator = BlockAllocator(8, BLOCK_SIZE)
    allocator.release(fill(allocator, tokens_of(*range(8))))
    prompt = tokens_of(*range(num_tokens))
    expected = (num_tokens - 1) // BLOCK_SIZE
    assert allocator.peek(ROOT, prompt) == expected
    assert len(allocator.match(ROOT, prompt)) == expected


def test_another_tenants_cache_is_not_seen() -> None:
    allocator = BlockAllocator(8, BLOCK_SIZE)
    allocator.release(fill(allocator, tokens_of(1, 2, 3, 4)))
    assert allocator.peek(OTHER_ROOT, tokens_of(1, 2, 3, 4, 5)) == 0
    assert allocator.peek(ROOT, tokens_of(1, 2, 3, 4, 5)) == 2


def test_equal_root_seeds_do_not_join_two_tenants() -> None:
    """Every root starts from the same seed here: only the digest tells them apart."""

    def rootless(tokens: TokenBytes, block_size: int, parent: int) -> list[BlockHash]:
        seeds = {ROOT.seed, OTHER_ROOT.seed}
        return name_blocks(tokens, block_size, 7 if parent in seeds else parent)

    allocator = BlockAllocator(8, BLOCK_SIZE, name_blocks=rootless)
    allocator.release(fill(allocator, tokens_of(1, 2, 3, 4)))
    assert allocator.peek(OTHER_ROOT, tokens_of(1, 2, 3, 4, 5)) == 0


def test_a_collision_of_names_costs_a_miss() -> None:
    allocator = BlockAllocator(8, BLOCK_SIZE, name_blocks=colliding(1))
    first = fill(allocator, tokens_of(1, 2))
    assert allocator.peek(ROOT, tokens_of(3, 4, 5)) == 0
    other = allocator.allocate(1)
    assert not allocator.publish(other[0], ROOT, None, tokens_of(3, 4))
    assert allocator.match(ROOT, tokens_of(1, 2, 9)) == first


def test_equal_tokens_after_another_parent_do_not_match() -> None:
    """Both second blocks hold (5, 6) under one name; only the physical parent tells them apart."""

    def by_tokens_alone(tokens: TokenBytes, block_size: int, parent: int) -> list[BlockHash]:
        return [name_blocks(block, block_size, 0)[0] for block in blocks_of(tokens)]

    allocator = BlockAllocator(8, BLOCK_SIZE, name_blocks=by_tokens_alone)
    fill(allocator, tokens_of(1, 2, 5, 6))
    fill(allocator, tokens_of(3, 4))
    assert allocator.peek(ROOT, tokens_of(1, 2, 5, 6, 7)) == 2
    assert allocator.peek(ROOT, tokens_of(3, 4, 5, 6, 7)) == 1


def test_eviction_takes_the_least_recently_used_chain_leaf_first() -> None:
    allocator = BlockAllocator(6, BLOCK_SIZE)
    old = fill(allocator, tokens_of(1, 1, 2, 2, 3, 3))
    new = fill(allocator, tokens_of(4, 4, 5, 5, 6, 6))
    allocator.release(old)
    allocator.release(new)
    assert allocator.allocate(4) == [old[2], old[1], old[0], new[2]]
    assert allocator.peek(ROOT, tokens_of(4, 4, 5, 5, 6, 6, 7)) == 2


def test_use_of_a_prefix_does_not_keep_its_continuations() -> None:
    allocator = BlockAllocator(4, BLOCK_SIZE)
    chain = fill(allocator, tokens_of(1, 1, 2, 2))
    single = fill(allocator, tokens_of(3, 3))
    allocator.release(chain)
    allocator.release(single)
    allocator.release(allocator.match(ROOT, tokens_of(1, 1, 9)))
    assert allocator.allocate(4)[1:] == [chain[1], single[0], chain[0]]


def test_a_held_child_keeps_its_released_parents() -> None:
    allocator = BlockAllocator(4, BLOCK_SIZE)
    chain = fill(allocator, tokens_of(1, 1, 2, 2, 3, 3))
    allocator.release(chain[:2])
    assert (allocator.num_cached, allocator.num_available) == (2, 1)
    with pytest.raises(OutOfBlocks):
        allocator.allocate(2)
    allocator.release(chain[2:])
    assert (allocator.num_cached, allocator.num_available) == (3, 4)


def test_a_second_copy_of_a_prompt_continues_the_first_ones_chain() -> None:
    allocator = BlockAllocator(8, BLOCK_SIZE)
    first, second = allocator.allocate(2), allocator.allocate(3)
    contents = blocks_of(tokens_of(1, 1, 2, 2, 3, 3))
    assert publish_all(allocator, first, contents) == [True, True]
    assert publish_all(allocator, second, contents) == [False, False, True]
    allocator.release(first)
    assert allocator.num_available == 3, "the continuation needs the first copy's blocks"
    assert allocator.match(ROOT, tokens_of(1, 1, 2, 2, 3, 3, 4)) == [*first, second[2]]
    allocator.check_integrity()


def test_a_copy_whose_original_was_evicted_has_no_named_parent() -> None:
    allocator = BlockAllocator(3, BLOCK_SIZE)
    first, second = allocator.allocate(1), allocator.allocate(2)
    contents = blocks_of(tokens_of(1, 1, 2, 2))
    publish_all(allocator, first, contents)
    assert not allocator.publish(second[0], ROOT, None, contents[0])
    allocator.release(first)
    assert allocator.allocate(1) == first
    assert not allocator.publish(second[1], ROOT, second[0], contents[1])
    assert allocator.publish(second[0], ROOT, None, contents[0])
    assert allocator.publish(second[1], ROOT, second[0], contents[1])


def test_a_recycled_row_is_not_taken_for_the_original() -> None:
    """The original's row is evicted and named anew: its twin must not continue the new content."""
    allocator = BlockAllocator(3, BLOCK_SIZE)
    first, second = allocator.allocate(1), allocator.allocate(2)
    contents = blocks_of(tokens_of(1, 1, 2, 2))
    publish_all(allocator, first, contents)
    assert not allocator.publish(second[0], ROOT, None, contents[0])
    allocator.release(first)
    assert fill(allocator, tokens_of(8, 8)) == first
    assert not allocator.publish(second[1], ROOT, second[0], contents[1])


def test_publishing_twice_is_harmless_and_contradicting_is_refused() -> None:
    allocator = BlockAllocator(3, BLOCK_SIZE)
    (block_id,) = allocator.allocate(1)
    assert allocator.publish(block_id, ROOT, None, tokens_of(1, 2))
    assert allocator.publish(block_id, ROOT, None, tokens_of(1, 2))
    with pytest.raises(ValueError, match="already named"):
        allocator.publish(block_id, ROOT, None, tokens_of(1, 3))


def test_misuse_is_refused() -> None:
    allocator = BlockAllocator(3, BLOCK_SIZE)
    block_ids = allocator.allocate(2)
    with pytest.raises(ValueError, match="of 2 tokens got 1"):
        allocator.publish(block_ids[0], ROOT, None, tokens_of(1))
    allocator.publish(block_ids[0], ROOT, None, tokens_of(1, 2))
    with pytest.raises(ValueError, match="another root"):
        allocator.publish(block_ids[1], OTHER_ROOT, block_ids[0], tokens_of(3, 4))
    allocator.release(block_ids)
    with pytest.raises(ValueError, match="released twice"):
        allocator.release(block_ids[1:])
    with pytest.raises(ValueError, match="free"):
        allocator.share(block_ids[1:])
    with pytest.raises(ValueError, match="held by nobody"):
        allocator.publish(block_ids[1], ROOT, None, tokens_of(1, 2))
    with pytest.raises(ValueError, match="num_blocks=0"):
        BlockAllocator(0, BLOCK_SIZE)


def test_changes_are_net() -> None:
    allocator = BlockAllocator(2, BLOCK_SIZE)
    held = fill(allocator, tokens_of(1, 1, 2, 2))
    names = name_blocks(tokens_of(1, 1, 2, 2), BLOCK_SIZE, ROOT.seed)
    assert allocator.take_changes() == (names, [])
    allocator.release(held)
    allocator.release(fill(allocator, tokens_of(3, 3)))  # evicts (2, 2)
    (third,) = name_blocks(tokens_of(3, 3), BLOCK_SIZE, ROOT.seed)
    allocator.allocate(2)
    assert allocator.take_changes() == ([], [names[1], names[0]]), f"{third} came and went"
    assert (allocator.num_names, allocator.xor_names, allocator.all_names()) == (0, 0, [])


def test_integrity_check_sees_a_lost_block() -> None:
    allocator = BlockAllocator(2, BLOCK_SIZE)
    allocator._free.pop()
    with pytest.raises(AssertionError, match="block 0 is lost"):
        allocator.check_integrity()


@dataclass(eq=False)
class ModelBlock:
    """What the model knows about one named block."""

    block_id: BlockId
    name: BlockHash
    path: tuple[bytes, ...]  # root digest, then the tokens of every block up to this one
    used_at: int


@dataclass
class Holder:
    """One sequence: what its blocks hold, and which of them it still refers to."""

    path: list[bytes]
    block_ids: list[BlockId] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)


class Model:
    """The promise, computed by searching everything."""

    def __init__(self, num_blocks: int, name_blocks: NameBlocks) -> None:
        self.num_blocks = num_blocks
        self.name_blocks = name_blocks
        self.references: Counter[BlockId] = Counter()
        self.named: dict[BlockId, ModelBlock] = {}
        self.twins: dict[BlockId, ModelBlock] = {}
        self.clock = 0

    @property
    def free(self) -> set[BlockId]:
        rows = {BlockId(row) for row in range(self.num_blocks)}
        return {row for row in rows if not self.references[row] and row not in self.named}

    def in_use(self, block: ModelBlock) -> bool:
        """Held, or before something that is."""
        length = len(block.path)
        family = (other for other in self.named.values() if other.path[:length] == block.path)
        return any(self.references[other.block_id] for other in family)

    def evictable(self) -> int:
        return sum(not self.in_use(block) for block in self.named.values())

    def tick(self) -> None:
        """Everything in use is used now."""
        self.clock += 1
        for block in self.named.values():
            if self.in_use(block):
                block.used_at = self.clock

    def match(self, path: list[bytes], limit: int) -> list[BlockId]:
        by_name = {block.name: block for block in self.named.values()}
        found: list[BlockId] = []
        for end, name in zip(range(2, limit + 2), self.names(path), strict=False):
            block = by_name.get(name)
            if block is None or list(block.path) != path[:end]:
                break
            found.append(block.block_id)
        return found

    def names(self, path: list[bytes]) -> list[BlockHash]:
        seed = int.from_bytes(path[0][:8], "little")
        return self.name_blocks(b"".join(path[1:]), BLOCK_SIZE, seed)

    def evict(self) -> BlockId:
        """The least recently used named block that has no children and is not held."""
        paths = {block.path[:-1] for block in self.named.values()}
        leaves = [block for block in self.named.values() if block.path not in paths]
        unheld = [block for block in leaves if not self.references[block.block_id]]
        victim = min(unheld, key=lambda block: block.used_at)
        del self.named[victim.block_id]
        return victim.block_id

    def publish(self, block_id: BlockId, parent: BlockId | None, path: list[bytes]) -> bool:
        if parent is not None and self.stand_in(parent) is None:
            return False
        name = self.names(path)[-1]
        holder = next((block for block in self.named.values() if block.name == name), None)
        if holder is None:
            self.named[block_id] = ModelBlock(block_id, name, tuple(path), self.clock)
            return True
        if holder.block_id != block_id and list(holder.path) == path:
            self.twins[block_id] = holder
        return holder.block_id == block_id

    def stand_in(self, block_id: BlockId) -> ModelBlock | None:
        twin = self.twins.get(block_id)
        alive = twin is not None and self.named.get(twin.block_id) is twin
        return self.named.get(block_id) or (twin if alive else None)

    def release(self, block_id: BlockId) -> None:
        self.references[block_id] -= 1
        if not self.references[block_id]:
            self.twins.pop(block_id, None)
        self.tick()


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences come, share, grow, drop blocks in any order and go; the model watches."""

    roots = (ROOT, OTHER_ROOT)
    prompts = ([0] * 11, [0] * 4 + [1] * 7, [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0], [1] * 11)

    @initialize(num_blocks=st.integers(4, 14), num_names=st.sampled_from([3, 9, 2**64]))
    def create(self, num_blocks: int, num_names: int) -> None:
        namer = colliding(num_names)
        self.allocator = BlockAllocator(num_blocks, BLOCK_SIZE, name_blocks=namer)
        self.model = Model(num_blocks, namer)
        self.holders: list[Holder] = []
        self.reported: set[BlockHash] = set()

    @rule(
        root=st.sampled_from(roots),
        prompt=st.sampled_from(prompts),
        length=st.integers(1, 11),
        publish=st.booleans(),
    )
    def start(self, root: ChainRoot, prompt: list[int], length: int, publish: bool) -> None:
        tokens = pack_tokens(prompt[:length])
        path = [root.digest, *blocks_of(tokens)]
        expected = self.model.match(path, (length - 1) // BLOCK_SIZE)
        assert self.allocator.peek(root, tokens) == len(expected)
        assert self.allocator.match(root, tokens) == expected
        self.model.references.update(expected)
        self.model.tick()
        self.holders.append(Holder(path, list(expected), [True] * len(expected)))
        self.grow(len(path) - 1 - len(expected))
        if publish:
            self.publish_run(self.holders[-1], len(self.holders[-1].block_ids))

    def grow(self, count: int) -> None:
        """Take blocks for the newest holder; when there are none it keeps what it has."""
        holder, model = self.holders[-1], self.model
        available = len(model.free) + model.evictable()
        if count > available:
            with pytest.raises(OutOfBlocks):
                self.allocator.allocate(count)
            return
        free = model.free
        victims = [model.evict() for _ in range(count - len(free))]
        taken = self.allocator.allocate(count)
        assert set(taken[: len(free)]) <= free
        assert taken[len(free) :] == victims
        model.references.update(taken)
        model.tick()
        holder.block_ids += taken
        holder.held += [True] * count

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        """Publish a run of a holder's blocks, as far as they are still held."""
        holder = data.draw(st.sampled_from(self.holders))
        self.publish_run(holder, data.draw(st.integers(0, len(holder.block_ids))))

    def publish_run(self, holder: Holder, count: int) -> None:
        for index in range(count):
            if not holder.held[index]:
                continue
            block_id = holder.block_ids[index]
            parent = holder.block_ids[index - 1] if index else None
            if index and not holder.held[index - 1]:
                continue  # the row may be somebody else's by now
            path = holder.path[: index + 2]
            root = ROOT if path[0] == ROOT.digest else OTHER_ROOT
            expected = self.model.publish(block_id, parent, path)
            self.model.tick()
            assert self.allocator.publish(block_id, root, parent, path[-1]) == expected

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def share_all(self, data: st.DataObject) -> None:
        """A copy job takes its own references on all that a holder still holds."""
        holder = data.draw(st.sampled_from(self.holders))
        held = [row for row, held in zip(holder.block_ids, holder.held, strict=True) if held]
        self.allocator.share(held)
        self.model.references.update(held)
        self.model.tick()
        self.holders.append(Holder(list(holder.path), list(holder.block_ids), list(holder.held)))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release_one(self, data: st.DataObject) -> None:
        """Any block of a holder, so that children outlive the references to their parents."""
        holder = data.draw(st.sampled_from(self.holders))
        held = [index for index, held in enumerate(holder.held) if held]
        if held:
            index = data.draw(st.sampled_from(held))
            holder.held[index] = False
            self.allocator.release([holder.block_ids[index]])
            self.model.release(holder.block_ids[index])

    @precondition(lambda self: self.holders)
    @rule(data=st.data(), backwards=st.booleans())
    def finish(self, data: st.DataObject, backwards: bool) -> None:
        holder = self.holders.pop(data.draw(st.integers(0, len(self.holders) - 1)))
        held = [row for row, held in zip(holder.block_ids, holder.held, strict=True) if held]
        if backwards:
            held.reverse()
        self.allocator.release(held)
        for block_id in held:
            self.model.release(block_id)

    @rule()
    def report(self) -> None:
        stored, removed = self.allocator.take_changes()
        names = {block.name for block in self.model.named.values()}
        assert set(stored) == names - self.reported
        assert set(removed) == self.reported - names
        assert len(stored) + len(removed) == len(set(stored) | set(removed))
        self.reported = names

    @invariant()
    def agrees(self) -> None:
        allocator, model = self.allocator, self.model
        allocator.check_integrity()
        assert allocator.num_free == len(model.free)
        assert allocator.num_referenced == sum(count > 0 for count in model.references.values())
        assert allocator.num_cached == sum(not model.references[row] for row in model.named)
        assert allocator.num_available == len(model.free) + model.evictable()
        names = [block.name for block in model.named.values()]
        assert sorted(allocator.all_names()) == sorted(names)
        assert allocator.num_names == len(names)

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for holder in self.holders:
            self.allocator.release(
                row for row, held in zip(holder.block_ids, holder.held, strict=True) if held
            )
        assert self.allocator.num_referenced == 0
        assert self.allocator.num_available == self.allocator.num_blocks
        self.allocator.check_integrity()


AllocatorMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestAllocatorAgainstModel = AllocatorMachine.TestCase
