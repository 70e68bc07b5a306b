"""Which keys every row of a step attends to, as index tensors shared by all layers."""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.kv_pool import KvLayout
from pdserve.engine.ragged_batch import DecodeRows, PrefillRows, RaggedBatch

DECODE_TILE_TOKENS = 128
PREFILL_TILE_TOKENS = 64
PREFILL_PART_TOKENS = 4096
"""A query tile's scores over more keys than this would no longer stay in the caches between operators."""
_LENGTHS_PER_OCTAVE = 8


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Decode rows that see about as many keys: each is given the same number, a multiple of the tile's size.

    That number follows from the row's own position, so its products have the same shapes in every batch.
    """

    rows: slice | Tensor  # flattened rows, or int64 [rows]
    size: int
    key_rows: Tensor  # int64 [rows * blocks per row]: pool rows of the keys in layer 0
    mask: Tensor  # [rows, 1, keys], zero or minus infinity


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys at positions [start, stop) that a query tile sees."""

    start: int
    stop: int
    mask: Tensor | None  # [tile, n]: what its rows see of the last n keys; None: all of them


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Up to one tile of consecutive positions of one prefill chunk, at a multiple of the tile's size."""

    start: int
    """First position of the tile; the chunk may begin after it."""
    parts: tuple[KeyRange, ...]
    """All keys up to the tile's end that some row of it sees, cut at fixed multiples where they are many."""


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """One chunk of one sequence, cut into query tiles."""

    tiles: tuple[QueryTile, ...]
    query_rows: Tensor  # int64 [tiles * tile tokens]: flattened rows, any row where the chunk has none
    first_slot: int
    """Where in the tiles the chunk's first row lies."""
    first_row: int
    length: int
    key_start: int
    """Position of the first gathered key; a multiple of the block size."""
    key_rows: Tensor  # int64 [blocks]: pool rows of the keys in layer 0


