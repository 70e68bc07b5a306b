"""What a person at the terminal sees: progress, the URL, a table of processes. The only file that prints."""

import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence

from controller.integrity import ProcessIntegrity
from controller.status import ProcessState, ProcessStatus, SystemStatus
from pdserve.demo import RecallPrompt, recall_prompt

_DEMO_SEED = 7
_DEMO_TOKENS = 120
_MAX_TOKENS = 48

# What terminals understand (ECMA-48 and xterm).
_OTHER_SCREEN, _OWN_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
_NO_CURSOR, _CURSOR = "\x1b[?25l", "\x1b[?25h"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_HEAD_IS_GONE = (
    "Ray's head is gone: requests are served on, but what dies is not replaced, and after a while Ray ends "
    "everything (docs/runbook.md)"
)
_HEAD_IS_BACK = "Ray's head is back"


def say(line: str = "") -> None:
    """To stdout, at once also where it is a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def say_piece(text: str) -> None:
    """Part of a line."""
    sys.stdout.write(text)
    sys.stdout.flush()


def progress_line(text: str) -> None:
    """Replace the line that is being worked on, where stderr is a terminal; nothing elsewhere."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[2K{text}")
        sys.stderr.flush()


def complain(line: str) -> None:
    """One line to stderr."""
    sys.stderr.write(f"pdserve: {' '.join(line.split())}\n")
    sys.stderr.flush()


def complain_as_told(text: str) -> None:
    """To stderr, what another pdserve has complained of."""
    sys.stderr.write(text)
    sys.stderr.flush()


class Screen:
    """A terminal that is written over again and again, and given back as it was. Where stdout is none, each
    picture follows the one before."""

    def __init__(self) -> None:
        self._is_terminal = sys.stdout.isatty()

    def __enter__(self) -> "Screen":
        if self._is_terminal:
            say_piece(_OTHER_SCREEN + _NO_CURSOR)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._is_terminal:
            say_piece(_CURSOR + _OWN_SCREEN)

    def show(self, lines: Sequence[str]) -> None:
        """As many of the lines, and as much of each, as there is room for."""
        if not self._is_terminal:
            say("\n".join([*lines, ""]))
            return
        size = os.get_terminal_size(sys.stdout.fileno())
        shown = [line[: size.columns] for line in _fitting(lines, size.lines)]
        say_piece(_HOME + "\r\n".join(line + _CLEAR_LINE for line in shown) + _CLEAR_BELOW)


def _fitting(lines: Sequence[str], room: int) -> Sequence[str]:
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], f"and {len(lines) - room + 1} more lines: make the terminal higher"]


class Progress:
    """One line per thing that happens while a system starts; what has been said is not repeated."""

    def __init__(self) -> None:
        self._started_at = time.monotonic()
        self._said: dict[str, str] = {}  # process id -> last line
        self._had_head = True

    def note(self, what: str) -> None:
        say(f"[{time.monotonic() - self._started_at:5.1f} s] {what}")

    def show(self, status: SystemStatus) -> None:
        """What has happened since the last time."""
        if status.has_head != self._had_head:
            self._had_head = status.has_head
            self.note(_HEAD_IS_BACK if status.has_head else _HEAD_IS_GONE)
        for process in status.news:
            line = describe(process)
            if self._said.get(process.id) != line and process.state is not ProcessState.PENDING:
                self._said[process.id] = line
                self.note(line)


def describe(process: ProcessStatus) -> str:
    detail = f": {process.message}" if process.message else ""
    if process.state is ProcessState.STARTING:
        return f"{process.id}{detail or ': starting'}"
    return f"{process.id} {process.state.value}{detail}"


