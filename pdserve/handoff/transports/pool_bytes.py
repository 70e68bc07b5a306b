"""A worker's own blocks as its transports read and write them, with digests. Runs on the transfer thread."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pdserve.contract.ids import BlockId
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import LANE_BYTES, combine, digest
from pdserve.handoff.transports.base import LocalSide, MappedBlocks

Rows = NDArray[np.uint8]
"""[num_blocks, block_bytes] of a pool in memory; one block's part in some layers is contiguous in its row."""

STRETCH_BYTES = 512 << 10
"""Neighbouring blocks are copied and digested together up to this size, so that small blocks cost no more
than large ones and what was copied is still in the CPU's second-level cache when it is digested."""


class PoolBytes:
    """Parts of blocks in and out of the pool: in place when the pool lies in host memory, else by copies.

    A part is one block's bytes in a range of layers. `first_lane` is where the parts begin in what is
    digested altogether (see `digest`).
    """

    def __init__(self, side: LocalSide) -> None:
        self._side = side
        self._store = side.blocks
        rows = side.blocks.rows() if isinstance(side.blocks, MappedBlocks) else None
        self._rows: Rows | None = None if rows is None else np.asarray(rows)

    def digest(self, block_ids: Sequence[BlockId], layers: LayerRange) -> int:
        """Of what lies in the pool."""
        if self._rows is None:
            return digest(self._store.read(block_ids, layers))
        rows, columns = self._rows, self._columns(layers)
        part_lanes = self._side.part_bytes(layers) // LANE_BYTES
        return combine(
            digest(_stretch(rows, block_ids[start], stop - start, columns).data, start * part_lanes)
            for start, stop in self._stretches(layers, block_ids)
        )

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytes:
        """A copy in canonical order."""
        if self._rows is None:
            return bytes(self._store.read(block_ids, layers))
        rows, columns = self._rows, self._columns(layers)
        return b"".join(
            _stretch(rows, block_ids[start], stop - start, columns).data
            for start, stop in self._stretches(layers, block_ids)
        )

    def write(
        self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview, first_lane: int = 0
    ) -> int:
        """Copy canonical bytes in; returns the digest of what lies in the pool then."""
        if self._rows is None:
            self._store.write(block_ids, layers, payload)
            return digest(self._store.read(block_ids, layers), first_lane)
        parts = np.frombuffer(payload, np.uint8).reshape(len(block_ids), self._side.part_bytes(layers))
        return self._take(_Source(parts, range(len(parts)), slice(None)), block_ids, layers, first_lane)

    def copy(
        self, rows: Rows, row_ids: Sequence[int], block_ids: Sequence[BlockId], layers: LayerRange
    ) -> int:
        """Copy from the rows of another pool; returns the digest of what lies in the own pool then."""
        columns = self._columns(layers)
        if self._rows is None:
            return self.write(block_ids, layers, rows[list(row_ids), columns].reshape(-1).data)
        return self._take(_Source(rows, row_ids, columns), block_ids, layers, 0)

    def _take(
        self, source: "_Source", block_ids: Sequence[BlockId], layers: LayerRange, first_lane: int
    ) -> int:
        """Copy and digest stretch by stretch."""
        assert self._rows is not None
        columns = self._columns(layers)
        part_lanes = self._side.part_bytes(layers) // LANE_BYTES
        total = 0
        for start, stop in self._stretches(layers, source.row_ids, block_ids):
            target = _stretch(self._rows, block_ids[start], stop - start, columns)
            np.copyto(target, _stretch(source.rows, source.row_ids[start], stop - start, source.columns))
            total += digest(target.data, first_lane + start * part_lanes)
        return combine((total,))

    def _columns(self, layers: LayerRange) -> slice:
        """Where the bytes of `layers` lie in a row."""
        return slice(layers.start * self._side.layer_bytes, layers.stop * self._side.layer_bytes)

    def _stretches(self, layers: LayerRange, *id_lists: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Half-open ranges of places at which all lists count up by one, so that the parts are contiguous
        in memory: only in whole rows, else one place each."""
        whole_rows = len(layers) == self._side.num_layers
        most = max(1, STRETCH_BYTES // self._side.blocks.block_bytes) if whole_rows else 1
        start = 0
        for place in range(1, len(id_lists[0]) + 1):
            if place - start == most or not all(_goes_on(ids, place) for ids in id_lists):
                yield start, place
                start = place


class _Source(NamedTuple):
    """Where parts are copied from: `columns` of `rows[row_ids]`."""

    rows: Rows
    row_ids: Sequence[int]
    columns: slice


def _goes_on(ids: Sequence[int], place: int) -> bool:
    return place < len(ids) and ids[place] == ids[place - 1] + 1


def _stretch(rows: Rows, first: int, count: int, columns: slice) -> Rows:
    """[count, bytes of a part], contiguous when `count` is 1 or the columns are the whole row."""
    return rows[first : first + count, columns]
