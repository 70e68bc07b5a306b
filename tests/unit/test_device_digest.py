"""The digest by torch's operators is the digest."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pdserve.handoff.digest import RUN_LANES, digest
from pdserve.handoff.transports.device_digest import digest_tensor


@given(st.integers(0, 3 * RUN_LANES + 5), st.integers(0, 2**32))
def test_it_is_the_same_for_any_length(num_lanes: int, seed: int) -> None:
    lanes = np.random.default_rng(seed).integers(0, 2**64, num_lanes, np.uint64)
    assert digest_tensor(torch.from_numpy(lanes.view(np.int64))) == digest(lanes.tobytes())


@pytest.mark.parametrize("lane", [0, 1, 2**63, 2**64 - 1])
def test_it_wraps_at_the_ends(lane: int) -> None:
    lanes = np.full(RUN_LANES * 2 + 1, lane, np.uint64)
    assert digest_tensor(torch.from_numpy(lanes.view(np.int64))) == digest(lanes.tobytes())