def ready_text(status: SystemStatus, url: str, takes: str, is_demo: bool) -> str:
    """The URL and a request to try, complete."""
    prompt = recall_prompt(_DEMO_SEED, _DEMO_TOKENS) if is_demo and takes == "chat" else None
    path, body = _example(status.model, takes, prompt)
    curl = (
        f"curl -sN {url}{path} -H 'Content-Type: application/json' \\\n  -d {shlex.quote(json.dumps(body))}"
    )
    expected = f"\nIt should answer: {prompt.answer}" if prompt else ""
    has_page = any(process.report is not None and process.report.admin_address for process in status.routers)
    watch = (
        "\nWatch it: `pdserve top`, or `pdserve admin` for the URL of the live page.\n" if has_page else ""
    )
    return f"\npdserve serves {status.model} at {url}\n\nTry it:\n\n{curl}\n{expected}{watch}"


def aligned(rows: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """One line per row of a table. The first `num_left` columns begin at the left, the others end right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, strict=True)
        return "  ".join(
            cell.ljust(width) if index < num_left else cell.rjust(width)
            for index, (cell, width) in enumerate(cells)
        )

    return [line(row).rstrip() for row in rows]


def table(status: SystemStatus) -> str:
    """All processes, one per line."""
    rows = [["ID", "STATE", "PID", "NODE", "ADDRESS", "KV BLOCKS (free/cached/reserved/active)"]]
    rows += [_row(process) for process in status.processes]
    notes = [f"{p.id}: {p.message}" for p in status.processes if p.message]
    head = f"{status.name}: {status.state.value}, serves {status.model}"
    found = [f"Prometheus finds all of them at {status.targets_url}"] if status.targets_url else []
    return "\n".join(
        [head, *_pools(status), *aligned(rows, num_left=len(rows[0])), *_transports(status), *found, *notes]
    )


def integrity_table(name: str, answers: Sequence[ProcessIntegrity]) -> str:
    """A verdict for each process, and below it who holds KV blocks there."""
    sound = sum(answer.is_sound for answer in answers)
    head = f"{name}: the books of {sound} of {len(answers)} processes balance"
    return "\n".join([head, *(line for answer in answers for line in _integrity(answer))])


def _integrity(answer: ProcessIntegrity) -> list[str]:
    report = answer.report
    if report is None:
        return [f"{answer.id}: no answer ({answer.state})"]
    verdict = "; ".join(report.problems) or ", ".join(report.checked) or "nothing to check yet"
    lines = [f"{answer.id}: {'WRONG: ' if report.problems else 'ok: '}{verdict}"]
    return lines + [f"  {h.num_blocks} blocks {h.kind} for {h.owner}" for h in report.holders]


def _pools(status: SystemStatus) -> list[str]:
    """How many serve of how many that are wanted, where that differs."""
    return [
        f"{pool.name}: {pool.ready} of {pool.desired} are ready"
        + (f", {pool.draining} more draining" if pool.draining else "")
        for pool in status.pools
        if pool.ready != pool.desired or pool.draining
    ]


def _transports(status: SystemStatus) -> list[str]:
    """How KV came to each decode worker the last time, and why that way."""
    return [
        f"KV {pair.source} -> {process.id}: {pair.transport} ({pair.reason})"
        for process in status.workers
        if process.report is not None
        for pair in process.report.transports
    ]


def _row(process: ProcessStatus) -> list[str]:
    report = process.report
    if report is None:
        return [process.id, process.state.value, "-", "-", "-", "-"]
    counts = report.kv_blocks
    numbers: Iterable[int] = (counts.free, counts.cached, counts.reserved, counts.active) if counts else ()
    blocks = "/".join(map(str, numbers)) or "-"
    return [process.id, process.state.value, str(report.pid), report.node, report.address or "-", blocks]


def _example(model: str, takes: str, prompt: RecallPrompt | None) -> tuple[str, dict[str, object]]:
    if takes == "chat":
        content = prompt.prompt if prompt else "Say hello."
        body: dict[str, object] = {"model": model, "messages": [{"role": "user", "content": content}]}
        return "/v1/chat/completions", {**body, "max_tokens": _MAX_TOKENS, "temperature": 0, "stream": True}
    text: object = "Once upon a time" if takes == "text" else [1, 2, 3, 4]
    body = {"model": model, "prompt": text, "max_tokens": _MAX_TOKENS, "stream": True}
    return "/v1/completions", {**body, "return_token_ids": True} if takes == "tokens" else body
