"""Where a request goes, as tables; and who may come in."""

import pytest

from pdserve.contract.errors import Overloaded
from pdserve.contract.ids import WorkerId
from router.admission import Admission, AdmissionLimits
from router.placement import Candidate, choose


def candidate(name: str, held: int = 0, queued: int = 0, fingerprint: str = "m") -> Candidate:
    return Candidate(WorkerId(name), fingerprint, held, queued)


def test_most_tokens_held_minus_tokens_queued() -> None:
    placement = choose(
        [candidate("d0", held=10, queued=0), candidate("d1", held=100, queued=200)],
        [candidate("p0", held=0, queued=50), candidate("p1", held=64, queued=100)],
        frozenset(),
        turn=0,
    )
    assert placement is not None
    assert (placement.decode, placement.prefill) == ("d0", "p1")
    assert placement.reason == "split: p1 holds 64, queues 100; d0 holds 10, queues 0"


def test_ties_rotate() -> None:
    decode = [candidate("d0"), candidate("d1"), candidate("d2", queued=1)]
    chosen = [choose(decode, [], frozenset(), turn) for turn in range(4)]
    assert [placement and placement.decode for placement in chosen] == ["d0", "d1", "d0", "d1"]


def test_without_a_usable_source_the_decode_worker_computes_the_prompt() -> None:
    decode = [candidate("d0")]
    for prefill, pairs in (
        ([], frozenset()),
        ([candidate("p0", fingerprint="other")], frozenset()),
        ([candidate("p0")], frozenset({(WorkerId("p0"), WorkerId("d0"))})),
    ):
        placement = choose(decode, prefill, pairs, turn=0)  # type: ignore[arg-type]
        assert placement is not None
        assert placement.prefill is None
        assert placement.reason.startswith("local: no prefill worker")


def test_the_reason_tells_why_no_worker_may_be_the_source() -> None:
    other = candidate("p0", fingerprint="other")
    placement = choose([candidate("d0")], [other, candidate("p1", fingerprint="third")], frozenset(), turn=0)
    assert placement is not None
    assert "no prefill worker has KV that fits d0" in placement.reason
    assert "block size" in placement.reason


def test_without_a_decode_worker_there_is_no_placement() -> None:
    assert choose([], [candidate("p0")], frozenset(), turn=0) is None


def test_admission_refuses_what_exceeds_its_bounds() -> None:
    admission = Admission(AdmissionLimits(max_requests=2, max_prompt_tokens=100, retry_after_s=3.0))
    admission.enter(1000)  # alone, anything may come in
    with pytest.raises(Overloaded, match="1000 prompt tokens") as refused:
        admission.enter(1)
    assert refused.value.info.retry_after_s == 3.0
    admission.leave(1000)
    admission.enter(50)
    admission.enter(50)
    with pytest.raises(Overloaded, match="2 requests are in progress"):
        admission.enter(1)
    admission.leave(50)
    admission.leave(50)
    assert (admission.num_requests, admission.num_prompt_tokens) == (0, 0)
