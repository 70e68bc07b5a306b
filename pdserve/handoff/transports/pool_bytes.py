"""A worker's own blocks as its transports read and write them, with digests. Runs on the transfer thread."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pdserve.contract.ids import BlockId
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import (
    LANE_BYTES,
    Lanes,
    Parts,
    as_ids,
    as_lanes,
    copy_parts,
    digest,
    digest_parts,
)
from pdserve.handoff.transports.base import LocalSide, MappedBlocks

Rows = NDArray[np.uint8]
"""[num_blocks, block_bytes] of a pool in memory; one block's part in some layers is contiguous in its row."""


class PoolBytes:
    """Parts of blocks in and out of the pool: in place when the pool lies in host memory, else by copies.

    A part is one block's bytes in a range of layers. `first_lane` is where the parts begin in what is
    digested altogether (see `digest`).
    """

    def __init__(self, side: LocalSide) -> None:
        self._side = side
        self._store = side.blocks
        rows = side.blocks.rows() if isinstance(side.blocks, MappedBlocks) else None
        self._rows: Lanes | None = None if rows is None else np.asarray(rows).view("<u8")

    def digest(self, block_ids: Sequence[BlockId], layers: LayerRange) -> int:
        """Of what lies in the pool."""
        if self._rows is None:
            return digest(self._store.read(block_ids, layers))
        return digest_parts(self._parts(self._rows, block_ids, layers))

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytes:
        """A copy in canonical order."""
        if self._rows is None:
            return bytes(self._store.read(block_ids, layers))
        rows, _, start, stop = self._parts(self._rows, (), layers)
        return b"".join(rows[block_id, start:stop].data for block_id in block_ids)

    def read_into(
        self, block_ids: Sequence[BlockId], layers: LayerRange, target: memoryview, first_lane: int = 0
    ) -> int:
        """Copy into `target`, aligned to lanes, in canonical order; returns the digest of what lies there."""
        if self._rows is None:
            target[:] = self._store.read(block_ids, layers)
            return digest(target, first_lane)
        part_lanes = self._side.part_bytes(layers) // LANE_BYTES
        copy = Parts(_lanes_of(target, len(block_ids)), np.arange(len(block_ids)), 0, part_lanes)
        return copy_parts(copy, self._parts(self._rows, block_ids, layers), first_lane)

    def write(
        self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview, first_lane: int = 0
    ) -> int:
        """Copy canonical bytes in; returns the digest of what lies in the pool then."""
        if self._rows is None:
            self._store.write(block_ids, layers, payload)
            return digest(self._store.read(block_ids, layers), first_lane)
        part_lanes = self._side.part_bytes(layers) // LANE_BYTES
        source = Parts(_lanes_of(payload, len(block_ids)), np.arange(len(block_ids)), 0, part_lanes)
        return copy_parts(self._parts(self._rows, block_ids, layers), source, first_lane)

    def copy(
        self, rows: Rows, row_ids: Sequence[int], block_ids: Sequence[BlockId], layers: LayerRange
    ) -> int:
        """Copy from the rows of another pool; returns the digest of what lies in the own pool then."""
        if self._rows is None:
            columns = slice(layers.start * self._side.layer_bytes, layers.stop * self._side.layer_bytes)
            return self.write(block_ids, layers, rows[list(row_ids), columns].reshape(-1).data)
        source = self._parts(as_lanes(rows), row_ids, layers)
        return copy_parts(self._parts(self._rows, block_ids, layers), source)

    def _parts(self, rows: Lanes, row_ids: Sequence[int], layers: LayerRange) -> Parts:
        layer_lanes = self._side.layer_bytes // LANE_BYTES
        return Parts(rows, as_ids(row_ids), layers.start * layer_lanes, layers.stop * layer_lanes)


def _lanes_of(payload: memoryview, num_rows: int) -> Lanes:
    return as_lanes(np.frombuffer(payload, np.uint8).reshape(num_rows, -1))
