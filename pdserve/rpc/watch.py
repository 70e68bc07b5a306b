"""How a worker tells routers and the controller what it holds and what it has to do.

Each Watch stream starts with Hello and a snapshot of all block names, then carries at most ten deltas a
second. A stream has no gaps: whoever misses something has lost the stream and starts again from a snapshot.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

from pdserve.contract.errors import ProtocolViolation, StreamBroken
from pdserve.contract.ids import BlockHash, Incarnation
from pdserve.contract.messages import Hello, Report, WatchOpen, WorkerLoad
from pdserve.contract.ports import Clock, MessageStream

REPORT_INTERVAL_S = 0.1
NUM_IDLE_INTERVALS = 10
"""After so many intervals a report is sent even when there is nothing new."""


class NamedBlocks(Protocol):
    """The part of the block allocator that reports are made from."""

    @property
    def num_names(self) -> int: ...
    @property
    def xor_names(self) -> int: ...
    def all_names(self) -> list[BlockHash]: ...
    def take_changes(self) -> tuple[list[BlockHash], list[BlockHash]]: ...


class WatchServer:
    """Serves the Watch streams of one worker."""

    def __init__(
        self,
        hello: Hello,
        blocks: NamedBlocks,
        load: Callable[[Incarnation], WorkerLoad],
        clock: Clock,
    ) -> None:
        """`load(watcher)` reads the worker's load; the watcher is needed for its last Submit number."""
        self._hello = hello
        self._blocks = blocks
        self._load = load
        self._clock = clock
        self._watches: set[_Watch] = set()

    async def serve(self, stream: MessageStream) -> None:
        """Handler of `Call.WATCH`."""
        opened = await stream.receive()
        if not isinstance(opened, WatchOpen):
            raise ProtocolViolation(f"a Watch stream starts with WatchOpen, not {type(opened).__name__}")
        self._collect()
        watch = _Watch(self._blocks.all_names())
        self._watches.add(watch)
        reports = asyncio.current_task()
        watcher = asyncio.create_task(self._cancel_when_gone(stream, reports))
        try:
            await stream.send(self._hello)
            await self._report(stream, watch, opened.watcher_incarnation)
        finally:
            self._watches.discard(watch)
            watcher.cancel()

    async def _report(self, stream: MessageStream, watch: "_Watch", watcher: Incarnation) -> None:
        while True:
            report = self._next_report(watch, watcher)
            await stream.send(report)
            await self._news(watch, watcher, report.load)

    def _next_report(self, watch: "_Watch", watcher: Incarnation) -> Report:
        self._collect()
        stored, removed = watch.take()
        return Report(
            incarnation=self._hello.incarnation,
            stored=stored,
            removed=removed,
            num_names=self._blocks.num_names,
            xor_names=self._blocks.xor_names,
            load=self._load(watcher),
        )

    async def _news(self, watch: "_Watch", watcher: Incarnation, told: WorkerLoad) -> None:
        """Until there is something else to tell than `told`, at most NUM_IDLE_INTERVALS.

        Almost every step changes the load, so looking ten times a second costs less than being told."""
        for _ in range(NUM_IDLE_INTERVALS):
            await self._clock.sleep(REPORT_INTERVAL_S)
            self._collect()
            if watch.has_news or self._load(watcher) != told:
                return

    def _collect(self) -> None:
        """Give every watch what the allocator has stored and removed since the last time."""
        stored, removed = self._blocks.take_changes()
        for watch in self._watches:
            watch.add(stored, removed)

    @staticmethod
    async def _cancel_when_gone(stream: MessageStream, reports: "asyncio.Task[object] | None") -> None:
        with contextlib.suppress(StreamBroken):
            await stream.receive()
        if reports is not None:
            reports.cancel()


class _Watch:
    """What one watcher has not been told yet."""

    def __init__(self, names: list[BlockHash]) -> None:
        self._stored: dict[BlockHash, None] = dict.fromkeys(names)  # a dict keeps the order
        self._removed: dict[BlockHash, None] = {}

    def add(self, stored: list[BlockHash], removed: list[BlockHash]) -> None:
        for name in stored:
            if name in self._removed:
                del self._removed[name]
            else:
                self._stored[name] = None
        for name in removed:
            if name in self._stored:
                del self._stored[name]
            else:
                self._removed[name] = None

    @property
    def has_news(self) -> bool:
        return bool(self._stored or self._removed)

    def take(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        stored, removed = tuple(self._stored), tuple(self._removed)
        self._stored, self._removed = {}, {}
        return stored, removed
