"""What the engine finds on the machine it runs on: devices, memory, namespaces."""

import os
from pathlib import Path

import psutil
import torch

from pdserve.contract.errors import ConfigError


def find_device(wanted: str) -> torch.device:
    """The device for `wanted` (auto, cpu, cuda). Raises ConfigError when there is no GPU to be had."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ConfigError(
            "device is set to cuda but torch finds no GPU: set device to auto or cpu, or check the driver "
            "and CUDA_VISIBLE_DEVICES",
            param="device",
        )
    return (
        torch.device("cuda", torch.cuda.current_device())
        if has_gpu and wanted != "cpu"
        else torch.device("cpu")
    )


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken on `device`, the container's limit included."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _cgroup_available_bytes())


def host_id() -> str:
    """Equal in two processes iff /proc/<pid> of the one is the same process seen from the other: same
    boot, same pid and mount namespaces. Empty where /proc does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "/".join((boot, os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/mnt")))
    except OSError:
        return ""


def _cgroup_available_bytes() -> int:
    limits = [
        _headroom(Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
        _headroom(
            Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
            Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        ),
    ]
    return min(limits)


def _headroom(limit: Path, usage: Path) -> int:
    """Bytes left below a cgroup limit; 2**62 where there is none ("max", or no such file)."""
    try:
        return max(0, int(limit.read_text()) - int(usage.read_text()))
    except (OSError, ValueError):
        return 2**62
