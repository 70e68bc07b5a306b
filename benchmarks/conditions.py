"""Under which conditions a benchmark ran; part of every result."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers


def conditions(benchmark: str, module: str = "") -> dict[str, Any]:
    """Command, commit, time, hardware, load and versions. `module` is what runs, if not the benchmark of that
    name. Of absolute paths the command has the last part: where a folder lies tells nothing elsewhere."""
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return {
        "benchmark": benchmark,
        "command": f"python -m {module or f'benchmarks.{benchmark}'} " + " ".join(words),
        "commit": _output_of("git", "rev-parse", "HEAD"),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": {"cpu": _cpu_name(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
