"""A step's sequences laid out as one flattened batch [1, T] without padding.

Decode-shaped rows come first, shortest context first, so that rows of similar context lie together;
prefill chunks follow, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdserve.contract.tokens import num_tokens
from pdserve.contract.work import SequenceStep, StepBatch


@dataclass(frozen=True, slots=True)
class PrefillRows:
    """A chunk of one sequence: flattened rows [first_row, first_row + length) at positions from `start`."""

    first_row: int
    length: int
    start: int
    block_ids: np.ndarray  # int64, covers [0, start + length)

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Flattened rows [0, len(positions)), each a token that attends to its own sequence up to itself."""

    positions: np.ndarray  # int64 [rows], ascending
    block_ids: tuple[np.ndarray, ...]  # int64 each, covers [0, position]


@dataclass(frozen=True, slots=True)
class RaggedBatch:
    """Everything about one step that does not depend on the layer."""

    token_ids: np.ndarray  # int64 [padded T]
    positions: np.ndarray  # int64 [padded T]
    slots: np.ndarray  # int64 [T]: block id * block_size + offset where the row's KV goes
    decode: DecodeRows
    prefills: tuple[PrefillRows, ...]
    last_rows: np.ndarray  # int64 [sequences]: flattened row of each sequence's last new token
    fresh_blocks: list[int]
    """Blocks that this step begins to fill but does not fill up."""


def flatten(batch: StepBatch, block_size: int, min_rows: int) -> RaggedBatch:
    """Lay out a batch, with copies of its last row up to `min_rows` rows. Raises ValueError for a sequence without tokens or without blocks for them."""
    for sequence in batch.sequences:
        _check(sequence, block_size)
    rows = sorted(_decode_rows(batch), key=lambda row: row.position)
    chunks = [(index, s) for index, s in enumerate(batch.sequences) if not s.as_decode]
    tables = {index: np.asarray(s.block_ids, dtype=np.int64) for index, s in enumerate(batch.sequences)}
    last_rows = np.zeros(len(batch.sequences), dtype=np.int64)
    token_parts = [np.array([row.token for row in rows], dtype=np.int64)]
    position_parts = [np.array([row.position for row in rows], dtype=np.int64)]
    slot_parts = [
        np.array([_slot(tables[row.sequence], row.position, block_size) for row in rows], dtype=np.int64)
    ]
    for flat_row, row in enumerate(rows):
        last_rows[row.sequence] = flat_row  # ascending positions: the sequence's last row is seen last
    prefills = []
    total = len(rows)
    for index, sequence in chunks:
        length = sequence.num_new_tokens
        positions = np.arange(sequence.start, sequence.start + length)
        token_parts.append(np.frombuffer(sequence.tokens, dtype="<u4").astype(np.int64))
        position_parts.append(positions)
        slot_parts.append(_slot(tables[index], positions, block_size))
        blocks = tables[index][: -(-(sequence.start + length) // block_size)]
        prefills.append(PrefillRows(total, length, sequence.start, blocks))
        total += length
        last_rows[index] = total - 1
    decode = DecodeRows(
        positions=position_parts[0],
        block_ids=tuple(tables[row.sequence][: row.position // block_size + 1] for row in rows),
    )
    return RaggedBatch(
        token_ids=_pad(np.concatenate(token_parts), min_rows),
        positions=_pad(np.concatenate(position_parts), min_rows),
        slots=np.concatenate(slot_parts),
        decode=decode,
        prefills=tuple(prefills),
        last_rows=last_rows,
        fresh_blocks=_fresh_blocks(batch.sequences, block_size),
    )


@dataclass(frozen=True, slots=True)
class _DecodeRow:
    sequence: int
    position: int
    token: int


def _decode_rows(batch: StepBatch) -> list[_DecodeRow]:
    return [
        _DecodeRow(index, sequence.start + offset, int(token))
        for index, sequence in enumerate(batch.sequences)
        if sequence.as_decode
        for offset, token in enumerate(np.frombuffer(sequence.tokens, dtype="<u4"))
    ]


def _slot(table: np.ndarray, position: "np.ndarray | int", block_size: int) -> np.ndarray:
    return table[position // block_size] * block_size + position % block_size


def _fresh_blocks(sequences: Sequence[SequenceStep], block_size: int) -> list[int]:
    """A block is fresh when its first token is written now. Only a sequence's last block can stay partly
    filled; the others are overwritten whole."""
    fresh = []
    for sequence in sequences:
        stop = sequence.start + sequence.num_new_tokens
        last_block_start = (stop - 1) // block_size * block_size
        if sequence.start <= last_block_start and stop % block_size:
            fresh.append(int(sequence.block_ids[last_block_start // block_size]))
    return fresh


def _pad(rows: np.ndarray, min_rows: int) -> np.ndarray:
    return np.pad(rows, (0, max(0, min_rows - len(rows))), mode="edge")


def _check(sequence: SequenceStep, block_size: int) -> None:
    length = num_tokens(sequence.tokens)
    if length == 0:
        raise ValueError("a sequence in a step needs at least one token")
    if len(sequence.block_ids) * block_size < sequence.start + length:
        raise ValueError(
            f"{len(sequence.block_ids)} blocks of {block_size} tokens do not cover the {sequence.start + length} "
            "tokens of a sequence"
        )
