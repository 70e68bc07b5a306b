"""The interface of a transport: how one Prefill call's KV gets from the source to the decode worker.

```
source                                             decode worker
Transports.choose(offers)  -> choice, sender       Transports.offers() -> in PrefillOpen
       Starting{choice}    ------------------->    Transports.connect(choice, address) -> receiver
sender.send(...) -> Segment ------------------>    receiver.receive(segment, block_ids) -> verified?
                            <-----------------     Ack{ok}
sender.close()                                     receiver.close()
```

Rules that every transport keeps:

- Only the owner writes its pool: the receiver copies into its own blocks itself, on its transfer thread.
- The receiver digests what it has written to its own pool, so a read that raced a change at the source
  fails verification instead of being believed.
- When `send` or `receive` returns or raises, even cancelled, no local copy touches the blocks any more.
- Segments are sent one at a time. They are received in the order in which they were sent; `receive` may be
  called for the next while earlier ones are under way, and then waits for its turn.

What only one transport needs stays in its file; a new one implements `Transport` and nothing here changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pdserve.contract.errors import ConfigError, ProtocolViolation
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.contract.ports import BlockStore, Clock, EngineExecutor, MessageStream, Rng, Rpc
from pdserve.contract.work import DeviceMemory, LayerRange
from pdserve.handoff.digest import LANE_BYTES

SEGMENT_BYTES = 8 << 20
"""How large segments should be at most: so large that what each costs by itself hardly counts, so small that
the first bytes need not wait and a resend is cheap."""


@dataclass(frozen=True)
class LocalSide:
    """What a worker's transports work with; the same whether the worker sends or receives."""

    blocks: BlockStore
    num_layers: int
    executor: EngineExecutor
    rpc: Rpc
    clock: Clock
    rng: Rng

    def __post_init__(self) -> None:
        if self.blocks.block_bytes % (self.num_layers * LANE_BYTES):
            raise ConfigError(
                f"{self.blocks.block_bytes} bytes in a block of {self.num_layers} layers: a layer needs a "
                f"multiple of {LANE_BYTES}, for its digest; use another block_size or dtype"
            )

    @property
    def layer_bytes(self) -> int:
        """Bytes of one layer of one block."""
        return self.blocks.block_bytes // self.num_layers

    def part_bytes(self, layers: LayerRange) -> int:
        """Bytes of one block's part in `layers`; it is one contiguous piece of the block's row."""
        return len(layers) * self.layer_bytes

    def check_segment(self, segment: Segment, block_ids: Sequence[BlockId]) -> None:
        """Raises ProtocolViolation when `segment` cannot be what belongs into `block_ids`."""
        layers = segment.layers
        if not 0 <= layers.start < layers.stop <= self.num_layers:
            raise ProtocolViolation(f"segment {segment.index} is of layers {layers.start} to {layers.stop}")
        num_bytes = len(block_ids) * self.part_bytes(layers)
        if segment.num_blocks != len(block_ids) or segment.num_bytes != num_bytes:
            raise ProtocolViolation(
                f"segment {segment.index} says {segment.num_blocks} blocks and {segment.num_bytes} bytes; "
                f"{len(block_ids)} blocks and {num_bytes} bytes belong there"
            )


@runtime_checkable
class MappedBlocks(Protocol):
    """What a BlockStore may have besides: its bytes without a copy."""

    def rows(self) -> memoryview | None:
        """The pool's own bytes, writable, format "B", shape [num_blocks, block_bytes], C-contiguous, each row
        in canonical order; None when they do not lie so in host memory."""
        ...


@runtime_checkable
class DeviceBlocks(Protocol):
    """What a BlockStore on a GPU may have besides: where its bytes lie."""

    def device_memory(self) -> DeviceMemory | None:
        """The pool's memory, [num_blocks, block_bytes]; None when it is not in a GPU's."""
        ...


@dataclass
class TransferStats:
    """What one call has moved so far, segments that had to be sent again included."""

    num_segments: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """Spent in `send` or `receive`."""
    num_mismatches: int = 0
    """Segments whose digest did not match."""

    def add(self, num_bytes: int, seconds: float, matched: bool = True) -> None:
        self.num_segments += 1
        self.num_bytes += num_bytes
        self.seconds += seconds
        self.num_mismatches += not matched


class SegmentSender(Protocol):
    """The source's end of one Prefill call."""

    @property
    def stats(self) -> TransferStats: ...

    @property
    def max_segment_bytes(self) -> int:
        """What suits the transport; larger segments are legal."""
        ...

    async def send(
        self, index: int, first_block: int, block_ids: Sequence[BlockId], layers: LayerRange
    ) -> Segment:
        """Start moving the blocks; the message belongs on the Prefill stream before the next call.

        `first_block` is the place of `block_ids[0]` in the sequence's block table. The blocks must not
        change until the Ack. Waits while the receiver is slow. To send a segment again, call with the
        same arguments. Raises StreamBroken when the receiver has gone or never came.
        """
        ...

    async def close(self) -> None:
        """The call has ended, well or not. Afterwards nothing of it reads the blocks here, and whoever
        still reads them elsewhere is not believed. Idempotent."""
        ...


class SegmentReceiver(Protocol):
    """The decode worker's end of one Prefill call."""

    @property
    def stats(self) -> TransferStats: ...

    async def receive(self, segment: Segment, block_ids: Sequence[BlockId]) -> bool:
        """Copy a segment into the own blocks `block_ids`; False when the digest of that copy is wrong.

        Raises StreamBroken when the source has gone and ProtocolViolation when the segment does not fit
        the blocks or the bytes. After it raised, only `close` is legal.
        """
        ...

    async def close(self) -> None:
        """The call has ended, well or not. Nothing of it is left afterwards. Idempotent."""
        ...


@dataclass(frozen=True)
class Accepted:
    """The source can use an offer."""

    choice: TransportChoice
    sender: SegmentSender


@dataclass(frozen=True)
class Declined:
    """The source cannot use an offer; `reason` is for people."""

    reason: str


class Transport(Protocol):
    """One way of moving KV bytes; one object per worker, for both directions."""

    @property
    def name(self) -> str: ...

    def offer(self) -> TransportOffer | None:
        """What to offer as a receiver; None when this worker cannot receive this way."""
        ...

    def accept(self, offer: TransportOffer) -> Accepted | Declined:
        """The source's answer to a receiver's offer of this transport."""
        ...

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        """The receiver's end of what the source chose. Raises StreamBroken when the source is not
        there and ProtocolViolation when the choice makes no sense."""
        ...

    async def close(self) -> None:
        """Let go of everything that outlives single calls."""
        ...


@runtime_checkable
class ServesStreams(Protocol):
    """A transport whose receivers open Kv streams to the source."""

    async def serve(self, stream: MessageStream, greeting: bytes) -> None:
        """Serve one; `greeting` is what its first message says behind the transport's name."""
        ...
