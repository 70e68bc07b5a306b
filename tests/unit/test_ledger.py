"""Every block is in a hold or free or cached, and goes back only when nothing touches it any more."""

import pytest

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import BlockCounts
from pdserve.engine.block_allocator import BlockAllocator, OutOfBlocks
from pdserve.handoff.ledger import BlockLedger, HoldKind

ROOT = ChainRoot("model")


@pytest.fixture
def ledger() -> BlockLedger:
    return BlockLedger(BlockAllocator(num_blocks=8, block_size=2))


def test_a_hold_gives_everything_back(ledger: BlockLedger) -> None:
    hold = ledger.open("a")
    hold.grow_to(3)
    assert ledger.counts() == BlockCounts(free=5, cached=0, reserved=3, active=0)
    hold.activate()
    hold.grow_to(5)
    assert ledger.counts() == BlockCounts(free=3, cached=0, reserved=0, active=5)
    hold.release()
    hold.release()
    assert ledger.counts() == BlockCounts(free=8, cached=0, reserved=0, active=0)
    ledger.check_integrity()


def test_growing_beyond_the_pool_changes_nothing(ledger: BlockLedger) -> None:
    hold = ledger.open("a")
    hold.grow_to(6)
    with pytest.raises(OutOfBlocks):
        hold.grow_to(9)
    assert len(hold.block_ids) == 6
    ledger.check_integrity()


def test_published_blocks_stay_as_cache_and_are_adopted(ledger: BlockLedger) -> None:
    tokens = pack_tokens(range(5))
    first = ledger.open("a")
    first.grow_to(3)
    first.publish(ROOT, tokens, 3)  # one full block is proven
    first.publish(ROOT, tokens, 5)  # and another; the last is not full
    first.release()
    assert ledger.counts() == BlockCounts(free=6, cached=2, reserved=0, active=0)
    second = ledger.open("b", HoldKind.ACTIVE)
    assert second.adopt_prefix(ROOT, tokens) == 2
    assert ledger.counts() == BlockCounts(free=6, cached=0, reserved=0, active=2)
    ledger.check_integrity()


def test_a_block_shared_by_a_running_and_a_waiting_request_counts_once_as_active(ledger: BlockLedger) -> None:
    tokens = pack_tokens(range(5))
    first = ledger.open("a", HoldKind.ACTIVE)
    first.grow_to(3)
    first.publish(ROOT, tokens, 5)
    second = ledger.open("b")
    second.adopt_prefix(ROOT, tokens)
    assert ledger.counts() == BlockCounts(free=5, cached=0, reserved=0, active=3)
    first.release()
    assert ledger.counts() == BlockCounts(free=6, cached=0, reserved=2, active=0)
    ledger.check_integrity()


def test_a_released_hold_retires_until_the_last_step_or_copy_has_ended(ledger: BlockLedger) -> None:
    hold = ledger.open("a", HoldKind.ACTIVE)
    hold.grow_to(4)
    with hold.in_use():
        with hold.in_use():
            hold.release()
            assert hold.retiring
            assert ledger.counts().active == 4
        assert ledger.owners() == ["a"]
        assert ledger.counts().active == 4
    assert ledger.owners() == []
    assert ledger.counts().free == 8
    ledger.check_integrity()


def test_an_unpinned_hold_can_adopt_again(ledger: BlockLedger) -> None:
    tokens = pack_tokens(range(5))
    first = ledger.open("a")
    first.grow_to(3)
    first.publish(ROOT, tokens, 5)
    first.release()
    second = ledger.open("b")
    second.adopt_prefix(ROOT, tokens)
    second.unpin()
    assert ledger.counts() == BlockCounts(free=6, cached=2, reserved=0, active=0)
    assert second.adopt_prefix(ROOT, tokens) == 2
    second.release()
    ledger.check_integrity()


def test_integrity_names_what_is_wrong(ledger: BlockLedger) -> None:
    ledger.blocks.allocate(1)  # behind the ledger's back
    with pytest.raises(AssertionError, match="1 blocks are referenced, 0 are in holds"):
        ledger.check_integrity()
