"""pdserve as its user has it: commands in processes of their own, on a real Ray.

All commands of a test run share one runtime folder that is nobody else's, so a system that the user runs is
neither found nor disturbed.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 60.0
"""Twice what a start may take; with the end's it stays below what pytest gives a test, unless that says
otherwise."""
END_TIMEOUT_S = 40.0
STAYING = "Press Ctrl-C to end it."


class Up:
    """One `pdserve up` in the foreground, and what it has said so far."""

    def __init__(self, process: "subprocess.Popen[str]", start_timeout_s: float = START_TIMEOUT_S) -> None:
        self.process = process
        self._start_timeout_s = start_timeout_s
        self.lines: list[str] = []
        self.error_lines: list[str] = []
        self._has_ended = False
        self._said_more = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((process.stdout, self.lines), (process.stderr, self.error_lines))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def url(self) -> str:
        found = re.search(r"^pdserve serves .* at (http://\S+)$", "\n".join(self.lines), re.MULTILINE)
        assert found is not None, f"no URL in {self.lines}"
        return found[1]

    def wait_for(self, text: str, since: int = 0) -> None:
        """Until a line, the first `since` left out, contains `text`; fails when the command ends first."""
        deadline = time.monotonic() + self._start_timeout_s
        with self._said_more:
            while not any(text in line for line in self.lines[since:]):
                assert not self._has_ended, f"ended before {text!r}: {self.lines} {self.error_lines}"
                self._said_more.wait(deadline - time.monotonic())
                assert time.monotonic() < deadline, f"no {text!r} in {self.lines} {self.error_lines}"

    def family(self) -> list[psutil.Process]:
        """The launcher, Ray and all actors."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C at the terminal: the whole foreground group gets the signal. The exit code."""
        os.killpg(self.process.pid, number)
        return self.join()

    def join(self) -> int:
        code = self.process.wait(END_TIMEOUT_S)
        for reader in self._readers:
            reader.join(END_TIMEOUT_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        return code

    def _read(self, stream: Any, lines: list[str]) -> None:
        for line in stream:
            with self._said_more:
                lines.append(line.rstrip("\n"))
                self._said_more.notify_all()
        with self._said_more:
            self._has_ended |= lines is self.lines
            self._said_more.notify_all()


@dataclass
class Pdserve:
    """Runs commands with a runtime folder of their own."""

    runtime: Path
    env: dict[str, str] = field(default_factory=dict)
    start_timeout_s: float = START_TIMEOUT_S
    """How long `up` may take for what is waited for."""

    def run(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self._command(arguments),
            capture_output=True,
            text=True,
            env=self._env(),
            cwd=ROOT,
            timeout=START_TIMEOUT_S,
            check=False,
        )

    def begin(self, *arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        """A command that goes on."""
        return subprocess.Popen(self._command(arguments), stdout=stdout, text=True, env=self._env(), cwd=ROOT)

    def refusal(self, *arguments: str) -> str:
        """The one line on stderr with which a command fails."""
        done = self.run(*arguments)
        assert done.returncode not in (0, None), done.stdout
        lines = done.stderr.splitlines()
        assert len(lines) == 1, done.stderr
        assert lines[0].startswith("pdserve: ")
        return lines[0]

    def status(self, *arguments: str) -> dict[str, Any]:
        done = self.run("status", "--json", *arguments)
        assert done.stdout, done.stderr
        content: dict[str, Any] = json.loads(done.stdout)
        return content

    def record(self, name: str = "default") -> dict[str, Any]:
        """What the launcher has written down about a running system."""
        content: dict[str, Any] = json.loads((self.runtime / "pdserve" / f"{name}.json").read_text())
        return content

    @property
    def has_started_ray(self) -> bool:
        """Whether a local Ray has ever run for this runtime folder."""
        return (self.runtime / "ray").exists()

    def records(self) -> list[str]:
        return sorted(path.name for path in (self.runtime / "pdserve").glob("*.json"))

    def processes(self) -> list[psutil.Process]:
        """Everything that runs with this runtime folder: launchers, Ray, actors, whoever their parent is."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def start(self, *arguments: str) -> Up:
        """`pdserve up`, at once, in a process group of its own as a terminal would give it."""
        process = subprocess.Popen(
            self._command(("up", *arguments)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._env(),
            cwd=ROOT,
            process_group=0,
        )
        return Up(process, self.start_timeout_s)

    @contextlib.contextmanager
    def up(self, *arguments: str) -> Iterator[Up]:
        """A ready system, ended with Ctrl-C; nothing of it is left."""
        system = self.start(*arguments)
        try:
            system.wait_for(STAYING)
            yield system
            assert system.interrupt() == 0, system.error_lines
            assert_gone(self.processes())
        finally:
            end(system)

    def _owns(self, process: psutil.Process) -> bool:
        """By its environment, or where it has renamed itself, which destroys that, by its log files."""
        try:
            if process.environ().get("XDG_RUNTIME_DIR") == str(self.runtime):
                return True
            return any(Path(file.path).is_relative_to(self.runtime) for file in process.open_files())
        except psutil.Error:  # it has ended, or is not ours to look at
            return False

    def _command(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "controller.cli", *arguments]

    def _env(self) -> dict[str, str]:
        folders = {"XDG_RUNTIME_DIR": str(self.runtime), "RAY_TMPDIR": str(self.runtime)}
        return {**os.environ, **folders, **self.env}


@contextlib.contextmanager
def private_pdserve() -> Iterator[Pdserve]:
    """With a runtime folder of its own; at the end nothing runs with it."""
    # Ray's sockets lie in it, whose paths may have 107 characters; pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="pdserve-", ignore_cleanup_errors=True) as folder:
        pdserve = Pdserve(Path(folder))
        yield pdserve
        assert_gone(pdserve.processes())


def end(system: Up) -> None:
    """Make sure that nothing of a failed test stays behind."""
    if system.process.poll() is None:
        family = system.family()
        system.process.terminate()
        _, alive = psutil.wait_procs(family, END_TIMEOUT_S)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    system.join()


def assert_gone(processes: list[psutil.Process]) -> None:
    """All of them end, without having to be killed."""
    _, alive = psutil.wait_procs(processes, END_TIMEOUT_S)
    names = [f"{process.pid} {process.name()}" for process in alive]
    for process in alive:
        process.kill()
    assert names == [], f"left running: {names}"


def actors(system: Up) -> list[psutil.Process]:
    """Controllers, routers and workers on the Ray of `system`."""
    return [process for process in system.family() if "Actor" in title(process).partition(".")[0]]


def title(process: psutil.Process) -> str:
    """Its command line, or what Ray has put in its place; empty when the process is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that are free, below those that the system gives to anybody."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for port in range(first, first + count):
                taken.enter_context(socket.create_server(("", port)))
            return first
    raise AssertionError("no ports are free")


def complete(url: str, prompt: list[int], max_tokens: int = 8, **fields: object) -> list[int]:
    """Output token ids of one greedy completion."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/completions", json={**body, **fields}, timeout=30.0)
    assert answer.status_code == 200, answer.text
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids
