"""What a decode worker believes of a prompt's KV: whole blocks without a gap before them, none twice."""

from random import Random

import pytest

from pdserve.contract.errors import ProtocolViolation
from pdserve.contract.messages import Segment
from pdserve.contract.work import LayerRange
from pdserve.handoff.proof import Proof

NUM_LAYERS = 4


def prove(proof: Proof, one: Segment) -> None:
    """It was copied and verified."""
    proof.begin(one)
    proof.add(one)


def segment(index: int, first_block: int, num_blocks: int, start: int = 0, stop: int = NUM_LAYERS) -> Segment:
    layers = LayerRange(start, stop)
    return Segment(index, first_block, num_blocks, layers, digest=2**63 + index, num_bytes=1)


def test_a_block_is_proven_when_all_its_layers_are_there() -> None:
    proof = Proof(num_blocks=3, num_layers=NUM_LAYERS, num_held=1)
    assert proof.num_proven_blocks == 1
    prove(proof, segment(0, 1, 2, 0, 1))
    prove(proof, segment(1, 1, 2, 3, 4))
    assert proof.num_proven_blocks == 1
    prove(proof, segment(2, 2, 1, 1, 3))
    assert proof.num_proven_blocks == 1  # block 2 is whole, but there is a gap before it
    prove(proof, segment(3, 1, 1, 1, 3))
    assert proof.num_proven_blocks == 3
    assert proof.is_whole


def test_the_order_of_segments_does_not_matter() -> None:
    cut = [segment(0, 0, 2), segment(1, 2, 1), segment(2, 3, 2, 0, 2), segment(3, 3, 2, 2, 4)]
    expected = Proof(5, NUM_LAYERS, 0)
    for one in cut:
        prove(expected, one)
    for seed in range(10):
        proof = Proof(5, NUM_LAYERS, 0)
        for one in Random(seed).sample(cut, len(cut)):
            prove(proof, one)
        assert proof.is_whole
        assert (proof.digest, proof.num_segments) == (expected.digest, 4)
    assert expected.digest == 6  # four times 2**63 is 0 modulo 2**64


def test_only_verified_segments_are_known() -> None:
    proof = Proof(2, NUM_LAYERS, 0)
    prove(proof, segment(7, 0, 1))
    assert proof.has(7)
    assert not proof.has(0)


@pytest.mark.parametrize(
    "bad",
    [
        segment(5, 0, 2),  # what was here before
        segment(5, 3, 2),  # behind the prompt
        segment(5, 2, 0),  # nothing
        segment(5, 2, 1, 3, 5),  # layers that the model has not
        segment(5, 2, 1, 2, 2),
        segment(5, 2, 1, 0, 2**32),
    ],
)
def test_a_segment_outside_is_refused(bad: Segment) -> None:
    with pytest.raises(ProtocolViolation, match="segment 5"):
        Proof(4, NUM_LAYERS, num_held=1).begin(bad)


def test_verified_kv_is_not_written_again_under_another_name() -> None:
    proof = Proof(4, NUM_LAYERS, 0)
    prove(proof, segment(0, 0, 2, 0, 2))
    proof.begin(segment(1, 0, 2, 2, 4))
    with pytest.raises(ProtocolViolation, match="another one has brought"):
        proof.begin(segment(2, 1, 2, 1, 3))


def test_kv_that_is_being_copied_is_not_written_under_another_name() -> None:
    proof = Proof(4, NUM_LAYERS, 0)
    proof.begin(segment(0, 0, 2, 0, 2))
    proof.begin(segment(1, 0, 2, 2, 4))
    proof.begin(segment(2, 2, 2, 0, 2))
    assert proof.is_under_way(0)
    with pytest.raises(ProtocolViolation, match="another one brings"):
        proof.begin(segment(3, 1, 1, 1, 3))


def test_a_copy_that_failed_is_made_again() -> None:
    proof = Proof(2, NUM_LAYERS, 0)
    proof.begin(segment(0, 0, 2))
    proof.fail(segment(0, 0, 2))
    assert not proof.is_under_way(0)
    assert not proof.has(0)
    prove(proof, segment(0, 0, 2))
    assert proof.is_whole
