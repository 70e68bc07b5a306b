"""What happened in a run, in order: cheap to note, written out only when somebody wants to read it."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any


class EventLog:
    """Notes (time, what, details)."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._events: list[tuple[float, str, tuple[Any, ...]]] = []

    def note(self, what: str, *details: Any) -> None:
        """`details` must not change any more."""
        self._events.append((self._now(), what, details))

    def __len__(self) -> int:
        return len(self._events)

    def lines(self) -> Iterator[str]:
        for at_s, what, details in self._events:
            yield f"{at_s:10.6f} {what:<9} {' '.join(map(_written, details))}"

    def digest(self) -> str:
        """Equal iff two logs are."""
        digest = hashlib.sha256()
        for line in self.lines():
            digest.update(line.encode() + b"\n")
        return digest.hexdigest()


def _written(detail: Any) -> str:
    if isinstance(detail, str):
        return detail
    if isinstance(detail, bytes):
        return f"{len(detail)} bytes {hashlib.sha256(detail).hexdigest()[:8]}"
    if is_dataclass(detail) and not isinstance(detail, type):
        shown = (f"{field.name}={_written(getattr(detail, field.name))}" for field in fields(detail))
        return f"{type(detail).__name__}({', '.join(shown)})"
    if isinstance(detail, tuple):
        return f"({', '.join(map(_written, detail))})"
    return repr(detail)
