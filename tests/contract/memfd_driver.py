"""An `IpcDriver` whose GPU memory is a memory file: everything about `cuda_ipc` but CUDA itself."""

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from pdserve.contract.work import DeviceMemory
from pdserve.handoff.digest import digest
from pdserve.handoff.transports import negotiation
from pdserve.handoff.transports.base import LocalSide
from pdserve.handoff.transports.cuda_ipc import CudaIpcTransport
from pdserve.handoff.transports.ipc_driver import Columns, ExportedPool, IpcError, OpenPool

DEVICE = "GPU-in-a-file"


class MemfdDriver:
    """Finds the file that is mapped where the own pool lies. A handle names the process and that file."""

    def __init__(self, own: DeviceMemory, block_bytes: int) -> None:
        self._own = own
        self._block_bytes = block_bytes
        self._mapped: dict[int, mmap.mmap] = {}

    @classmethod
    @contextlib.contextmanager
    def in_place_of_cuda(cls) -> Iterator[None]:
        class Transport(CudaIpcTransport):
            def __init__(self, side: LocalSide) -> None:
                super().__init__(side, cls)

        with mock.patch.object(negotiation, "CudaIpcTransport", Transport):
            yield

    def devices(self) -> tuple[str, ...]:
        return (DEVICE,)

    def export(self) -> ExportedPool:
        handle = struct.pack("qq", os.getpid(), _descriptor_of(self._own.address))
        return ExportedPool(DEVICE, handle, 0, self._own.num_bytes)

    def open(self, exported: ExportedPool) -> OpenPool:
        pid, fd = struct.unpack("qq", exported.handle)
        try:
            with open(f"/proc/{pid}/fd/{fd}", "rb") as file:
                mapped = mmap.mmap(file.fileno(), exported.num_bytes, prot=mmap.PROT_READ)
        except OSError as error:
            raise IpcError(f"the handle is of no memory ({error.strerror})") from error
        base = int(np.frombuffer(mapped, np.uint8).ctypes.data)
        self._mapped[base] = mapped
        return OpenPool(base, exported)

    def close(self, pool: OpenPool) -> None:
        self._mapped.pop(pool.base).close()

    def digest(self, block_ids: Sequence[int], columns: Columns) -> int:
        return digest(self._own_rows()[list(block_ids), slice(*columns)].tobytes())

    def copy(self, pool: OpenPool, row_ids: Sequence[int], block_ids: Sequence[int], columns: Columns) -> int:
        theirs = np.frombuffer(self._mapped[pool.base], np.uint8).reshape(-1, self._block_bytes)
        self._own_rows()[list(block_ids), slice(*columns)] = theirs[list(row_ids), slice(*columns)]
        return self.digest(block_ids, columns)

    def _own_rows(self) -> NDArray[np.uint8]:
        memory = (ctypes.c_ubyte * self._own.num_bytes).from_address(self._own.address)
        return np.frombuffer(memory, np.uint8).reshape(-1, self._block_bytes)


def _descriptor_of(address: int) -> int:
    """Of the file that is mapped at `address` in this process."""
    inode = _inode_at(address)
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if link.stat().st_ino == inode:
                return int(link.name)
    raise IpcError(f"the file mapped at {address:#x} is not open")


def _inode_at(address: int) -> int:
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, _, _, inode, *_ = line.split()
        start, end = (int(bound, 16) for bound in bounds.split("-"))
        if start <= address < end:
            return int(inode)
    raise IpcError(f"nothing is mapped at {address:#x}")
