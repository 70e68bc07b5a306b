"""`pdserve up --detach` on this machine: the same launcher, in the background."""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from controller.launch import STAYING
from controller.terminal import complain_as_told, say, say_piece
from pdserve.config import runtime_folder

_LOOK_S = 0.1
"""How often the launcher's output is read: it is a file, because it outlives this command, and files do not
say that they have grown."""


def start_detached(name: str, arguments: Sequence[str]) -> int:
    """Run the launcher with `arguments`, which lack --detach, in a session of its own. Pass on what it says
    until the system is ready; returns the launcher's exit code if it ends before that."""
    log, errors = runtime_folder() / f"{name}.log", runtime_folder() / f"{name}.errors"
    with log.open("w", encoding="utf-8") as output, errors.open("w", encoding="utf-8") as error_output:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "controller.cli", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=error_output,
            start_new_session=True,
        )
    try:
        with log.open(encoding="utf-8") as said:
            exit_code = _pass_on(said, launcher)
    except KeyboardInterrupt:
        launcher.terminate()
        launcher.wait()
        raise
    complain_as_told(errors.read_text(encoding="utf-8"))
    if exit_code == 0:
        say(f"It runs in the background and writes to {log}.\nEnd it with: pdserve down --name {name}")
    return exit_code


def _pass_on(said: TextIO, launcher: "subprocess.Popen[bytes]") -> int:
    for piece in _follow(said, launcher):
        if STAYING in piece:
            return 0
        say_piece(piece)
    return launcher.returncode


def _follow(said: TextIO, launcher: "subprocess.Popen[bytes]") -> Iterator[str]:
    """What is written to the file, as it comes, until the launcher has ended."""
    while True:
        has_ended = launcher.poll() is not None
        if piece := said.readline():
            yield piece
        elif has_ended:
            return
        else:
            time.sleep(_LOOK_S)
