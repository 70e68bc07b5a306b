"""A Prefill call's state at its source, table by table."""

import pytest

from pdserve.contract.block_names import ChainRoot
from pdserve.contract.ids import Incarnation, RequestId, WorkerId
from pdserve.contract.messages import FirstToken, PrefillOpen
from pdserve.contract.sampling import SamplingParams
from pdserve.contract.tokens import pack_tokens
from pdserve.contract.work import LayerRange, SampledToken
from pdserve.engine.block_allocator import BlockAllocator
from pdserve.handoff.ledger import BlockLedger
from pdserve.handoff.prefill_job import JobState, PrefillJob
from pdserve.handoff.shipping import Shipment

BLOCK = 4
ALL = LayerRange(0, 3)  # layers of the model
LARGE = 300  # layers of blocks: no segment is cut
ANY_SAMPLING = SamplingParams()


def job_of(
    num_tokens: int,
    ledger: BlockLedger,
    num_held: int = 0,
    started: bool = True,
    num_known: int = 0,
    sampling: SamplingParams | None = ANY_SAMPLING,
) -> PrefillJob:
    """The last `num_known` of its tokens are output of an earlier attempt."""
    request = PrefillOpen(
        request_id=RequestId("r"),
        attempt=1,
        decode_worker_id=WorkerId("decode-0"),
        source_incarnation=Incarnation(1),
        fingerprint="model",
        tokens=pack_tokens(range(num_tokens)),
        num_prompt_tokens=num_tokens - num_known,
        transports=(),
        sampling=sampling,
    )
    job = PrefillJob(request, ChainRoot("model"), BLOCK, len(ALL), queued_at=1.0)
    if started:
        hold = ledger.open("job")
        hold.grow_to(job.num_blocks)
        job.start(hold, 0, now=2.0)
        job.reserved(num_held)
    return job


@pytest.fixture
def ledger() -> BlockLedger:
    return BlockLedger(BlockAllocator(64, BLOCK))


def test_segments_follow_the_chunks_and_the_partly_filled_block_comes_last(ledger: BlockLedger) -> None:
    job = job_of(10, ledger)
    assert job.next_shipment(8, LARGE) is None
    job.advance(8, None, (), now=3.0)
    assert job.next_shipment(8, LARGE) == Shipment(0, 0, 2, ALL)
    assert not job.all_shipped
    job.advance(10, SampledToken(5), (), now=4.0)
    assert job.first_token == FirstToken(5)
    assert job.next_shipment(8, LARGE) == Shipment(1, 2, 1, ALL)
    assert job.all_shipped
    assert job.state is JobState.COMPUTED


def test_the_last_chunk_leaves_by_groups_of_layers(ledger: BlockLedger) -> None:
    job = job_of(14, ledger)
    job.advance(8, None, (), now=3.0)
    job.layers_are_done(1)
    assert job.next_shipment(8, LARGE) == Shipment(0, 0, 2, ALL)
    assert job.next_shipment(8, LARGE) == Shipment(1, 2, 2, LayerRange(0, 1))
    assert job.next_shipment(8, LARGE) is None
    job.layers_are_done(2)
    assert job.next_shipment(8, LARGE) == Shipment(2, 2, 2, LayerRange(1, 2))
    assert not job.all_shipped
    job.advance(14, SampledToken(5), (), now=4.0)
    assert job.next_shipment(8, LARGE) == Shipment(3, 2, 2, LayerRange(2, 3))
    assert job.all_shipped


def test_layers_enter_the_prefix_cache_only_with_the_end_of_their_step(ledger: BlockLedger) -> None:
    job = job_of(8, ledger)
    job.layers_are_done(3)
    job.hold.release()  # the call ends before the step does
    assert ledger.counts().cached == 0
    job = job_of(8, ledger)
    job.layers_are_done(3)
    job.advance(8, SampledToken(5), (), now=3.0)
    job.hold.release()
    assert ledger.counts().cached == 2


def test_a_last_token_leaves_unannounced_layers_where_they_are(ledger: BlockLedger) -> None:
    job = job_of(8, ledger)
    job.layers_are_done(1)
    assert job.next_shipment(8, LARGE) == Shipment(0, 0, 2, LayerRange(0, 1))
    job.layers_are_done(2)
    job.advance(8, SampledToken(5), (5,), now=3.0)
    assert job.next_shipment(8, LARGE) is None
    assert job.all_shipped
    assert job.num_segments == 1


@pytest.mark.parametrize("num_known", [0, 3])
def test_layers_stay_where_they_are_when_any_token_is_the_last(num_known: int, ledger: BlockLedger) -> None:
    job = job_of(8, ledger, num_known=num_known, sampling=SamplingParams(max_tokens=num_known + 1))
    job.layers_are_done(2)
    assert job.next_shipment(8, LARGE) is None
    job.advance(8, SampledToken(5), (), now=3.0)
    assert job.next_shipment(8, LARGE) is None
    assert job.all_shipped
    assert job.num_segments == 0


def test_layers_leave_when_nothing_is_sampled_here(ledger: BlockLedger) -> None:
    job = job_of(8, ledger, sampling=None)
    job.layers_are_done(1)
    assert job.next_shipment(8, LARGE) == Shipment(0, 0, 2, LayerRange(0, 1))


def test_what_the_decode_worker_holds_is_not_sent(ledger: BlockLedger) -> None:
    job = job_of(12, ledger, num_held=2)
    job.advance(12, SampledToken(5), (), now=3.0)
    assert job.next_shipment(8, LARGE) == Shipment(0, 2, 1, ALL)
    assert job.all_shipped


def test_the_window_holds_segments_back(ledger: BlockLedger) -> None:
    job = job_of(12, ledger)
    job.advance(12, SampledToken(5), (), now=3.0)
    assert job.next_shipment(2, len(ALL)) == Shipment(0, 0, 1, ALL)
    assert job.next_shipment(2, len(ALL)) == Shipment(1, 1, 1, ALL)
    assert job.next_shipment(2, len(ALL)) is None
    job.acknowledge(0, ok=True)
    assert job.next_shipment(2, len(ALL)) == Shipment(2, 2, 1, ALL)


def test_a_corrupt_segment_is_sent_again_with_its_index(ledger: BlockLedger) -> None:
    job = job_of(8, ledger)
    job.advance(8, SampledToken(5), (), now=3.0)
    first = job.next_shipment(8, len(ALL))
    job.next_shipment(8, len(ALL))
    assert job.all_shipped
    job.acknowledge(0, ok=False)
    assert not job.all_shipped
    assert job.next_shipment(8, len(ALL)) == first
    assert job.all_shipped


def test_a_first_token_that_is_the_last_ships_nothing(ledger: BlockLedger) -> None:
    job = job_of(8, ledger)
    job.advance(8, SampledToken(5), (5,), now=3.0)
    assert job.next_shipment(8, LARGE) is None
    assert job.all_shipped
    assert job.num_segments == 0


def test_a_busy_decode_worker_puts_the_job_back_without_blocks(ledger: BlockLedger) -> None:
    job = job_of(8, ledger, started=False)
    hold = ledger.open("job")
    hold.grow_to(2)
    job.start(hold, 0, now=2.0)
    job.put_back()
    assert (job.state, job.resting) == (JobState.QUEUED, True)
    assert ledger.owners() == []


def test_illegal_moves_are_refused(ledger: BlockLedger) -> None:
    job = job_of(8, ledger, started=False)
    with pytest.raises(AssertionError, match="cannot go from queued to ready"):
        job.reserved(0)
