"""What the transport `cuda_ipc` needs of CUDA, as an interface of six functions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class IpcError(Exception):
    """CUDA cannot do what was asked; the message says what, and what to do about it."""


class ExportedPool(NamedTuple):
    """How another process on this host opens a pool in a GPU's memory."""

    device: str
    """The GPU's UUID."""
    handle: bytes
    """Of the allocation in which the pool lies."""
    offset: int
    """Of the pool in that allocation, in bytes."""
    num_bytes: int


@dataclass(eq=False)
class OpenPool:
    """A pool of another process, mapped here."""

    base: int
    """Where the allocation is mapped."""
    exported: ExportedPool

    @property
    def address(self) -> int:
        return self.base + self.exported.offset


class Columns(NamedTuple):
    """Half-open range of bytes in every row of a pool; multiples of 8."""

    start: int
    stop: int


class IpcDriver(Protocol):
    """Knows the own pool, [num_blocks, block_bytes]. `open` and all below run on the transfer thread.

    Everything raises IpcError.
    """

    def devices(self) -> tuple[str, ...]:
        """UUIDs of the GPUs whose memory this process can open."""
        ...

    def export(self) -> ExportedPool: ...

    def open(self, exported: ExportedPool) -> OpenPool: ...

    def close(self, pool: OpenPool) -> None:
        """Nothing of it may be in use."""
        ...

    def digest(self, block_ids: Sequence[int], columns: Columns) -> int:
        """Of parts of the own pool, in the order of `block_ids`."""
        ...

    def copy(self, pool: OpenPool, row_ids: Sequence[int], block_ids: Sequence[int], columns: Columns) -> int:
        """Copy parts of `pool`'s rows into the own blocks; the digest of what lies there then. When it
        returns or raises, no copy is under way any more."""
        ...
