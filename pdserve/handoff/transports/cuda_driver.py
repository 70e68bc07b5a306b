"""`IpcDriver` for real: CUDA's driver interface for handles and copies, torch for the digest.

The driver library's name and functions are the same in all versions of CUDA, and it is there wherever a GPU
can be used. All calls use the device's primary context, which is also torch's.
"""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence

import torch

from pdserve.contract.work import DeviceMemory
from pdserve.handoff.digest import LANE_BYTES
from pdserve.handoff.transports.device_digest import digest_tensor
from pdserve.handoff.transports.ipc_driver import Columns, ExportedPool, IpcError, OpenPool

_LAZY_ENABLE_PEER_ACCESS = 1
_INVALID_VALUE, _NOT_SUPPORTED = 1, 801

_Pointer = ctypes.c_uint64


class _Handle(ctypes.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class CudaDriver:
    """Implements `IpcDriver` for a pool in the memory of one GPU."""

    def __init__(self, own: DeviceMemory, block_bytes: int) -> None:
        """Raises IpcError where there is no CUDA."""
        self._own = own
        self._block_bytes = block_bytes
        self._cuda = _load_library()
        self._context = self._retain_context()
        self._device = torch.device("cuda", own.device)
        self._rows = _as_rows(own, block_bytes, self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def devices(self) -> tuple[str, ...]:
        own = self._own.device
        return tuple(
            _uuid(device)
            for device in range(torch.cuda.device_count())
            if device == own or torch.cuda.can_device_access_peer(own, device)
        )

    def export(self) -> ExportedPool:
        base, size, handle = _Pointer(), ctypes.c_size_t(), _Handle()
        address = _Pointer(self._own.address)
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        status = self._try("cuIpcGetMemHandle", ctypes.byref(handle), address)
        if status in (_INVALID_VALUE, _NOT_SUPPORTED):
            raise IpcError(
                "the pool's memory cannot be exported: torch has it from expandable segments; set "
                "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False"
            )
        self._require("cuIpcGetMemHandle", status)
        offset = self._own.address - base.value
        return ExportedPool(_uuid(self._own.device), bytes(handle.reserved), offset, self._own.num_bytes)

    def open(self, exported: ExportedPool) -> OpenPool:
        if len(exported.handle) != ctypes.sizeof(_Handle):
            raise IpcError(f"a handle of CUDA has {ctypes.sizeof(_Handle)} bytes")
        base, handle = _Pointer(), _Handle.from_buffer_copy(exported.handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, _LAZY_ENABLE_PEER_ACCESS)
        return OpenPool(base.value, exported)

    def close(self, pool: OpenPool) -> None:
        self._call("cuIpcCloseMemHandle", _Pointer(pool.base))

    def digest(self, block_ids: Sequence[int], columns: Columns) -> int:
        with self._side_stream():
            return self._digest(block_ids, columns)

    def copy(self, pool: OpenPool, row_ids: Sequence[int], block_ids: Sequence[int], columns: Columns) -> int:
        with self._side_stream():
            for row_id, block_id in zip(row_ids, block_ids, strict=True):
                self._call(
                    "cuMemcpyDtoDAsync_v2",
                    _Pointer(self._own.address + block_id * self._block_bytes + columns.start),
                    _Pointer(pool.address + row_id * self._block_bytes + columns.start),
                    ctypes.c_size_t(columns.stop - columns.start),
                    ctypes.c_void_p(self._stream.cuda_stream),
                )
            return self._digest(block_ids, columns)

    @contextlib.contextmanager
    def _side_stream(self) -> Iterator[None]:
        """What is done inside goes beside the kernels of a step, and has ended after the block.

        It needs no order with them: what is read is final before anybody asks for it, and what is written
        is in no step."""
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def _digest(self, block_ids: Sequence[int], columns: Columns) -> int:
        index = torch.tensor(block_ids, dtype=torch.int64, device=self._device)
        lanes = self._rows[:, columns.start // LANE_BYTES : columns.stop // LANE_BYTES]
        return digest_tensor(lanes.index_select(0, index).reshape(-1))

    def _retain_context(self) -> ctypes.c_void_p:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._require("cuInit", self._cuda.cuInit(0))
        self._require("cuDeviceGet", self._cuda.cuDeviceGet(ctypes.byref(device), self._own.device))
        retained = self._cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self._require("cuDevicePrimaryCtxRetain", retained)
        return context

    def _call(self, name: str, *arguments: object) -> None:
        self._require(name, self._try(name, *arguments))

    def _try(self, name: str, *arguments: object) -> int:
        """The status of a call, in the device's context whatever the thread."""
        self._require("cuCtxSetCurrent", self._cuda.cuCtxSetCurrent(self._context))
        return int(getattr(self._cuda, name)(*arguments))

    def _require(self, name: str, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(status, ctypes.byref(text))
            raise IpcError(f"{name} failed with {(text.value or b'?').decode()} ({status})")


class _Interface:
    """Memory as torch takes it without a copy."""

    def __init__(self, memory: DeviceMemory, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "<i8",
            "data": (memory.address, False),
            "version": 3,
        }


def _as_rows(own: DeviceMemory, block_bytes: int, device: torch.device) -> torch.Tensor:
    """The own pool as int64, [num_blocks, lanes of a block]."""
    shape = (own.num_bytes // block_bytes, block_bytes // LANE_BYTES)
    return torch.as_tensor(_Interface(own, shape), device=device)


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _load_library() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise IpcError(f"CUDA's driver is not there ({error})") from error
