"""How workers share the memory of their machine.

A worker alone sees what is free while its neighbours are still loading, and a KV pool takes its memory only
when it is used. So nobody goes by what is free without counting the others.
"""

from pathlib import Path
from typing import Literal

from pdserve.config import DeployConfig
from pdserve.contract.errors import ConfigError

MAX_AUTO_KV_BYTES = 4 << 30
"""On a CPU: more is seldom of use, and the machine is shared."""
AUTO_KV_FRACTION = 0.5
AUTO_KV_FRACTION_GPU = 0.85
"""A GPU has little else to do."""

_NVIDIA = Path("/dev/nvidiactl")  # there where a driver is, found without torch


def may_use_gpu(device: str) -> bool:
    """Whether workers with that `model.device` might keep the model somewhere else than in main memory."""
    return device == "cuda" or (device == "auto" and _NVIDIA.exists())


def kv_memory(
    wanted: Literal["auto"] | int | float, is_gpu: bool, share: float, free_bytes: int
) -> tuple[int | None, float]:
    """The size of a worker's KV pool: bytes, or None and the fraction of what is free after loading.

    `wanted` is engine.kv_memory, `share` this worker's of the machine or the GPU, `free_bytes` what will be
    free after loading.
    """
    if isinstance(wanted, int):
        return wanted, AUTO_KV_FRACTION
    if isinstance(wanted, float):
        return None, wanted * share
    fraction = (AUTO_KV_FRACTION_GPU if is_gpu else AUTO_KV_FRACTION) * share
    is_plenty = not is_gpu and free_bytes * fraction > MAX_AUTO_KV_BYTES
    return (MAX_AUTO_KV_BYTES if is_plenty else None), fraction


def require_room_for_all(config: DeployConfig, model: str, weight_bytes: int, available_bytes: int) -> None:
    """Asked by the launcher of a local system, before anything is started. `weight_bytes` are those of one
    worker. Raises ConfigError with the numbers when the weights of all
    workers and the KV pools whose size is configured are more than is free."""
    num_workers = config.pools.prefill.replicas + config.pools.decode.replicas
    wanted = config.engine.kv_memory
    pool_bytes = wanted if isinstance(wanted, int) else 0
    if num_workers * weight_bytes > available_bytes:
        raise ConfigError(
            f"model {model!r} does not fit: the weights of {_of_each(num_workers, weight_bytes)}, free are "
            f"{_gib(available_bytes)}: choose a smaller model or a smaller model.dtype, start fewer workers, "
            "or free memory",
            param="model.path",
        )
    if num_workers * (weight_bytes + pool_bytes) > available_bytes:
        raise ConfigError(
            f"the KV pools do not fit: those of {_of_each(num_workers, pool_bytes)}, free beside the weights "
            f"are {_gib(available_bytes - num_workers * weight_bytes)}: lower engine.kv_memory, start fewer "
            "workers, or free memory",
            param="engine.kv_memory",
        )


def _of_each(num_workers: int, num_bytes: int) -> str:
    if num_workers == 1:
        return f"one worker take {_gib(num_bytes)}"
    return f"{num_workers} workers take {_gib(num_bytes)} each"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
