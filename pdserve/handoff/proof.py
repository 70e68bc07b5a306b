"""What of a prompt's KV is verified in the decode worker's own blocks. Pure.

Segments may come in any order and cover some layers of some blocks. A block is proven when all its layers are
verified; only the proven blocks at the front, with no gap before them, may be believed.
"""

from pdserve.contract.errors import ProtocolViolation
from pdserve.contract.messages import Segment
from pdserve.contract.work import LayerRange
from pdserve.handoff.digest import combine


class Proof:
    """Of a prompt of `num_blocks` blocks, whose first `num_held` were here before."""

    def __init__(self, num_blocks: int, num_layers: int, num_held: int) -> None:
        self._num_held = num_held
        self._num_layers = num_layers
        self._all_layers = _bits(LayerRange(0, num_layers))
        # Of every block, one bit per verified layer.
        self._verified = [self._all_layers] * num_held + [0] * (num_blocks - num_held)
        self._digests: dict[int, int] = {}  # segment index -> digest
        self._under_way: dict[int, Segment] = {}  # by index
        self._num_proven = num_held

    @property
    def num_proven_blocks(self) -> int:
        """Leading blocks that are whole."""
        return self._num_proven

    @property
    def is_whole(self) -> bool:
        return self._num_proven == len(self._verified)

    @property
    def num_segments(self) -> int:
        return len(self._digests)

    @property
    def digest(self) -> int:
        """Of all verified segments; see `Sealed`."""
        return combine(self._digests.values())

    def has(self, index: int) -> bool:
        """Whether this segment is verified already."""
        return index in self._digests

    def is_under_way(self, index: int) -> bool:
        """Whether this segment is being copied."""
        return index in self._under_way

    def begin(self, segment: Segment) -> None:
        """`segment` will be copied. Raises ProtocolViolation when it would write what is not its own: outside
        the reserved blocks, or over KV that another has brought or brings."""
        last = segment.first_block + segment.num_blocks
        if not self._num_held <= segment.first_block < last <= len(self._verified):
            raise ProtocolViolation(f"segment {segment.index} lies outside the reserved blocks")
        if not 0 <= segment.layers.start < segment.layers.stop <= self._num_layers:
            raise ProtocolViolation(f"segment {segment.index} is of layers that the model has not")
        layers = _bits(segment.layers)
        if any(verified & layers for verified in self._verified[segment.first_block : last]):
            raise ProtocolViolation(f"segment {segment.index} brings KV that another one has brought")
        if any(_overlap(segment, other) for other in self._under_way.values()):
            raise ProtocolViolation(f"segment {segment.index} brings KV that another one brings")
        self._under_way[segment.index] = segment

    def fail(self, segment: Segment) -> None:
        """The copy of `segment` did not match its digest."""
        del self._under_way[segment.index]

    def add(self, segment: Segment) -> None:
        """`segment` is copied and its digest matched."""
        del self._under_way[segment.index]
        self._digests[segment.index] = segment.digest
        layers = _bits(segment.layers)
        for block in range(segment.first_block, segment.first_block + segment.num_blocks):
            self._verified[block] |= layers
        while not self.is_whole and self._verified[self._num_proven] == self._all_layers:
            self._num_proven += 1


def _overlap(one: Segment, other: Segment) -> bool:
    """Whether two segments share a layer of a block."""
    first = max(one.first_block, other.first_block)
    stop = min(one.first_block + one.num_blocks, other.first_block + other.num_blocks)
    return first < stop and bool(_bits(one.layers) & _bits(other.layers))


def _bits(layers: LayerRange) -> int:
    return (1 << layers.stop) - (1 << layers.start)
