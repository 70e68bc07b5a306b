"""A step's sequences laid out as one flattened batch [1, T] without padding.

Decode-shaped rows come first, shortest context first, so that rows of similar context lie together;
prefill chunks follow, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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
    """Lay out a batch, with copies of its last row up to `min_rows` rows.

    Raises ValueError for a sequence without tokens or without blocks for them.
    """
    for sequence in batch.sequences:
        _check(sequence, block_size)
    layout = _Layout(block_size, len(batch.sequences))
    layout.add_decode_rows(batch.sequences)
    for index, sequence in enumerate(batch.sequences):
        if not sequence.as_decode:
            layout.add_chunk(index, sequence)
    return RaggedBatch(
        token_ids=_pad(np.concatenate(layout.tokens), min_rows),
        positions=_pad(np.concatenate(layout.positions), min_rows),
        slots=np.concatenate(layout.slots),
        decode=DecodeRows(layout.positions[0], tuple(layout.decode_tables)),
        prefills=tuple(layout.prefills),
        last_rows=layout.last_rows,
        fresh_blocks=_fresh_blocks(batch.sequences, block_size),
    )


class _Layout:
    """A flattened batch in the making: parts in the order of their rows."""

    def __init__(self, block_size: int, num_sequences: int) -> None:
        self._block_size = block_size
        self._num_rows = 0
        self.tokens: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.slots: list[np.ndarray] = []
        self.decode_tables: list[np.ndarray] = []
        self.prefills: list[PrefillRows] = []
        self.last_rows = np.zeros(num_sequences, dtype=np.int64)

    def add_decode_rows(self, sequences: Sequence[SequenceStep]) -> None:
        rows = sorted(_decode_rows(sequences), key=lambda row: row.position)
        tables = {i: _table(sequences[i]) for i in {row.sequence for row in rows}}
        self.decode_tables = [tables[row.sequence][: row.position // self._block_size + 1] for row in rows]
        for flat_row, row in enumerate(rows):
            self.last_rows[row.sequence] = flat_row  # positions ascend: a sequence's last row comes last
        positions = np.array([row.position for row in rows], dtype=np.int64)
        last_blocks = np.array([table[-1] for table in self.decode_tables], dtype=np.int64)
        self._add(
            tokens=np.array([row.token for row in rows], dtype=np.int64),
            positions=positions,
            slots=last_blocks * self._block_size + positions % self._block_size,
        )

    def add_chunk(self, index: int, sequence: SequenceStep) -> None:
        length, size = sequence.num_new_tokens, self._block_size
        positions = np.arange(sequence.start, sequence.start + length)
        table = _table(sequence)[: -(-(sequence.start + length) // size)]
        self.prefills.append(PrefillRows(self._num_rows, length, sequence.start, table))
        self._add(
            tokens=np.frombuffer(sequence.tokens, dtype="<u4").astype(np.int64),
            positions=positions,
            slots=table[positions // size] * size + positions % size,
        )
        self.last_rows[index] = self._num_rows - 1

    def _add(self, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> None:
        self.tokens.append(tokens)
        self.positions.append(positions)
        self.slots.append(slots)
        self._num_rows += len(tokens)


@dataclass(frozen=True, slots=True)
class _DecodeRow:
    sequence: int
    position: int
    token: int


def _decode_rows(sequences: Sequence[SequenceStep]) -> list[_DecodeRow]:
    return [
        _DecodeRow(index, sequence.start + offset, int(token))
        for index, sequence in enumerate(sequences)
        if sequence.as_decode
        for offset, token in enumerate(np.frombuffer(sequence.tokens, dtype="<u4"))
    ]


def _table(sequence: SequenceStep) -> np.ndarray:
    return np.asarray(sequence.block_ids, dtype=np.int64)


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
            f"{len(sequence.block_ids)} blocks of {block_size} tokens do not cover the "
            f"{sequence.start + length} tokens of a sequence"
        )
