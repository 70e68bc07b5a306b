"""Recorded arrivals: pdserve's own schema, Mooncake's JSON lines and Azure's CSV, plain or gzipped."""

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pdserve.contract.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens per prefix id where the trace does not say."""
_AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request before it has a text."""

    due_s: float
    """Since the start of the run."""
    num_prompt_tokens: int
    num_output_tokens: int
    prefix_ids: tuple[int, ...] = ()
    """One per block of the prompt, the last for a part of a block. Equal ids mean equal whole prefixes.
    Empty: the prompt shares nothing."""
    block_tokens: int = MOONCAKE_BLOCK_TOKENS


def read_trace(path: Path, limit: int | None = None) -> list[PlannedRequest]:
    """The first `limit` requests in order of arrival, the first due at 0.

    Schemas, told apart by their first line:
    - ``{"t": ms, "in": n, "out": n, "hash": [ids], "block": tokens per id}``; hash and block may be missing;
    - Mooncake: ``{"timestamp": ms, "input_length": n, "output_length": n, "hash_ids": [ids]}``;
    - Azure: CSV with the columns TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises ConfigError that names the file, the line and what is wrong.
    """
    try:
        with _open(path) as lines:
            requests = list(_read(path, lines, limit))
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    if not requests:
        raise ConfigError(f"the trace {path} holds no requests")
    requests.sort(key=lambda request: request.due_s)
    first_s = requests[0].due_s
    return [replace(request, due_s=request.due_s - first_s) for request in requests]


def scaled(requests: Iterable[PlannedRequest], speed: float) -> list[PlannedRequest]:
    """The same requests, `speed` times as fast."""
    return [replace(request, due_s=request.due_s / speed) for request in requests]


def _open(path: Path) -> Any:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _read(path: Path, lines: Iterator[str], limit: int | None) -> Iterator[PlannedRequest]:
    parse: Callable[[str], PlannedRequest] | None = None
    num_read = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if parse is None:
            parse, is_header = _schema(path, line)
            if is_header:
                continue
        try:
            yield _checked(parse(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ConfigError(f"{path}, line {number}: {_explain(error)}") from error
        num_read += 1
        if num_read == limit:
            return


def _schema(path: Path, line: str) -> tuple[Callable[[str], PlannedRequest], bool]:
    """How to read the lines, and whether this one is a header."""
    if line.lstrip().startswith("{"):
        return (_mooncake if "input_length" in line else _common), False
    columns = next(csv.reader([line.lstrip("\ufeff")]))
    if set(_AZURE_COLUMNS) <= set(columns):
        places = [columns.index(name) for name in _AZURE_COLUMNS]
        return (lambda row: _azure(row, places)), True
    raise ConfigError(
        f"{path} is no trace that is known here: its first line is neither a JSON object nor the header "
        f"{','.join(_AZURE_COLUMNS)}"
    )


def _common(line: str) -> PlannedRequest:
    row = json.loads(line)
    return PlannedRequest(
        row["t"] / 1000,
        int(row["in"]),
        int(row["out"]),
        tuple(row.get("hash", ())),
        int(row.get("block", MOONCAKE_BLOCK_TOKENS)),
    )


def _mooncake(line: str) -> PlannedRequest:
    row = json.loads(line)
    ids = tuple(row.get("hash_ids", ()))
    return PlannedRequest(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), ids)


def _azure(line: str, places: list[int]) -> PlannedRequest:
    row = next(csv.reader([line]))
    at, num_in, num_out = (row[place] for place in places)
    return PlannedRequest(_seconds(at), int(num_in), int(num_out))


def _seconds(timestamp: str) -> float:
    """Azure writes seven digits of a second, Python reads six."""
    whole, _, fraction = timestamp.strip().partition(".")
    digits = "".join(character for character in fraction.partition("+")[0] if character.isdigit())
    since = datetime.fromisoformat(whole) - datetime(2020, 1, 1)
    return since.total_seconds() + float(f"0.{digits or 0}")


def _checked(request: PlannedRequest) -> PlannedRequest:
    if request.num_prompt_tokens < 1 or request.num_output_tokens < 1:
        raise ValueError("a request has at least one token of prompt and one of output")
    num_blocks = -(-request.num_prompt_tokens // request.block_tokens)
    if request.prefix_ids and len(request.prefix_ids) != num_blocks:
        raise ValueError(
            f"{request.num_prompt_tokens} tokens are {num_blocks} blocks of {request.block_tokens}, "
            f"{len(request.prefix_ids)} ids are given"
        )
    return request


def _explain(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)
