"""What goes on at the workers over the time of a run, sampled for plots."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pdserve.contract.ids import WorkerId
from simulator.decode import DecodeWorker
from simulator.events import Events
from simulator.prefill import PrefillWorker

NUM_SAMPLES = 400
"""Over the time of the arrivals; what comes after them is sampled as densely."""


@dataclass(slots=True)
class Timeline:
    """One list per worker, each as long as `at_s`."""

    prefill: Mapping[WorkerId, PrefillWorker]
    decode: Mapping[WorkerId, DecodeWorker]
    at_s: list[float] = field(default_factory=list)
    waiting_tokens: dict[WorkerId, list[int]] = field(default_factory=dict)
    """Prompt tokens that a worker is still to compute."""
    running_sequences: dict[WorkerId, list[int]] = field(default_factory=dict)
    """Of decode workers."""
    held_share: dict[WorkerId, list[float]] = field(default_factory=dict)
    """Of the blocks of its pool that a worker holds for requests, not as cache."""

    def follow(self, events: Events, arrivals_s: float, goes_on: Callable[[], bool]) -> None:
        """Sample until the last arrival, and then while `goes_on`."""
        interval_s = max(arrivals_s / NUM_SAMPLES, 0.1)

        def sample() -> None:
            self._sample(events.now)
            if events.now < arrivals_s or goes_on():
                events.after(interval_s, sample)

        events.at(0.0, sample)

    def _sample(self, now: float) -> None:
        self.at_s.append(now)
        workers: list[PrefillWorker | DecodeWorker] = [*self.prefill.values(), *self.decode.values()]
        for worker in workers:
            worker_id = worker.worker_id
            load = worker.load()
            num_blocks = worker.allocator.num_blocks
            held = (load.blocks.reserved + load.blocks.active) / num_blocks
            self.waiting_tokens.setdefault(worker_id, []).append(load.waiting_tokens)
            self.held_share.setdefault(worker_id, []).append(held)
            if worker_id in self.decode:
                self.running_sequences.setdefault(worker_id, []).append(load.running_sequences)
