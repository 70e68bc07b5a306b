"""Which keys every row of a step attends to, as index tensors shared by all layers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pdserve.engine.kv_pool import KvLayout
from pdserve.engine.ragged_batch import DecodeRows, PrefillRows, RaggedBatch

DECODE_TILE_TOKENS = 128
PREFILL_TILE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """Decode rows, each cut into tiles of keys at fixed multiples of the tile's size."""

    num_rows: int
    row_of_tile: Tensor  # int64 [tiles]
    key_rows: Tensor  # int64 [tiles * blocks per tile]: pool rows of the keys in layer 0
    mask: Tensor  # [tiles, 1, 1, tile tokens], zero or minus infinity
    merges: tuple["TileMerge", ...]


@dataclass(frozen=True, slots=True)
class TileMerge:
    """Rows [first_row, stop_row) with about the same number of tiles."""

    first_row: int
    stop_row: int
    tiles: Tensor  # int64 [rows, most tiles of a row]
    absent: Tensor  # bool [rows, most tiles of a row, 1]


@dataclass(frozen=True, slots=True)
class QueryTile:
    """Up to one tile of consecutive positions of one prefill chunk, at a multiple of the tile's size."""

    start: int
    """First position of the tile; the chunk may begin after it."""
    past_start: int
    """First key position of the past that some row of the tile can see; a multiple of the tile's size."""
    past_mask: Tensor | None  # [1, 1, groups * tile, start - past_start]; None: all rows see all of it
    past_unseen: Tensor | None  # bool [groups * tile]: rows whose window ends after the past; None as above
    self_mask: Tensor | None  # [1, 1, tile, tile]; None: causal


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

    def __init__(self, batch: RaggedBatch, layout: KvLayout, groups: int, device: torch.device) -> None:
        self._batch = batch
        self._layout = layout
        self._groups = groups
        self._device = device
        self._decode: dict[int | None, DecodeTiles] = {}
        self._prefill: dict[int | None, list[PrefillTiles]] = {}
        self.num_decode_rows = len(batch.decode.positions)
        self.write_rows = self._pool_write_rows(batch.slots)

    def decode_tiles(self, window: int | None) -> DecodeTiles:
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

    def _cut_decode(self, rows: DecodeRows, window: int | None) -> DecodeTiles:
        per_tile = max(1, DECODE_TILE_TOKENS // self._layout.block_size)
        tile_tokens = per_tile * self._layout.block_size
        first_seen = (
            np.zeros_like(rows.positions) if window is None else np.maximum(0, rows.positions - window + 1)
        )
        first_tile = first_seen // tile_tokens
        counts = rows.positions // tile_tokens - first_tile + 1
        tables = [
            _blocks_of_tiles(blocks, int(first), int(count), per_tile)
            for blocks, first, count in zip(rows.block_ids, first_tile, counts, strict=True)
        ]
        row_of_tile = np.repeat(np.arange(len(counts)), counts)
        offsets = np.cumsum(counts) - counts
        tile_index = np.arange(len(row_of_tile)) - offsets[row_of_tile] + first_tile[row_of_tile]
        key_positions = tile_index[:, None] * tile_tokens + np.arange(tile_tokens)
        seen = (key_positions <= rows.positions[row_of_tile, None]) & (
            key_positions >= first_seen[row_of_tile, None]
        )
        if len(row_of_tile) == 1:
            # A single piece of work would run outside torch's parallel region, where its matrix products may
            # be cut among threads and so sum in another order. A second, equal tile keeps it inside.
            tables, row_of_tile, seen = tables * 2, np.repeat(row_of_tile, 2), np.repeat(seen, 2, axis=0)
        return DecodeTiles(
            num_rows=len(counts),
            row_of_tile=self._to_device(row_of_tile),
            key_rows=self._pool_key_rows(np.concatenate(tables)),
            mask=self._to_mask(seen)[:, None, None, :],
            merges=tuple(self._group_merges(offsets, counts)),
        )

    def _group_merges(self, offsets: np.ndarray, counts: np.ndarray) -> list[TileMerge]:
        """Group rows (ascending in position) so that padding at most doubles the tiles merged."""
        merges = []
        first = 0
        for row in range(1, len(counts) + 1):
            if row == len(counts) or counts[row] > 2 * counts[first]:
                merges.append(self._merge_of(first, row, offsets, counts))
                first = row
        return merges

    def _merge_of(self, first: int, stop: int, offsets: np.ndarray, counts: np.ndarray) -> TileMerge:
        columns = np.arange(counts[first:stop].max())
        absent = columns >= counts[first:stop, None]
        tiles = offsets[first:stop, None] + np.where(absent, 0, columns)
        return TileMerge(first, stop, self._to_device(tiles), self._to_device(absent[:, :, None]))

    def _cut_prefill(self, chunk: PrefillRows, window: int | None) -> PrefillTiles:
        size = PREFILL_TILE_TOKENS
        first, stop = chunk.start // size, -(-chunk.stop // size)
        tiles = tuple(self._query_tile(index * size, window) for index in range(first, stop))
        slots = np.arange((stop - first) * size)
        rows = slots - (chunk.start - first * size)
        inside = (rows >= 0) & (rows < chunk.length)
        block_size = self._layout.block_size
        first_block = min(tile.past_start for tile in tiles) // block_size
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
        size = PREFILL_TILE_TOKENS
        if window is None or window >= start + size:
            return QueryTile(start, 0, None, None, None)
        queries = np.arange(start, start + size)[:, None]
        past_start = max(0, start - window + 1) // size * size
        past = np.arange(past_start, start)[None, :] > queries - window
        own = np.arange(start, start + size)[None, :]
        near = (own <= queries) & (own > queries - window)
        past = np.tile(past, (self._groups, 1))
        masked = not past.all()
        return QueryTile(
            start=start,
            past_start=past_start,
            past_mask=self._to_mask(past)[None, None] if masked else None,
            past_unseen=self._to_device(np.logical_not(past.any(axis=1))) if masked else None,
            self_mask=self._to_mask(near)[None, None] if window < size else None,
        )

    def _pool_key_rows(self, block_ids: np.ndarray) -> Tensor:
        return self._to_device(block_ids * (self._layout.num_layers * 2))

    def _to_mask(self, seen: np.ndarray) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=self._layout.dtype, device=self._device)
        return mask.masked_fill_(self._to_device(~seen), -torch.inf)

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


def _blocks_of_tiles(block_ids: np.ndarray, first_tile: int, count: int, per_tile: int) -> np.ndarray:
    """The blocks of tiles [first_tile, first_tile + count); past the end the sequence's own last block, whose
    keys the mask hides."""
    blocks = block_ids[first_tile * per_tile :]
    return np.concatenate([blocks, np.full(count * per_tile - len(blocks), blocks[-1])])
