"""How much main memory can still be taken. Never imports torch."""

from pathlib import Path

import psutil

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_UNLIMITED = 2**62


def available_main_memory() -> int:
    """Bytes, the container's limit included."""
    return min(int(psutil.virtual_memory().available), *(_headroom(*files) for files in _CGROUPS))


def _headroom(limit: Path, usage: Path) -> int:
    """Bytes left below a cgroup's limit; `_UNLIMITED` where there is none ("max", or no such file)."""
    try:
        return max(0, int(limit.read_text()) - int(usage.read_text()))
    except (OSError, ValueError):
        return _UNLIMITED
