"""The paged KV cache: one tensor whose rows are blocks of all layers.

Block-major, so that shipping a block over all layers is one contiguous copy. On the CPU the tensor lies
in an anonymous memory file that a process on the same host can map while the owner lives and that
vanishes with its last user.
"""

import fcntl
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pdserve.contract.errors import ConfigError
from pdserve.contract.ids import BlockId
from pdserve.contract.work import EXPORT_TOKEN_BYTES, POOL_FILE_NAME, DeviceMemory, LayerRange, PoolExport
from pdserve.engine.host import available_bytes, host_id
from pdserve.engine.settings import EngineSettings

_LEAST_TOKENS = 256


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one block: [num_layers, 2, block_size, num_kv_heads, head_dim], 2 being key and value."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_layers, 2, self.block_size, self.num_kv_heads, self.head_dim)

    @property
    def layer_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return 2 * self.block_size * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        return self.num_layers * self.layer_bytes


class KvPool:
    """Implements `pdserve.contract.ports.BlockStore`. Threads may use it at once for disjoint blocks
    or layers."""

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self._num_blocks = num_blocks
        self._memory = _MemoryFile(num_blocks * layout.block_bytes) if device.type == "cpu" else None
        shape = (num_blocks, *layout.block_shape)
        if self._memory is None:
            self.tensor = torch.zeros(shape, dtype=layout.dtype, device=device)
        else:
            count = num_blocks * layout.block_bytes // layout.dtype.itemsize
            self.tensor = torch.frombuffer(self._memory.map, dtype=layout.dtype, count=count).view(shape)
        # Copies go beside the kernels of a step, not behind them. No order between the two is needed: what is
        # copied out is final before anybody asks for it, and `write` returns when its bytes are in place.
        self._copies = _new_stream(device) if device.type == "cuda" else None
        # [num_blocks, num_layers, bytes of a layer]
        self._bytes = self.tensor.view(num_blocks, layout.num_layers, -1).view(torch.uint8)

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def block_bytes(self) -> int:
        return self.layout.block_bytes

    def read(self, block_ids: Sequence[BlockId], layers: LayerRange) -> bytearray:
        """The blocks' bytes, layers inside blocks, as a copy."""
        payload = bytearray(len(block_ids) * len(layers) * self.layout.layer_bytes)
        target = self._segment(payload, len(block_ids), layers)
        if self._memory is not None:
            rows = self._bytes.numpy()
            for row, block_id in enumerate(block_ids):
                np.copyto(target[row], rows[block_id, layers.start : layers.stop])
        elif payload:
            with torch.cuda.stream(self._copies):
                index = self._index(block_ids)
                picked = self._bytes[:, layers.start : layers.stop].index_select(0, index)
                torch.from_numpy(target).copy_(picked)
        return payload

    def write(self, block_ids: Sequence[BlockId], layers: LayerRange, payload: memoryview) -> None:
        """Copy `payload`, as `read` would return it, into the blocks. Raises ValueError for a wrong size."""
        expected = len(block_ids) * len(layers) * self.layout.layer_bytes
        if payload.nbytes != expected:
            raise ValueError(
                f"{len(block_ids)} blocks of {len(layers)} layers are {expected} bytes, not {payload.nbytes}"
            )
        source = self._segment(payload, len(block_ids), layers)
        if self._memory is not None:
            rows = self._bytes.numpy()
            for row, block_id in enumerate(block_ids):
                np.copyto(rows[block_id, layers.start : layers.stop], source[row])
        elif self._copies is not None and expected:
            with torch.cuda.stream(self._copies):
                on_device = torch.from_numpy(source.copy()).to(self._bytes.device)
                self._bytes[:, layers.start : layers.stop].index_copy_(0, self._index(block_ids), on_device)
            self._copies.synchronize()

    def clear(self, block_ids: Sequence[int]) -> None:
        """Zero whole blocks, so that positions not yet written hold finite values."""
        self._bytes.index_fill_(0, self._index(block_ids), 0)

    def rows(self) -> memoryview | None:
        """The pool's own bytes, writable, [num_blocks, block_bytes]; None on a GPU."""
        return None if self._memory is None else self._bytes.numpy().reshape(self._num_blocks, -1).data

    def export(self) -> PoolExport | None:
        """How a process on this host maps the pool; None on a GPU."""
        host = host_id()
        if self._memory is None or not host:
            return None
        return PoolExport(
            host_id=host,
            pid=os.getpid(),
            fd=self._memory.fd,
            num_bytes=self._num_blocks * self.block_bytes,
            token=self._memory.token.hex(),
        )

    def device_memory(self) -> DeviceMemory | None:
        """Where the pool lies in a GPU's memory; None on a CPU."""
        if self._memory is not None:
            return None
        num_bytes = self._num_blocks * self.block_bytes
        return DeviceMemory(self.tensor.data_ptr(), num_bytes, self.tensor.get_device(), host_id())

    def _segment(
        self, payload: bytearray | memoryview, num_blocks: int, layers: LayerRange
    ) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
        """`payload` as [num_blocks, layers, bytes of a layer]. Copies between such arrays release the GIL."""
        flat = np.frombuffer(payload, dtype=np.uint8)
        return flat.reshape(num_blocks, len(layers), self.layout.layer_bytes)

    def _index(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64, device=self._bytes.device)


def _new_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class _MemoryFile:
    """An anonymous memory file, mapped, with random bytes after the content."""

    def __init__(self, num_bytes: int) -> None:
        self.token = secrets.token_bytes(EXPORT_TOKEN_BYTES)
        self.fd = os.memfd_create(POOL_FILE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        weakref.finalize(self, os.close, self.fd)
        os.ftruncate(self.fd, num_bytes + EXPORT_TOKEN_BYTES)
        # A file that cannot shrink cannot make a reader of its mapping fault.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.map = mmap.mmap(self.fd, num_bytes + EXPORT_TOKEN_BYTES)
        self.map[num_bytes:] = self.token


def require_room(weight_bytes: int, settings: EngineSettings, device: torch.device) -> None:
    """Raises ConfigError when the weights alone, of `weight_bytes` once loaded, do not fit in what is
    free."""
    available = available_bytes(device)
    if weight_bytes > available:
        raise ConfigError(
            f"model {settings.model!r} does not fit: its weights take {_gib(weight_bytes)}, free are "
            f"{_gib(available)}: choose a smaller model or model.dtype, or free memory",
            param="model.path",
        )


def plan_num_blocks(layout: KvLayout, settings: EngineSettings, device: torch.device) -> int:
    """How many blocks the pool gets. Raises ConfigError with the numbers when there are too few."""
    available = available_bytes(device)
    budget = settings.kv_memory_bytes or int(available * settings.kv_memory_fraction)
    if budget > available:
        raise ConfigError(
            f"the KV pool of {_gib(budget)} does not fit in the {_gib(available)} that are free after "
            "loading the model: lower engine.kv_memory, or free memory",
            param="engine.kv_memory",
        )
    num_blocks = budget // layout.block_bytes
    if num_blocks * layout.block_size < _LEAST_TOKENS:
        needed = -(-_LEAST_TOKENS // layout.block_size) * layout.block_bytes
        raise ConfigError(
            f"the KV pool of {_gib(budget)} holds {num_blocks * layout.block_size} tokens, the least is "
            f"{_LEAST_TOKENS} ({_gib(needed)}): raise engine.kv_memory, or free memory "
            f"({_gib(available)} free)",
            param="engine.kv_memory",
        )
    return int(num_blocks)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
