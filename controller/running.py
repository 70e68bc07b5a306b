"""The systems that run for this user on this machine: one small file each, written by the launcher."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pdserve.config import runtime_folder
from pdserve.contract.errors import ConfigError, NotFound

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class RunningSystem:
    """Where a system is, for commands in other terminals."""

    name: str
    launcher_pid: int
    launcher_started_at: float
    """Tells a living launcher from another process that got its number."""
    is_local: bool
    """The launcher owns the Ray cluster, and ends with it."""
    ray_address: str = ""
    """Empty while Ray starts."""
    ray_auth_mode: str = ""
    """Of a local Ray; empty where the user's own settings apply."""
    url: str = ""
    """Empty before the system is ready."""

    @property
    def launcher(self) -> psutil.Process | None:
        """None when it is gone."""
        try:
            process = psutil.Process(self.launcher_pid)
            return process if process.create_time() == self.launcher_started_at else None
        except psutil.NoSuchProcess:
            return None


def announce(system: RunningSystem) -> None:
    """Write or update a system's file."""
    path = _path(system.name)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(asdict(system)), encoding="utf-8")
    draft.replace(path)


def withdraw(name: str) -> None:
    _path(name).unlink(missing_ok=True)


def find(name: str) -> RunningSystem | None:
    """The system of that name, unless its launcher was local and is gone."""
    try:
        system = RunningSystem(**json.loads(_path(name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # no such file, or one of another version
        return None
    if system.is_local and system.launcher is None:
        withdraw(name)
        return None
    return system


def require(name: str) -> RunningSystem:
    """As `find`. Raises NotFound with the names of what does run."""
    system = find(name)
    if system is not None:
        return system
    others = [
        other for path in sorted(runtime_folder().glob("*" + _SUFFIX)) if (other := path.stem) and find(other)
    ]
    hint = (
        f"running: {', '.join(others)}; choose one with --name" if others else "start one with `pdserve up`"
    )
    raise NotFound(f"no system named {name!r} runs here: {hint}")


def require_free(name: str) -> None:
    """Raises ConfigError when a system of that name runs already."""
    system = find(name)
    if system is not None:
        where = system.url or f"process {system.launcher_pid}"
        raise ConfigError(
            f"a system named {name!r} runs already ({where}): end it with `pdserve down --name {name}`, or "
            "choose another --name",
            param="name",
        )


def this_launcher(name: str, is_local: bool) -> RunningSystem:
    process = psutil.Process()
    return RunningSystem(name, process.pid, process.create_time(), is_local)


def _path(name: str) -> Path:
    return runtime_folder() / f"{name}{_SUFFIX}"
