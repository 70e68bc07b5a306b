"""The digest of KV bytes: position-weighted sums, the same in any order and on any device.

The bytes are taken in canonical order (see `Segment`), padded with zeros to whole lanes of 8 bytes, and
each lane is read as a little-endian uint64. With lane number i = 8192 * r + c, 0 <= c < 8192:

    digest = sum of lane[i] * lane_weight(c) * run_weight(r)  modulo 2**64
    lane_weight(c) = (mix(c)         mod 2**50) * 2**14 + 2 * c + 1
    run_weight(r)  = (mix(8192 + r)  mod 2**31) * 2**33 + (2**14 * r + 1 mod 2**33)
    mix(n) = the n-th output (from 0) of the splitmix64 generator with state 0 (Steele et al. 2014)

A sum needs no order and no second pass, so a GPU can fuse it into gather and scatter copies, pieces can
be digested where they lie, and digests of disjoint lanes are added up (`combine`).

On a CPU the loops over lanes are compiled (numba): one call without the GIL per segment, at the speed of
memory, however small the parts of it are.

What it finds, beyond 63 bits' worth of chance:

- Any change of a single lane: every weight is odd, so multiplying by it loses nothing.
- A swap of lanes i and j that hold a and b goes unseen only if 2**64 divides (a - b) * (w_i - w_j). The
  weights of the first 2**32 lanes (32 GiB) differ modulo 2**33, so every swap of lanes that differ in
  their low 32 bits is found; at an odd distance, of lanes that differ in their low 63 bits.

No sum of single lanes modulo 2**64 finds all swaps: if f and g are one-to-one, f - g never is, because
the values of each sum to 2**63 and those of the difference therefore to 0.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from pdserve.handoff.passing_stores import LINE_BYTES, LINE_LANES, copy_lines, fence

LANE_BYTES = 8
RUN_LANES = 8192
_MODULUS = 2**64

# Of the compiled functions' arguments; True: also arrays that may only be read.
_LANES_TYPE = "Array(uint64, 1, 'C', True)"
_PARTS_TYPE = "Array(uint64, 2, 'C', True), Array(int64, 1, 'C', True), int64, int64"
_TARGET_TYPE = "Array(uint64, 2, 'C'), Array(int64, 1, 'C', True), int64, int64"

Lanes = NDArray[np.uint64]
Ids = NDArray[np.int64]


def digest(payload: memoryview | bytes | bytearray, first_lane: int = 0) -> int:
    """The digest of `payload`, C-contiguous, whose first byte begins lane `first_lane`; in [0, 2**64).

    With other than 0, it is the share of these bytes in the digest of a longer piece. Runs at memory speed
    on one thread and without the GIL.
    """
    view = memoryview(payload).cast("B")
    num_lanes = len(view) // LANE_BYTES
    total = _digest_lanes(np.frombuffer(view, "<u8", num_lanes), first_lane)
    rest = view[num_lanes * LANE_BYTES :]
    if rest:
        last = np.array([int.from_bytes(rest, "little")], np.uint64)  # as if padded with zeros
        total += _digest_lanes(last, first_lane + num_lanes)
    return total % _MODULUS


def combine(digests: Iterable[int]) -> int:
    """The digest of a whole from those of its parts: their sum modulo 2**64."""
    return sum(digests) % _MODULUS


class Parts(NamedTuple):
    """Equally long pieces of some rows of a pool."""

    rows: Lanes
    """[num_rows, lanes of a row]"""
    row_ids: Ids
    start: int
    """Of the pieces' lanes within each row."""
    stop: int


def digest_parts(parts: Parts, first_lane: int = 0) -> int:
    """The digest of the parts, one after the other. Raises IndexError for a row that is not there."""
    _check(parts)
    return int(_digest_parts(*parts, first_lane, _LANE_WEIGHTS))


def copy_parts(target: Parts, source: Parts, first_lane: int = 0) -> int:
    """Copy `source` into `target` and return the digest of what was written, at the speed of a plain copy.

    Every lane is loaded once, stored and digested, so whatever else happens to `source`, the digest is that
    of the own copy. Raises IndexError for a row that is not there and ValueError when the parts do not pair
    up.
    """
    _check(target)
    _check(source)
    if len(target.row_ids) != len(source.row_ids) or _length(target) != _length(source):
        raise ValueError(
            f"{len(source.row_ids)} parts of {_length(source)} lanes do not go into "
            f"{len(target.row_ids)} of {_length(target)}"
        )
    return int(_copy_parts(*target, *source, first_lane, _LANE_WEIGHTS))


def as_lanes(rows: NDArray[np.uint8]) -> Lanes:
    """[num_rows, bytes of a row] as [num_rows, lanes of a row]: a view, or a copy if not aligned."""
    return _aligned(rows.view("<u8"))


def as_ids(ids: Iterable[int]) -> Ids:
    """Row ids as `Parts` has them."""
    return np.fromiter(ids, np.int64)


def _digest_lanes(lanes: Lanes, first_lane: int) -> int:
    rows = _aligned(lanes).reshape(1, -1)
    return int(_digest_parts(rows, _FIRST_ROW, 0, len(lanes), first_lane, _LANE_WEIGHTS))


