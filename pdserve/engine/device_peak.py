"""The most that a device gives: told by the configuration, known by its name, or measured at load."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pdserve.contract.model_work import DevicePeak

_MATRIX_ROWS = {"cpu": 512, "cuda": 8192}
_VECTOR_PRODUCT_BYTES = {"cpu": 64 * 2**20, "cuda": 2**30}
_REPEATS = 10


@dataclass(frozen=True, slots=True)
class _KnownGpu:
    """From NVIDIA's data sheets, without sparsity."""

    name: str
    """What torch's name of the device begins with, as whole words; longer names stand first."""
    half_flops_per_s: float
    float32_flops_per_s: float
    bytes_per_s: float


_KNOWN_GPUS = (
    _KnownGpu("NVIDIA H200", 989e12, 67e12, 4.8e12),
    _KnownGpu("NVIDIA H100 80GB HBM3", 989e12, 67e12, 3.35e12),
    _KnownGpu("NVIDIA H100 PCIe", 756e12, 51e12, 2.0e12),
    _KnownGpu("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 2.039e12),
    _KnownGpu("NVIDIA A100 80GB PCIe", 312e12, 19.5e12, 1.935e12),
    _KnownGpu("NVIDIA A100", 312e12, 19.5e12, 1.555e12),
    _KnownGpu("NVIDIA L40", 181e12, 90.5e12, 0.864e12),
    _KnownGpu("NVIDIA L40S", 362e12, 91.6e12, 0.864e12),
    _KnownGpu("NVIDIA L4", 121e12, 30.3e12, 0.3e12),
    _KnownGpu("Tesla T4", 65e12, 8.1e12, 0.32e12),
)


def find_peak(
    device: torch.device, dtype: torch.dtype, tflops: float | None = None, gb_per_s: float | None = None
) -> DevicePeak:
    """`tflops` and `gb_per_s` are what the configuration tells, 10**12 and 10**9 a second. What it does not
    tell is looked up or measured, with the threads that torch has now."""
    known = known_peak(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    return DevicePeak(
        flops_per_s=tflops * 1e12 if tflops else known.flops_per_s if known else _flops_per_s(device, dtype),
        bytes_per_s=gb_per_s * 1e9 if gb_per_s else known.bytes_per_s if known else _bytes_per_s(device),
    )


def known_peak(name: str, dtype: torch.dtype) -> DevicePeak | None:
    """None also for a part of a GPU (MIG), whose name is that of the whole with its share behind it."""
    if " MIG " in name:
        return None
    for gpu in _KNOWN_GPUS:
        if name.startswith(gpu.name) and name[len(gpu.name) :][:1] in ("", " ", "-"):
            flops_per_s = gpu.float32_flops_per_s if dtype is torch.float32 else gpu.half_flops_per_s
            return DevicePeak(flops_per_s, gpu.bytes_per_s)
    return None


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of two square matrices."""
    rows = _MATRIX_ROWS[device.type]
    matrix = torch.ones(rows, rows, dtype=dtype, device=device)
    return 2 * rows**3 / _shortest_s(lambda: torch.mm(matrix, matrix), device)


def _bytes_per_s(device: torch.device) -> float:
    """Of a product with a vector, which reads every number of the matrix once, as a decode step does."""
    columns = 4096
    rows = _VECTOR_PRODUCT_BYTES[device.type] // (4 * columns)
    matrix = torch.ones(rows, columns, dtype=torch.float32, device=device)
    vector = torch.ones(columns, dtype=torch.float32, device=device)
    return matrix.nbytes / _shortest_s(lambda: torch.mv(matrix, vector), device)


@torch.inference_mode()
def _shortest_s(work: Callable[[], object], device: torch.device) -> float:
    """A peak is what is possible, so the best of several."""
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
