"""KV bytes straight out of the source's pool: same host, CPU pools. One copy, no bytes on the event loop.

The source's pool is a memory file. The decode worker maps it read-only through /proc/<pid>/fd/<fd> and
copies rows into its own pool, so nobody but the owner ever writes a pool, and the file vanishes with its
last user. What could go wrong with memory of another process:

- The source dies: the mapping stays valid until it is dropped, which happens as soon as the process is
  seen to have ended (a pidfd) and no call uses it, so a dead worker's pool does not linger.
- The file is cut short, which would end the reader with SIGBUS: only files sealed against shrinking
  (F_SEAL_SHRINK, which cannot be taken back) are offered and mapped.
- The pid or the descriptor means another file by now, or never meant a pool: only a memory file of a pool's
  name and size is mapped, and random bytes at its end, which only its owner knows, tell that it is this one.
- The source writes while it is read: the digest of the own copy tells.
"""

import asyncio
import contextlib
import fcntl
import functools
import mmap
import os
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockId
from pdserve.contract.messages import Segment, TransportChoice, TransportOffer
from pdserve.contract.work import EXPORT_TOKEN_BYTES, POOL_FILE_NAME, PoolExport
from pdserve.handoff.transports.announcing import AnnouncingSender, check_source_blocks
from pdserve.handoff.transports.base import Accepted, Declined, LocalSide, SegmentReceiver, TransferStats
from pdserve.handoff.transports.pool_bytes import PoolBytes, Rows

_NUMBERS = 2**31
"""Process ids and descriptors are below it."""

MAX_IDLE_MAPPINGS = 8
"""How many pools stay mapped while no call uses them. A mapping costs two descriptors, and the first use
of each of its pages a page fault."""

MAX_SEGMENT_BYTES = 32 << 20
"""No bytes wait in messages or buffers here, and copies are quick, so what a segment costs by itself counts
for more than elsewhere."""


class SharedMemoryTransport:
    """Implements `Transport`."""

    name = "shared_memory"

    def __init__(self, side: LocalSide) -> None:
        self._side = side
        self._pool = PoolBytes(side)
        self._mappings = _Mappings(side.blocks.block_bytes)
        self._refused = False  # this process may not look into its neighbours' descriptors

    def offer(self) -> TransportOffer | None:
        export = self._side.blocks.export()
        if export is None or self._refused:
            return None
        return TransportOffer(self.name, export.host_id)

    def accept(self, offer: TransportOffer) -> Accepted | Declined:
        export = self._side.blocks.export()
        if export is None:
            return Declined(
                "the source's pool cannot be mapped (in GPU memory, or its rows are not in canonical order)"
            )
        if export.host_id != offer.host_id:
            return Declined("different host or container")
        if not _is_sealed(export.fd):
            return Declined("the pool's file is not sealed against shrinking")
        choice = TransportChoice(self.name, "same host", pool=export)
        return Accepted(choice, AnnouncingSender(self._side, self._pool.digest, MAX_SEGMENT_BYTES))

    async def connect(self, choice: TransportChoice, source_address: str) -> SegmentReceiver:
        if choice.pool is None:
            raise ProtocolViolation(f"{source_address} chose {self.name} and names no pool")
        try:
            mapping = self._mappings.acquire(choice.pool)
        except PermissionError as error:
            # The call fails and is placed again; from now on it is offered without this transport.
            self._refused = True
            raise StreamBroken(f"the pool of {source_address} may not be mapped ({error})") from error
        return _Receiver(self._side, self._pool, self._mappings, mapping)

    async def close(self) -> None:
        self._mappings.close()


