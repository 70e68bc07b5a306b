"""Pools that a tensor-parallel worker, or another engine, would have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pdserve.contract.ids import BlockId
from pdserve.contract.work import LayerRange, PoolExport

_TOKEN_AXIS, _HEAD_AXIS = 3, 4


@dataclass(frozen=True)
class PoolShape:
    """In canonical order: [num_blocks, num_layers, 2, block_size, num_heads, head_dim], two bytes each."""

    num_blocks: int = 24
    num_layers: int = 3
    block_size: int = 4
    num_heads: int = 4
    head_dim: int = 8

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.num_blocks, self.num_layers, 2, self.block_size, self.num_heads, self.head_dim)


class ShardedPool:
    """A BlockStore cut by heads: rank r of `degree` has [num_blocks, num_layers, 2, block_size,
    num_heads / degree, head_dim], or with `heads_first` the heads before the tokens."""

    def __init__(self, shape: PoolShape, degree: int, *, heads_first: bool = False) -> None:
        self._shape = shape
        self.num_blocks = shape.num_blocks
        self.block_bytes = int(np.prod(shape.sizes[1:])) * 2
        sizes = list(shape.sizes)
        sizes[_HEAD_AXIS] //= degree
        if heads_first:
            sizes[_TOKEN_AXIS], sizes[_HEAD_AXIS] = sizes[_HEAD_AXIS], sizes[_TOKEN_AXIS]
        self._memory = [np.zeros(sizes, np.uint16) for _ in range(degree)]
        # The same as views in canonical order.
        self._shards = [
            rank.swapaxes(_TOKEN_AXIS, _HEAD_AXIS) if heads_first else rank for rank in self._memory
        ]

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytearray:
        parts = [shard[list(block_ids), layers.start : layers.stop] for shard in self._shards]
        return bytearray(np.concatenate(parts, _HEAD_AXIS).tobytes())

    def write(self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview) -> None:
        canonical = np.frombuffer(payload, np.uint16).reshape(
            len(block_ids), len(layers), *self._shape.sizes[2:]
        )
        for shard, heads in zip(
            self._shards, np.split(canonical, len(self._shards), _HEAD_AXIS), strict=True
        ):
            shard[list(block_ids), layers.start : layers.stop] = heads

    def export(self) -> PoolExport | None:
        """Nobody can map it: its rows are not in canonical order."""
        return None

    def fill(self, canonical: NDArray[np.uint16]) -> None:
        for shard, heads in zip(
            self._shards, np.split(canonical, len(self._shards), _HEAD_AXIS), strict=True
        ):
            shard[:] = heads

    @property
    def canonical(self) -> NDArray[Any]:
        """A copy of everything, put together by hand."""
        return np.concatenate(self._shards, _HEAD_AXIS)
