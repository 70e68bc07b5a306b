"""What the engine finds on the machine it runs on: devices, memory, namespaces."""

import os
from pathlib import Path

import torch

from pdserve.contract.errors import ConfigError
from pdserve.memory import available_main_memory


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
    return available_main_memory()


def host_id() -> str:
    """Equal in two processes iff /proc/<pid> of the one is the same process seen from the other: same
    boot, same pid and mount namespaces. Empty where /proc does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return "/".join((boot, os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/mnt")))
    except OSError:
        return ""
