"""How a transfer is split into what the computation hid and what it did not."""

import pytest

from pdserve.handoff.transfer_times import Overlap, TransferTimes


def test_it_is_split_at_the_end_of_the_last_pass() -> None:
    times = TransferTimes()
    times.add(1.0, 1.5, 600)
    times.add(2.0, 3.0, 300)  # half of it before the end of the pass
    times.add(3.0, 3.25, 100)
    overlap = times.overlap(computed_at=2.5, proven_at=3.5)
    assert overlap == Overlap(hidden_s=pytest.approx(1.0), exposed_s=pytest.approx(1.0), share_ahead=0.6)


def test_everything_may_be_hidden() -> None:
    times = TransferTimes()
    times.add(1.0, 1.5, 600)
    assert times.overlap(computed_at=4.0, proven_at=4.0) == Overlap(0.5, 0.0, 1.0)


def test_nothing_copied_is_no_transfer() -> None:
    assert TransferTimes().overlap(1.0, 2.0) is None
