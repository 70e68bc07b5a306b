"""How many groups a worker may have at a time: each takes a thread and connections, on a GPU 50 to 100 MB."""

from typing import Protocol

MAX_GROUPS = 16
"""Of one worker, in both roles together."""


class Retirable(Protocol):
    """A group as the budget sees it."""

    @property
    def idle(self) -> bool:
        """No transfer is open that could use it."""
        ...

    def retire(self) -> None:
        """Another one needs its place: let it go now. Ends in `GroupBudget.leave`."""
        ...


class GroupBudget:
    """The groups of one worker, least recently used first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._groups: dict[Retirable, None] = {}

    def __len__(self) -> int:
        return len(self._groups)

    def enter(self, group: Retirable) -> bool:
        """Take a place for `group`, if need be that of the one that was idle longest. False: none is idle."""
        if len(self._groups) >= self._most and not self._retire_one():
            return False
        self._groups[group] = None
        return True

    def touch(self, group: Retirable) -> None:
        """It has just been used."""
        if group in self._groups:
            self._groups[group] = self._groups.pop(group)

    def leave(self, group: Retirable) -> None:
        self._groups.pop(group, None)

    def _retire_one(self) -> bool:
        idle = next((group for group in self._groups if group.idle), None)
        if idle is not None:
            idle.retire()
        return idle is not None
