"""The source's end of every transport whose receivers read the source's pool by themselves."""

import asyncio
import functools
from collections.abc import Callable, Sequence

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment
from pdserve.contract.work import LayerRange
from pdserve.handoff.transports.base import SEGMENT_BYTES, LocalSide, TransferStats

Digest = Callable[[Sequence[BlockId], LayerRange], int]
"""Of parts of the own pool; runs on the transfer thread."""


class AnnouncingSender:
    """Says where the bytes lie and what their digest is. Implements `SegmentSender`."""

    def __init__(self, side: LocalSide, digest: Digest, max_segment_bytes: int = SEGMENT_BYTES) -> None:
        self.stats = TransferStats()
        self.max_segment_bytes = max_segment_bytes
        self._side = side
        self._digest = digest
        self._sending = asyncio.Lock()
        self._closed = False

    async def send(
        self, index: int, first_block: int, block_ids: Sequence[BlockId], layers: LayerRange
    ) -> Segment:
        started_at = self._side.clock.now()
        rows = tuple(block_ids)
        async with self._sending:
            if self._closed:
                raise StreamBroken("this transfer has ended")
            digest = await self._side.executor.copy(functools.partial(self._digest, rows, layers))
        num_bytes = len(rows) * self._side.part_bytes(layers)
        self.stats.add(num_bytes, self._side.clock.now() - started_at)
        return Segment(index, first_block, len(rows), layers, digest, num_bytes, source_blocks=rows)

    async def close(self) -> None:
        # A receiver that still reads the blocks digests what it got, and this call's Acks count no more.
        async with self._sending:
            self._closed = True


def check_source_blocks(segment: Segment, num_blocks: int) -> None:
    """Raises ProtocolViolation unless `segment` names one row for each of its blocks, all of them inside a
    source's pool of `num_blocks`."""
    rows = segment.source_blocks
    if len(rows) != segment.num_blocks or not all(0 <= row < num_blocks for row in rows):
        raise ProtocolViolation(f"segment {segment.index} names blocks that the source's pool has not")
