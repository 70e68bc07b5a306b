"""Steps of the same batch, one after the other, without playing them one by one. Pure.

While a batch decodes undisturbed each of its sequences reads one token of KV more in each step, so steps grow
by the same amount:

    step    0        1             2                 3
            |--------|-------------|-----------------|---- ...
            first_s  first_s + g   first_s + 2 g            g = growth_s
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stretch:
    """`num_steps` steps from `began_at` on."""

    began_at: float
    first_s: float
    """Of the first step; above 0."""
    growth_s: float
    """By how much each step takes longer than the one before it."""
    num_steps: int

    def elapsed_s(self, num_steps: int) -> float:
        """Of the first `num_steps`."""
        return num_steps * self.first_s + self.growth_s * (num_steps * (num_steps - 1) / 2)

    @property
    def ends_at(self) -> float:
        return self.began_at + self.elapsed_s(self.num_steps)

    @property
    def last_s(self) -> float:
        """Of the last step."""
        return self.first_s + self.growth_s * (self.num_steps - 1)

    def step_at(self, now: float) -> int:
        """The index of the step that runs at `now`, from 0; the last one from the stretch's end on."""
        since_s = now - self.began_at
        if self.growth_s > 0:
            half = self.first_s / self.growth_s - 0.5
            index = int(math.sqrt(half * half + 2 * since_s / self.growth_s) - half)
        else:
            index = int(since_s / self.first_s)
        index = min(max(index, 0), self.num_steps - 1)
        # The formula may be off by one where floating-point numbers end.
        if index + 1 < self.num_steps and self.elapsed_s(index + 1) <= since_s:
            index += 1
        elif index and self.elapsed_s(index) > since_s:
            index -= 1
        return index

    def cut(self, now: float) -> "Stretch":
        """The same stretch with the step that runs at `now` as its last."""
        return Stretch(self.began_at, self.first_s, self.growth_s, self.step_at(now) + 1)
