"""What routers hear of workers, and when: the messages of `pdserve.rpc.watch`, in virtual time."""

import math
from typing import Protocol

from pdserve.contract.messages import Report, WorkerLoad
from pdserve.engine.block_allocator import BlockAllocator
from pdserve.rpc.watch import REPORT_INTERVAL_S
from router.fleet import Fleet, WorkerView
from simulator.events import Events


class ReportingWorker(Protocol):
    allocator: BlockAllocator

    @property
    def is_busy(self) -> bool: ...
    def load(self) -> WorkerLoad: ...


class Reports:
    """Of one worker to the router: at most ten a second, none while nothing changes."""

    def __init__(
        self, worker: ReportingWorker, fleet: Fleet, view: WorkerView, offset_s: float, events: Events
    ) -> None:
        """Reports are sent `offset_s` after every multiple of their interval."""
        self._worker = worker
        self._fleet = fleet
        self._view = view
        self._offset_s = offset_s
        self._events = events
        self._is_due = False
        self._num_intervals = 0  # until the last report or the one that is due

    def send(self) -> None:
        """Report now."""
        blocks = self._worker.allocator
        stored, removed = blocks.take_changes()
        report = Report(
            incarnation=self._view.member.incarnation,
            stored=tuple(stored),
            removed=tuple(removed),
            num_names=blocks.num_names,
            xor_names=blocks.xor_names,
            load=self._worker.load(),
        )
        agrees = self._fleet.report(self._view, report, self._events.now)
        assert agrees, f"the prefix index has lost count of {self._view.member.worker_id}"

    def wake(self) -> None:
        """The worker has something to do: it reports until it has not."""
        if not self._is_due:
            self._is_due = True
            passed = math.floor((self._events.now - self._offset_s) / REPORT_INTERVAL_S)
            self._num_intervals = max(self._num_intervals, passed) + 1
            self._events.at(self._offset_s + self._num_intervals * REPORT_INTERVAL_S, self._tick)

    def _tick(self) -> None:
        self.send()
        self._is_due = False
        if self._worker.is_busy:
            self.wake()