class _Receiver:
    """The decode worker's end: copies rows of the source's pool into its own."""

    def __init__(self, side: LocalSide, pool: PoolBytes, mappings: "_Mappings", mapping: "_Mapping") -> None:
        self.stats = TransferStats()
        self._side = side
        self._pool = pool
        self._mappings = mappings
        self._mapping: _Mapping | None = mapping
        self._num_copies = 0  # under way, or waiting for the transfer thread
        self._resting = asyncio.Event()
        self._resting.set()

    async def receive(self, segment: Segment, block_ids: Sequence[BlockId]) -> bool:
        self._side.check_segment(segment, block_ids)
        started_at = self._side.clock.now()
        with self._copying():
            rows = self._rows(segment)
            job = functools.partial(self._pool.copy, rows, segment.source_blocks, block_ids, segment.layers)
            matched = await self._side.executor.copy(job) == segment.digest
        self.stats.add(segment.num_bytes, self._side.clock.now() - started_at, matched)
        return matched

    async def close(self) -> None:
        await self._resting.wait()
        mapping, self._mapping = self._mapping, None  # not before: a close that is cancelled may be repeated
        if mapping is not None:
            self._mappings.release(mapping)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Copies take their turns at the transfer thread, where the next follows without a detour."""
        self._num_copies += 1
        self._resting.clear()
        try:
            yield
        finally:
            self._num_copies -= 1
            if not self._num_copies:
                self._resting.set()

    def _rows(self, segment: Segment) -> Rows:
        if self._mapping is None:
            raise StreamBroken("this transfer has ended")
        if self._mapping.retired:
            raise StreamBroken(f"the pool of process {self._mapping.export.pid} is gone")
        check_source_blocks(segment, len(self._mapping.rows))
        return self._mapping.rows


class _Mapping:
    """One pool of another process, mapped read-only, and a descriptor that tells when that process ends.

    Raises PermissionError when this process may not look there, StreamBroken when the process is gone or
    the file is not the pool that was offered, and ProtocolViolation for what no pool can be exported as.
    """

    def __init__(self, export: PoolExport, block_bytes: int) -> None:
        self.export = export
        self.num_users = 0
        self.retired = False
        token = _token_of(export)
        with _explained(export), contextlib.ExitStack() as undo:
            self.pidfd = os.pidfd_open(export.pid)
            undo.callback(os.close, self.pidfd)
            mapped = _map_read_only(export, token)
            undo.pop_all()
        num_blocks = export.num_bytes // block_bytes
        flat = np.frombuffer(mapped, np.uint8, num_blocks * block_bytes)
        self.rows: Rows = flat.reshape(num_blocks, block_bytes)  # of the source

    def close(self) -> None:
        """Unmap, as soon as the last view of `rows` is gone."""
        del self.rows
        os.close(self.pidfd)


class _Mappings:
    """The pools that are mapped here, by (pid, fd), least recently acquired first."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._mappings: dict[tuple[int, int], _Mapping] = {}

    def acquire(self, export: PoolExport) -> _Mapping:
        """The mapping of `export` for one more user. Raises what `_Mapping` raises."""
        key = (export.pid, export.fd)
        known = self._mappings.pop(key, None)
        if known is not None and known.export != export:
            self._retire(known)
            known = None
        mapping = self._mappings[key] = known or self._watched(_Mapping(export, self._block_bytes))
        mapping.num_users += 1
        return mapping

    def release(self, mapping: _Mapping) -> None:
        mapping.num_users -= 1
        if mapping.retired and not mapping.num_users:
            mapping.close()
        idle = [mapping for mapping in self._mappings.values() if not mapping.num_users]
        for mapping in idle[: max(0, len(idle) - MAX_IDLE_MAPPINGS)]:
            self._retire(mapping)

    def close(self) -> None:
        for mapping in list(self._mappings.values()):
            self._retire(mapping)

    def _watched(self, mapping: _Mapping) -> _Mapping:
        asyncio.get_running_loop().add_reader(mapping.pidfd, self._retire, mapping)
        return mapping

    def _retire(self, mapping: _Mapping) -> None:
        """Its owner has ended or it is not needed: unmap it now, or when its last user releases it."""
        asyncio.get_running_loop().remove_reader(mapping.pidfd)
        key = (mapping.export.pid, mapping.export.fd)
        if self._mappings.get(key) is mapping:
            del self._mappings[key]
        mapping.retired = True
        if not mapping.num_users:
            mapping.close()


@contextlib.contextmanager
def _explained(export: PoolExport) -> Iterator[None]:
    """OSErrors as StreamBroken, but for PermissionError."""
    try:
        yield
    except PermissionError:
        raise
    except OSError as error:
        raise StreamBroken(f"the pool of process {export.pid} is gone ({error.strerror})") from error


def _map_read_only(export: PoolExport, token: bytes) -> mmap.mmap:
    num_bytes = export.num_bytes + len(token)
    # O_NONBLOCK: were the descriptor a pipe by now, open would wait for a writer.
    fd = os.open(f"/proc/{export.pid}/fd/{export.fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not _is_pool(fd) or os.fstat(fd).st_size != num_bytes:
            raise StreamBroken(f"descriptor {export.fd} of process {export.pid} is not the offered pool")
        mapped = mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
    if mapped[export.num_bytes :] != token:
        mapped.close()
        raise StreamBroken(f"descriptor {export.fd} of process {export.pid} is another pool by now")
    return mapped


def _token_of(export: PoolExport) -> bytes:
    """Raises ProtocolViolation for an export that no pool has."""
    try:
        token = bytes.fromhex(export.token)
    except ValueError:
        token = b""
    if len(token) != EXPORT_TOKEN_BYTES or not (0 < export.pid < _NUMBERS and 0 <= export.fd < _NUMBERS):
        raise ProtocolViolation("the source exports its pool with numbers or a token that no pool has")
    if not 0 < export.num_bytes < sys.maxsize - EXPORT_TOKEN_BYTES:
        raise ProtocolViolation(f"the source says that its pool has {export.num_bytes} bytes")
    return token


def _is_pool(fd: int) -> bool:
    """A memory file of a pool, that can never become shorter."""
    name = os.readlink(f"/proc/self/fd/{fd}")
    return name.startswith(f"/memfd:{POOL_FILE_NAME}") and _is_sealed(fd)


def _is_sealed(fd: int) -> bool:
    """The file can never become shorter."""
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # not a memory file
        return False
