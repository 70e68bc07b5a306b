"""The digest of KV bytes: position-weighted sums, the same in any order and on any device.

The bytes are taken in canonical order (see `Segment`), padded with zeros to whole lanes of 8 bytes, and
each lane is read as a little-endian uint64. With lane number i = 8192 * r + c, 0 <= c < 8192:

    digest = sum of lane[i] * lane_weight(c) * run_weight(r)  modulo 2**64
    lane_weight(c) = (mix(c)         mod 2**50) * 2**14 + 2 * c + 1
    run_weight(r)  = (mix(8192 + r)  mod 2**31) * 2**33 + (2**14 * r + 1 mod 2**33)
    mix(n) = the n-th output (from 0) of the splitmix64 generator with state 0 (Steele et al. 2014)

A sum needs no order and no second pass, so a GPU can fuse it into gather and scatter copies, pieces can
be digested where they lie, and digests of disjoint lanes are added up (`combine`).

What it finds, beyond 63 bits' worth of chance:

- Any change of a single lane: every weight is odd, so multiplying by it loses nothing.
- A swap of lanes i and j that hold a and b goes unseen only if 2**64 divides (a - b) * (w_i - w_j). The
  weights of the first 2**32 lanes (32 GiB) differ modulo 2**33, so every swap of lanes that differ in
  their low 32 bits is found; at an odd distance, of lanes that differ in their low 63 bits.

No sum of single lanes modulo 2**64 finds all swaps: if f and g are one-to-one, f - g never is, because
the values of each sum to 2**63 and those of the difference therefore to 0.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

LANE_BYTES = 8
RUN_LANES = 8192
_MODULUS = 2**64

Lanes = NDArray[np.uint64]


def digest(payload: memoryview | bytes | bytearray, first_lane: int = 0) -> int:
    """The digest of `payload`, C-contiguous, whose first byte begins lane `first_lane`; in [0, 2**64).

    With other than 0, it is the share of these bytes in the digest of a longer piece. Runs at memory speed
    on one thread and without the GIL for more than a few runs of 64 KiB.
    """
    view = memoryview(payload).cast("B")
    num_lanes = len(view) // LANE_BYTES
    total = _digest_lanes(np.frombuffer(view, "<u8", num_lanes), first_lane) if num_lanes else 0
    rest = view[num_lanes * LANE_BYTES :]
    if rest:
        last = int.from_bytes(rest, "little")  # as if padded with zeros
        total += last * _weight(first_lane + num_lanes)
    return total % _MODULUS


def combine(digests: Iterable[int]) -> int:
    """The digest of a whole from those of its parts: their sum modulo 2**64."""
    return sum(digests) % _MODULUS


def _digest_lanes(lanes: Lanes, first_lane: int) -> int:
    head = min(len(lanes), -first_lane % RUN_LANES)
    num_runs = (len(lanes) - head) // RUN_LANES
    body = head + num_runs * RUN_LANES
    return (
        _digest_in_run(lanes[:head], first_lane)
        + _digest_runs(lanes[head:body].reshape(num_runs, RUN_LANES), (first_lane + head) // RUN_LANES)
        + _digest_in_run(lanes[body:], first_lane + body)
    )


def _digest_in_run(lanes: Lanes, first_lane: int) -> int:
    """Of lanes that all lie in one run."""
    if not len(lanes):
        return 0
    run, start = divmod(first_lane, RUN_LANES)
    return int(np.dot(lanes, _LANE_WEIGHTS[start : start + len(lanes)])) * int(_run_weights(run, 1)[0])


def _digest_runs(runs: Lanes, first_run: int) -> int:
    """Of whole runs: [num_runs, RUN_LANES]."""
    if not len(runs):
        return 0
    sums = np.einsum("rc,c->r", runs, _LANE_WEIGHTS)
    return int(np.dot(sums, _run_weights(first_run, len(runs))))


def _weight(lane: int) -> int:
    run, column = divmod(lane, RUN_LANES)
    return int(_LANE_WEIGHTS[column]) * int(_run_weights(run, 1)[0])


def _run_weights(first: int, count: int) -> Lanes:
    if first + count <= len(_RUN_WEIGHTS):
        return _RUN_WEIGHTS[first : first + count]
    return _make_run_weights(first, count)


def _make_lane_weights() -> Lanes:
    columns = np.arange(RUN_LANES, dtype=np.uint64)
    return (_mix(columns) << np.uint64(14)) + np.uint64(2) * columns + np.uint64(1)


def _make_run_weights(first: int, count: int) -> Lanes:
    runs = np.arange(first, first + count, dtype=np.uint64)
    low = (runs << np.uint64(14)) + np.uint64(1) & np.uint64(2**33 - 1)
    return (_mix(runs + np.uint64(RUN_LANES)) << np.uint64(33)) + low


def _mix(numbers: Lanes) -> Lanes:
    """splitmix64; uint64 arithmetic of arrays wraps."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


_LANE_WEIGHTS = _make_lane_weights()
_RUN_WEIGHTS = _make_run_weights(0, 1024)  # of 64 MiB; more than most segments
