"""Segments cut into pieces of a few MiB, for transports that move a segment in several steps."""

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import LANE_BYTES

PIECE_BYTES = 2 << 20
"""Most bytes of one piece, unless one layer of one block is more. Where both ends cut, they agree on it."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Blocks [start, stop) of a segment, in `layers`. `first_lane` is its place in the segment's digest."""

    start: int
    stop: int
    layers: LayerRange
    first_lane: int
    num_bytes: int


def cut(num_blocks: int, layers: LayerRange, layer_bytes: int) -> Iterator[Piece]:
    """The pieces of a segment in canonical order: whole parts of blocks where one fits into a piece,
    else some layers of one block."""
    blocks_per_piece = PIECE_BYTES // (len(layers) * layer_bytes)
    if blocks_per_piece:
        groups = [layers]
    else:
        blocks_per_piece = 1
        groups = _split(layers, max(1, PIECE_BYTES // layer_bytes))
    first_lane = 0
    for start in range(0, num_blocks, blocks_per_piece):
        stop = min(start + blocks_per_piece, num_blocks)
        for group in groups:
            num_bytes = (stop - start) * len(group) * layer_bytes
            yield Piece(start, stop, group, first_lane, num_bytes)
            first_lane += num_bytes // LANE_BYTES


def _split(layers: LayerRange, size: int) -> list[LayerRange]:
    starts = range(layers.start, layers.stop, size)
    return [LayerRange(start, min(start + size, layers.stop)) for start in starts]
