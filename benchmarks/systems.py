"""Whole systems for benchmarks: `pdserve up --config` in processes of their own, several side by side."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import yaml

READY_TIMEOUT_S = 180
_COMMAND = (sys.executable, "-m", "controller.cli")


@dataclass(frozen=True, slots=True)
class Process:
    """A router or a worker."""

    name: str
    pool: str
    pid: int
    metrics_url: str


@dataclass(frozen=True, slots=True)
class System:
    """A running system."""

    url: str
    routers: tuple[Process, ...]
    workers: tuple[Process, ...]


@contextmanager
def running(config: Mapping[str, Any]) -> Iterator[System]:
    """A system of its own, once it is ready. `config` is that of a deployment and names it."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(dict(config), file)
        file.flush()
        up = subprocess.Popen([*_COMMAND, "up", "--config", file.name], stdout=subprocess.DEVNULL)
        try:
            yield _when_ready(up, config["name"])
        finally:
            up.terminate()
            up.wait(60)


def step_seconds(client: httpx.Client, worker: Process) -> float:
    """How long all engine steps of `worker` took so far."""
    page = client.get(worker.metrics_url).text
    lines = (line for line in page.splitlines() if line.startswith("pdserve_engine_step_seconds_sum"))
    return sum(float(line.split()[-1]) for line in lines)  # by kind of step


def _when_ready(up: "subprocess.Popen[bytes]", name: str) -> System:
    """Raises SystemExit when the system ends, or is not ready in time."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and up.poll() is None:
        answer = subprocess.run(
            [*_COMMAND, "status", "--name", name, "--json"], capture_output=True, text=True
        )
        if answer.returncode == 0 and (status := json.loads(answer.stdout))["state"] == "ready":
            routers, workers = (
                tuple(_process(told) for told in status[group]) for group in ("routers", "workers")
            )
            return System(status["routers"][0]["url"], routers, workers)
        time.sleep(1)
    raise SystemExit(f"the system {name} did not become ready; run the same `pdserve up` by hand to see why")


def _process(told: Mapping[str, Any]) -> Process:
    return Process(told["id"], told["pool"], told["pid"], told["metrics_url"])
