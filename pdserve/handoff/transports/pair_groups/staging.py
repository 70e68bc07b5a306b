"""Pieces of segments between a worker's own pool and tensors of bytes that a group can move."""

from collections.abc import Sequence

import torch

from pdserve.contract.ids import BlockId
from pdserve.handoff.transports.base import LocalSide
from pdserve.handoff.transports.pieces import Piece
from pdserve.handoff.transports.pool_bytes import PoolBytes

Payload = torch.Tensor | bytes
"""One piece in canonical order: a tensor as the group delivers it, or bytes as a stream does."""


class PoolStaging:
    """Runs on the transfer thread. Staging memory is the host's; `TwoRankGroup` brings it to a GPU."""

    def __init__(self, side: LocalSide) -> None:
        self._pool = PoolBytes(side)

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8, for `stage`."""
        return torch.empty(num_bytes, dtype=torch.uint8)

    def stage(self, block_ids: Sequence[BlockId], piece: Piece, target: torch.Tensor) -> int:
        """Copy a piece of `block_ids` out of the pool; its share of the segment's digest."""
        blocks = block_ids[piece.start : piece.stop]
        return self._pool.read_into(blocks, piece.layers, target.numpy().data, piece.first_lane)

    def take(self, block_ids: Sequence[BlockId], piece: Piece, payload: Payload) -> int:
        """Copy a piece into the pool; the share of the digest of what lies there then."""
        view = memoryview(payload) if isinstance(payload, bytes) else payload.cpu().numpy().data
        return self._pool.write(block_ids[piece.start : piece.stop], piece.layers, view, piece.first_lane)
