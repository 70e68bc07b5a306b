"""The Protocols through which journeys, worker loops and the hand-off see the world.

Each has two implementations that pass one contract suite, so that the same code runs on real machines
and in virtual time:

| Protocol         | real                              | in one process                     |
|------------------|-----------------------------------|------------------------------------|
| Clock            | pdserve.clock.LoopClock           | pdserve.clock.VirtualClock         |
| Rng              | pdserve.clock.SystemRng           | pdserve.clock.SeededRng            |
| Rpc              | pdserve.rpc.grpc_rpc.GrpcRpc      | pdserve.rpc.memory_rpc.MemoryRpc   |
| EngineExecutor   | pdserve.engine.executor.ThreadExecutor | pdserve.engine.executor.InlineExecutor |
| Engine           | pdserve.engine.engine.ModelEngine | pdserve.engine.fake_engine.FakeEngine |
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from enum import StrEnum
from typing import Protocol, TypeVar

from pdserve.contract.errors import ErrorCode
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Message
from pdserve.contract.model_work import Roofline
from pdserve.contract.work import LayerRange, ModelInfo, PoolExport, StepBatch, StepCost, StepResult

T = TypeVar("T")


class Clock(Protocol):
    """Monotonic time in seconds."""

    def now(self) -> float: ...

    def unix_time(self) -> float:
        """For people to read; may jump."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    def timeout(self, seconds: float | None) -> AbstractAsyncContextManager[object]:
        """Raises TimeoutError from the block after `seconds`; None never does."""
        ...


class Rng(Protocol):
    """Source of ids and seeds."""

    def random_bits(self, num_bits: int) -> int: ...


class Call(StrEnum):
    """The kinds of stream that a worker serves."""

    SESSION = "Session"
    WATCH = "Watch"
    PREFILL = "Prefill"
    KV = "Kv"


class MessageStream(Protocol):
    """One side of a bidirectional stream of messages. One task sends and one task receives at a time."""

    @property
    def peer(self) -> str:
        """Who is at the other end, for logs."""
        ...

    async def send(self, message: Message) -> None:
        """Send one message, waiting while the window is full. Raises StreamBroken when the other side is
        gone. Sending End closes this side; nothing may be sent after it."""
        ...

    async def receive(self) -> Message:
        """The next message; End comes as a message and is the last one. Raises StreamBroken when the
        stream stopped without it."""
        ...

    def cancel(self) -> None:
        """Give up at once. The other side sees a broken stream. Idempotent, and harmless after both Ends."""
        ...


Handler = Callable[[MessageStream], Awaitable[None]]
"""Serves one incoming stream. It is cancelled when the stream breaks. When it returns or raises without
having sent End, the server sends End with the error (PROTOCOL if it returned silently)."""


Refusal = Callable[[ErrorCode], None]
"""Told of each incoming call that is refused because of what its peer is or sent."""


class RpcServer(Protocol):
    @property
    def address(self) -> str:
        """host:port that peers can open; the port is the real one when 0 was asked for."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Take no new streams, give open ones `grace_s` seconds, then break them."""
        ...


class Rpc(Protocol):
    """Opens and serves streams. Keeps one connection per (address, Call), as the hand-off's rules say."""

    async def open(self, address: str, call: Call) -> MessageStream:
        """Start a stream. Does not wait for the peer; a peer that is not there breaks the stream. Raises
        ConfigError for what is no address, or none that may be called."""
        ...

    async def serve(
        self, address: str, handlers: Mapping[Call, Handler], on_refusal: Refusal | None = None
    ) -> RpcServer:
        """Raises ConfigError when the address cannot or may not be listened at."""
        ...

    async def close(self) -> None:
        """Break all streams opened here and close all connections."""
        ...


class BlockStore(Protocol):
    """The bytes of a KV pool. Thread-safe for disjoint blocks or layers; runs on the transfer thread."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytearray:
        """A copy of the blocks' bytes in canonical order (see `Segment`)."""
        ...

    def write(self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview) -> None:
        """Copy canonical bytes into the blocks. Raises ValueError when the size is wrong."""
        ...

    def export(self) -> PoolExport | None:
        """How a process on this host can map the pool; None when it cannot, or when the rows that it would
        see are not whole blocks in canonical order: those who map it copy them as they lie."""
        ...


LayersDone = Callable[[int], None]
"""Told while a step runs, with growing n: the new KV of all its sequences is in the pool in layers [0, n),
will not change any more and may be copied."""


class Engine(Protocol):
    """A model with its KV pool. Synchronous; `step` runs on the engine's thread only."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def blocks(self) -> BlockStore: ...

    @property
    def cost(self) -> StepCost:
        """Fitted by a short calibration at load."""
        ...

    @property
    def roofline(self) -> Roofline:
        """What its steps ask of the device, and what the device gives."""
        ...

    def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """Run one step. `layers_done` is told of every group of layers, the last included, on this thread or
        another, and never after `step` has returned or raised."""
        ...


class EngineExecutor(Protocol):
    """Runs an engine beside an event loop. Steps run one by one, in order; copies likewise, beside steps."""

    async def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        """Run one step. Even when cancelled it does not return before the step has ended. `layers_done` is
        told on the event loop, and never after the step has ended."""
        ...

    async def copy(self, job: Callable[[], T]) -> T:
        """Run a KV copy on the transfer thread. Even when cancelled it does not return before the copy
        has ended, so whoever awaited it may free the blocks."""
        ...

    async def close(self) -> None: ...
