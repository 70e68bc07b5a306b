"""Who is about to hold a prefix, before the first report tells: covers bursts of siblings. Pure.

Only some depths of a prompt are noted: the first powers of two and every `_STRIDE` blocks. That is enough to
send a sibling after the prompt that it shares most with, and cheap for prompts of any length.
"""

from collections.abc import Sequence

from pdserve.contract.ids import BlockHash

_STRIDE = 32
_FIRST = (1, 2, 4, 8, 16)


class PendingOwners:
    """Block name -> bits of the workers that will hold it."""

    def __init__(self) -> None:
        self._owners: dict[BlockHash, int] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, names: Sequence[BlockHash], bit: int) -> tuple[BlockHash, ...]:
        """The worker of `bit` will hold a prompt with these block names; returns what `remove` takes."""
        owners = self._owners
        added = []
        for depth in _depths(len(names)):
            name = names[depth - 1]
            known = owners.get(name, 0)
            if not known & bit:
                owners[name] = known | bit
                added.append(name)
        return tuple(added)

    def remove(self, added: Sequence[BlockHash], bit: int) -> None:
        """The worker holds them, and has said so, or never will."""
        for name in added:
            left = self._owners[name] & ~bit
            if left:
                self._owners[name] = left
            else:
                del self._owners[name]

    def holders(self, names: Sequence[BlockHash]) -> list[tuple[int, int]]:
        """Who will hold how many leading blocks of a prompt: (blocks, bits), the deepest first."""
        found: list[tuple[int, int]] = []
        if not self._owners:
            return found
        reached, holders = 0, -1
        for depth in _depths(len(names)):
            still = self._owners.get(names[depth - 1], 0) & holders
            if still != holders:
                if reached:
                    found.append((reached, holders & ~still))
                if not still:
                    break
            reached, holders = depth, still
        else:
            if reached:
                found.append((reached, holders))
        found.reverse()
        return found


def _depths(num_blocks: int) -> Sequence[int]:
    first = [depth for depth in _FIRST if depth <= num_blocks]
    return [*first, *range(_STRIDE, num_blocks + 1, _STRIDE)]
