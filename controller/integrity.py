"""Whether the books of every process balance, on demand: what `pdserve check` asks."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Holder:
    """A call that holds KV blocks."""

    owner: str
    """Which side of which request: ``decode <request>/<attempt>``, ``prefill <request>/<attempt>``."""
    kind: str
    """``reserved`` or ``active``; ``retiring`` once the call is over and a step or copy is still to end."""
    num_blocks: int


@dataclass(frozen=True, slots=True)
class IntegrityReport:
    """What one router or worker found when it checked itself."""

    checked: tuple[str, ...]
    """The owners that were asked."""
    problems: tuple[str, ...]
    """One line each; none when all is well."""
    holders: tuple[Holder, ...] = ()
    """Workers: all that hold blocks, by owner."""


@dataclass(frozen=True, slots=True)
class ProcessIntegrity:
    """One process's report as the controller has it. `report` None: it did not answer; `state` says why."""

    id: str
    state: str
    report: IntegrityReport | None

    @property
    def is_sound(self) -> bool:
        return self.report is not None and not self.report.problems

    def as_json(self) -> dict[str, Any]:
        report = asdict(self.report) if self.report is not None else None
        return {"id": self.id, "state": self.state, "sound": self.is_sound, "report": report}


def inspect(owners: Mapping[str, Callable[[], None]], holders: tuple[Holder, ...] = ()) -> IntegrityReport:
    """Ask each owner to check itself; it raises AssertionError when something is off."""
    problems = [problem for name, check in owners.items() if (problem := _problem(name, check))]
    return IntegrityReport(tuple(owners), tuple(problems), holders)


def _problem(name: str, check: Callable[[], None]) -> str:
    try:
        check()
    except AssertionError as error:
        return f"{name}: {error}"
    return ""