def _aligned(lanes: Lanes) -> Lanes:
    return lanes if lanes.flags.aligned else lanes.copy()


def _length(parts: Parts) -> int:
    return parts.stop - parts.start


def _check(parts: Parts) -> None:
    """Compiled loops do not look where they reach."""
    ids, (num_rows, num_lanes) = parts.row_ids, parts.rows.shape
    if len(ids) and not 0 <= ids.min() <= ids.max() < num_rows:
        raise IndexError(f"rows {ids.min()} to {ids.max()} of {num_rows}")
    if not 0 <= parts.start <= parts.stop <= num_lanes:
        raise IndexError(f"lanes {parts.start} to {parts.stop} of {num_lanes}")


def _compiled(signature: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function at import, once per machine if there is a place to keep the result."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(signature, nogil=True, cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither this folder nor the user's cache may be written
            return njit(signature, nogil=True)(function)  # type: ignore[no-any-return]

    return decorate


def _mix(numbers: Any) -> Any:
    """splitmix64 of a uint64 or an array of them; their arithmetic wraps."""
    mixed = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _make_lane_weights() -> Lanes:
    columns = np.arange(RUN_LANES, dtype=np.uint64)
    weights: Lanes = (_mix(columns) << np.uint64(14)) + np.uint64(2) * columns + np.uint64(1)
    return weights


_mix_one = _compiled("uint64(uint64)")(_mix)


@_compiled("uint64(uint64)")
def _run_weight(run: np.uint64) -> np.uint64:
    low = ((run << np.uint64(14)) + np.uint64(1)) & np.uint64(2**33 - 1)
    return np.uint64((_mix_one(run + np.uint64(RUN_LANES)) << np.uint64(33)) + low)


@_compiled(f"uint64({_LANES_TYPE}, int64, {_LANES_TYPE})")
def _digest_in_run(lanes: Lanes, lane: int, weights: Lanes) -> np.uint64:
    """Of lanes that all lie in one run, the first of which is `lane`."""
    column = lane % RUN_LANES
    total = np.uint64(0)
    for i in range(len(lanes)):
        total += lanes[i] * weights[column + i]
    return np.uint64(total * _run_weight(np.uint64(lane // RUN_LANES)))


@_compiled(f"uint64(Array(uint64, 1, 'C'), {_LANES_TYPE}, int64)")
def _copy_lane(target: Lanes, source: Lanes, lane: int) -> np.uint64:
    """What was stored."""
    value = np.uint64(source[lane])
    target[lane] = value
    return value


@_compiled(f"uint64(Array(uint64, 1, 'C'), {_LANES_TYPE}, int64, {_LANES_TYPE})")
def _copy_in_run(target: Lanes, source: Lanes, lane: int, weights: Lanes) -> np.uint64:
    """As `_digest_in_run`, of lanes that are copied: each is loaded once, and what is stored is digested."""
    column = lane % RUN_LANES
    to_next_line = -target.ctypes.data % LINE_BYTES // LANE_BYTES
    start = min(len(target), to_next_line)  # of whole lines
    num_lines = (len(target) - start) // LINE_LANES
    total = copy_lines(target, start, source, start, weights, column + start, num_lines)
    stop = start + num_lines * LINE_LANES
    for i in range(start):
        total += _copy_lane(target, source, i) * weights[column + i]
    for i in range(stop, len(target)):
        total += _copy_lane(target, source, i) * weights[column + i]
    return np.uint64(total * _run_weight(np.uint64(lane // RUN_LANES)))


@_compiled(f"uint64({_PARTS_TYPE}, int64, {_LANES_TYPE})")
def _digest_parts(rows: Lanes, row_ids: Ids, start: int, stop: int, lane: int, weights: Lanes) -> np.uint64:
    total = np.uint64(0)
    for row_id in row_ids:
        at = start
        while at < stop:
            end = min(stop, at + RUN_LANES - lane % RUN_LANES)
            total += _digest_in_run(rows[row_id, at:end], lane, weights)
            lane += end - at
            at = end
    return total


@_compiled(f"uint64({_TARGET_TYPE}, {_PARTS_TYPE}, int64, {_LANES_TYPE})")
def _copy_parts(
    target: Lanes,
    target_ids: Ids,
    target_start: int,
    target_stop: int,
    source: Lanes,
    source_ids: Ids,
    source_start: int,
    source_stop: int,
    lane: int,
    weights: Lanes,
) -> np.uint64:
    total = np.uint64(0)
    shift = source_start - target_start
    for i in range(len(target_ids)):
        own, other = target[target_ids[i]], source[source_ids[i]]
        at = target_start
        while at < target_stop:
            end = min(target_stop, at + RUN_LANES - lane % RUN_LANES)
            total += _copy_in_run(own[at:end], other[at + shift : end + shift], lane, weights)
            lane += end - at
            at = end
    fence()
    return total


_LANE_WEIGHTS = _make_lane_weights()
_FIRST_ROW = np.zeros(1, np.int64)
