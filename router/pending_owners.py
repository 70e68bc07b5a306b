"""Who is about to hold a prefix, before the first report tells: covers bursts of siblings. Pure.

Only some depths of a prompt are noted: the first powers of two, every `_STRIDE` blocks, and all of it. That
is enough to send a sibling after the prompt that it shares most with, and a twin (another choice, a retry)
after all of it, and cheap for prompts of any length.
"""

from collections.abc import Sequence

from pdserve.contract.ids import BlockHash

_STRIDE = 32
_FIRST = (1, 2, 4, 8, 16)


class PendingOwners:
    """Block name -> bits of the workers that will hold it."""

    def __init__(self) -> None:
        self._owners: dict[BlockHash, int] = {}
        self._others: dict[tuple[BlockHash, int], int] = {}  # (name, bit) -> how often more than once

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, names: Sequence[BlockHash], bit: int) -> tuple[BlockHash, ...]:
        """The worker of `bit` will hold a prompt with these block names; returns what `remove` takes."""
        noted = tuple([names[depth - 1] for depth in _depths(len(names))])
        self._note(noted, bit)
        return noted

    def remove(self, noted: Sequence[BlockHash], bit: int) -> None:
        """The worker holds them, and has said so, or never will."""
        for name in noted:
            others = self._others.pop((name, bit), 0) if self._others else 0
            if others:  # further prompts with this block are on their way there
                if others > 1:
                    self._others[name, bit] = others - 1
                continue
            left = self._owners[name] & ~bit
            if left:
                self._owners[name] = left
            else:
                del self._owners[name]

    def move(self, noted: Sequence[BlockHash], bit: int, new_bit: int) -> None:
        """The worker of `bit` has another one from now on."""
        self.remove(noted, bit)
        self._note(noted, new_bit)

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

    def _note(self, noted: Sequence[BlockHash], bit: int) -> None:
        owners = self._owners
        for name in noted:
            known = owners.get(name, 0)
            if known & bit:
                self._others[name, bit] = self._others.get((name, bit), 0) + 1
            else:
                owners[name] = known | bit


def _depths(num_blocks: int) -> Sequence[int]:
    first = [depth for depth in _FIRST if depth < num_blocks]
    last = [num_blocks] if num_blocks else []
    return [*first, *range(_STRIDE, num_blocks, _STRIDE), *last]