class AttentionPlan:
    """The index tensors of one step, for every window size that the model's layers use."""

    def __init__(self, batch: RaggedBatch, layout: KvLayout, device: torch.device) -> None:
        self._batch = batch
        self._layout = layout
        self._device = device
        self._decode: dict[int | None, list[DecodeGroup]] = {}
        self._prefill: dict[int | None, list[PrefillTiles]] = {}
        self._causal: Tensor | None = None
        self.num_decode_rows = len(batch.decode.positions)
        self.write_rows = self._pool_write_rows(batch.slots)

    def decode_groups(self, window: int | None) -> list[DecodeGroup]:
        if window not in self._decode:
            self._decode[window] = self._cut_decode(self._batch.decode, window)
        return self._decode[window]

    def prefill_tiles(self, window: int | None) -> list[PrefillTiles]:
        if window not in self._prefill:
            self._prefill[window] = [self._cut_prefill(chunk, window) for chunk in self._batch.prefills]
        return self._prefill[window]

    def _pool_write_rows(self, slots: np.ndarray) -> Tensor:
        """Where each row's key of layer 0 goes, in rows of one token: int64 [T]."""
        size = self._layout.block_size
        rows = (slots // size) * (self._layout.num_layers * 2 * size) + slots % size
        return self._to_device(rows)

    def _cut_decode(self, rows: DecodeRows, window: int | None) -> list[DecodeGroup]:
        per_tile = max(1, DECODE_TILE_TOKENS // self._layout.block_size)
        tile_tokens = per_tile * self._layout.block_size
        first_seen = (
            np.zeros_like(rows.positions) if window is None else np.maximum(0, rows.positions - window + 1)
        )
        first_tiles = first_seen // tile_tokens
        num_tiles = _round_up(rows.positions // tile_tokens - first_tiles + 1)
        return [
            self._decode_group(rows, np.flatnonzero(num_tiles == count), int(count), first_seen, first_tiles)
            for count in np.unique(num_tiles)
        ]

    def _decode_group(
        self,
        rows: DecodeRows,
        members: np.ndarray,
        num_tiles: int,
        first_seen: np.ndarray,
        first_tiles: np.ndarray,
    ) -> DecodeGroup:
        per_tile = max(1, DECODE_TILE_TOKENS // self._layout.block_size)
        tile_tokens = per_tile * self._layout.block_size
        tables = [
            _blocks_from(rows.block_ids[row], int(first_tiles[row]) * per_tile, num_tiles * per_tile)
            for row in members
        ]
        keys = first_tiles[members, None] * tile_tokens + np.arange(num_tiles * tile_tokens)
        seen = (keys <= rows.positions[members, None]) & (keys >= first_seen[members, None])
        first, last = int(members[0]), int(members[-1])
        adjacent = last - first + 1 == len(members)
        return DecodeGroup(
            rows=slice(first, last + 1) if adjacent else self._to_device(members),
            size=len(members),
            key_rows=self._pool_key_rows(np.concatenate(tables)),
            mask=self._to_mask(seen)[:, None, :],
        )

    def _cut_prefill(self, chunk: PrefillRows, window: int | None) -> PrefillTiles:
        size = PREFILL_TILE_TOKENS
        first, stop = chunk.start // size, -(-chunk.stop // size)
        tiles = tuple(self._query_tile(index * size, window) for index in range(first, stop))
        slots = np.arange((stop - first) * size)
        rows = slots - (chunk.start - first * size)
        inside = (rows >= 0) & (rows < chunk.length)
        block_size = self._layout.block_size
        first_block = min(tile.parts[0].start for tile in tiles) // block_size
        num_blocks = -(-(stop * size) // block_size) - first_block
        table = chunk.block_ids[first_block:]
        padding = np.full(max(0, num_blocks - len(table)), table[-1])
        return PrefillTiles(
            tiles=tiles,
            query_rows=self._to_device(np.where(inside, rows, 0) + chunk.first_row),
            first_slot=chunk.start - first * size,
            first_row=chunk.first_row,
            length=chunk.length,
            key_start=first_block * block_size,
            key_rows=self._pool_key_rows(np.concatenate([table, padding])),
        )

    def _query_tile(self, start: int, window: int | None) -> QueryTile:
        stop = start + PREFILL_TILE_TOKENS
        if window is not None and window < stop:
            return QueryTile(start, (self._windowed(start, stop, window),))
        cuts = [*range(0, stop, PREFILL_PART_TOKENS), stop]
        parts = [KeyRange(first, last, None) for first, last in itertools.pairwise(cuts[:-1])]
        return QueryTile(start, (*parts, KeyRange(cuts[-2], stop, self._causal_mask())))

    def _windowed(self, start: int, stop: int, window: int) -> KeyRange:
        first = max(0, start - window + 1) // PREFILL_TILE_TOKENS * PREFILL_TILE_TOKENS
        queries, keys = np.arange(start, stop)[:, None], np.arange(first, stop)[None, :]
        return KeyRange(first, stop, self._to_mask((keys <= queries) & (keys > queries - window)))

    def _causal_mask(self) -> Tensor:
        if self._causal is None:
            self._causal = self._to_mask(np.tri(PREFILL_TILE_TOKENS, dtype=bool))
        return self._causal

    def _pool_key_rows(self, block_ids: np.ndarray) -> Tensor:
        return self._to_device(block_ids * (self._layout.num_layers * 2))

    def _to_mask(self, seen: np.ndarray) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._layout.dtype, device=self._device)
        return mask.masked_fill_(self._to_device(~seen), -torch.inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _round_up(num_tiles: np.ndarray) -> np.ndarray:
    """To at most `_LENGTHS_PER_OCTAVE` different values between a power of two and the next, so that a batch
    of any lengths makes few groups and no row is given more than an eighth too much."""
    octave = 2 ** np.floor(np.log2(num_tiles)).astype(np.int64)
    unit = np.maximum(1, octave // _LENGTHS_PER_OCTAVE)
    rounded: np.ndarray = -(-num_tiles // unit) * unit
    return rounded


def _blocks_from(block_ids: np.ndarray, first: int, count: int) -> np.ndarray:
    """`count` blocks; past the end the sequence's own last block, whose keys the mask hides."""
    blocks = block_ids[first : first + count]
    return np.concatenate([blocks, np.full(count - len(blocks), blocks[-1])])
