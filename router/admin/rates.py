"""How fast counters grow, from samples of them."""

from collections import deque
from collections.abc import Hashable, Mapping

NUM_SAMPLES = 6


class Rates:
    """Over the last NUM_SAMPLES samples of each counter."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Mapping[Hashable, float]]] = deque(maxlen=NUM_SAMPLES)

    def sample(self, now: float, counts: Mapping[Hashable, float]) -> None:
        """The counters' values at `now`. A counter that starts anew must come under a new key."""
        self._samples.append((now, counts))

    def per_s(self, key: Hashable) -> float:
        """0 for a counter that has been seen less than twice."""
        seen = [(at, counts[key]) for at, counts in self._samples if key in counts]
        if len(seen) < 2:
            return 0.0
        (first_at, first), (last_at, last) = seen[0], seen[-1]
        return (last - first) / (last_at - first_at) if last_at > first_at else 0.0
