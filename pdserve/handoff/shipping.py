"""What of a prompt's KV is ready to be sent, how it is cut into segments, and what became of those.

Whole blocks are ready when the chunk that fills them is computed. The blocks of the last chunk are ready by
groups of layers while that chunk is still computed. What waits because the window is full is joined, so that
a slow transfer gets few large segments and a quick one gets everything early.
"""

from collections import deque
from dataclasses import dataclass, replace

from pdserve.contract.work import LayerRange


@dataclass(frozen=True, slots=True)
class Shipment:
    """Some or all layers of blocks, named by their place in the sequence, to send now as segment `index`."""

    index: int
    first_block: int
    num_blocks: int
    layers: LayerRange


class Shipping:
    """The segments of one prompt of `num_blocks` blocks, at its source."""

    def __init__(self, num_blocks: int, num_layers: int) -> None:
        self._num_blocks = num_blocks
        self._num_layers = num_layers
        self._num_blocks_ready = 0  # leading blocks that are complete, or are at the decode worker
        self._num_layers_ready = 0  # of the blocks behind them
        self._ready: deque[_Part] = deque()  # and not sent yet, in the order in which it became ready
        self._shipments: list[Shipment] = []
        self._again: list[int] = []  # indexes of segments to be sent again
        self._unacknowledged: set[int] = set()

    def skip(self, num_blocks: int) -> None:
        """The decode worker has the KV of the first `num_blocks`. Before anything is ready."""
        self._num_blocks_ready = num_blocks

    def blocks_are_ready(self, num_blocks: int) -> None:
        """The first `num_blocks` are complete. Not once layers of later ones have been told of."""
        first = self._num_blocks_ready
        if num_blocks > first:
            self._add(_Part(first, num_blocks - first, LayerRange(0, self._num_layers)))
            self._num_blocks_ready = num_blocks

    def layers_are_ready(self, num_layers: int) -> None:
        """All blocks to the prompt's end are final in layers [0, `num_layers`)."""
        first = self._num_blocks_ready
        if num_layers > self._num_layers_ready and self._num_blocks > first:
            self._add(_Part(first, self._num_blocks - first, LayerRange(self._num_layers_ready, num_layers)))
            self._num_layers_ready = num_layers

    def next(self, window: int, max_block_layers: int) -> Shipment | None:
        """What to send now: at most `max_block_layers` layers of blocks, but at least one block. None when
        nothing is ready or `window` segments are unacknowledged."""
        if self._again:
            return self._shipments[self._again.pop(0)]
        if len(self._unacknowledged) >= window or not self._ready:
            return None
        part = self._take(max_block_layers)
        shipment = Shipment(len(self._shipments), part.first_block, part.num_blocks, part.layers)
        self._shipments.append(shipment)
        self._unacknowledged.add(shipment.index)
        return shipment

    def acknowledge(self, index: int, ok: bool) -> None:
        """A segment was copied and verified, or must be sent again."""
        if ok:
            self._unacknowledged.discard(index)
        elif index not in self._again:
            self._again.append(index)

    def give_up(self) -> None:
        """Nothing is needed any more but what has been announced."""
        self._ready.clear()

    @property
    def num_unacknowledged(self) -> int:
        return len(self._unacknowledged)

    @property
    def num_segments(self) -> int:
        return len(self._shipments)

    @property
    def is_idle(self) -> bool:
        """All that is ready has been handed to the transport at least once."""
        return not self._ready and not self._again

    def _add(self, part: "_Part") -> None:
        joined = self._ready[-1].joined(part) if self._ready else None
        if joined is None:
            self._ready.append(part)
        else:
            self._ready[-1] = joined

    def _take(self, max_block_layers: int) -> "_Part":
        """The next part, or as much of it as may be sent at once."""
        part = self._ready.popleft()
        taken, rest = part.split(max(1, max_block_layers // len(part.layers)))
        if rest is not None:
            self._ready.appendleft(rest)
        return taken


@dataclass(frozen=True, slots=True)
class _Part:
    """A rectangle of blocks and layers."""

    first_block: int
    num_blocks: int
    layers: LayerRange

    @property
    def stop_block(self) -> int:
        return self.first_block + self.num_blocks

    def joined(self, later: "_Part") -> "_Part | None":
        """Both as one, if they make a rectangle."""
        if self.layers == later.layers and self.stop_block == later.first_block:
            return replace(self, num_blocks=self.num_blocks + later.num_blocks)
        same_blocks = (self.first_block, self.num_blocks) == (later.first_block, later.num_blocks)
        if same_blocks and self.layers.stop == later.layers.start:
            return replace(self, layers=LayerRange(self.layers.start, later.layers.stop))
        return None

    def split(self, num_blocks: int) -> "tuple[_Part, _Part | None]":
        """At most the first `num_blocks`, and what is left."""
        if num_blocks >= self.num_blocks:
            return self, None
        rest = _Part(self.first_block + num_blocks, self.num_blocks - num_blocks, self.layers)
        return replace(self, num_blocks=num_blocks), rest
