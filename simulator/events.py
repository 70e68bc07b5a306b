"""Virtual time: what happens when."""

import heapq
from collections.abc import Callable

Action = Callable[[], None]


class Event:
    """Something that will happen, unless it is cancelled."""

    __slots__ = ("action",)

    def __init__(self, action: Action) -> None:
        self.action: Action | None = action

    def cancel(self) -> None:
        self.action = None


class Events:
    """Runs actions in the order of their times; those of the same time in the order in which they were asked
    for. `now` is in seconds and starts at 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Event]] = []
        self._num_asked = 0

    def at(self, when: float, action: Action) -> Event:
        """Run `action` at `when`, or now if that has passed."""
        self._num_asked += 1
        event = Event(action)
        heapq.heappush(self._queue, (max(when, self.now), self._num_asked, event))
        return event

    def after(self, seconds: float, action: Action) -> Event:
        return self.at(self.now + seconds, action)

    def run(self) -> None:
        """Until nothing is left to happen."""
        while self._queue:
            when, _, event = heapq.heappop(self._queue)
            if event.action is not None:
                self.now = when
                event.action()
