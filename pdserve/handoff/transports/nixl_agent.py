"""NIXL as the transport uses it: one agent, the thread that calls it, and reads that end exactly once.

NIXL has no event for the end of a transfer, it can only be asked. The thread asks while a read is under
way, after a tenth of the time that the youngest one has taken so far, and sleeps when there is none.
UCX moves the bytes on a thread of its own, which the agent starts and which sleeps between events.

The package's Python class is passed by: it makes that second thread spin on a whole core for ever. Its
bindings mirror NIXL's documented C++ interface name by name.
"""

import asyncio
import functools
import importlib
import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pdserve.contract.ports import Clock

T = TypeVar("T")

BACKEND = "UCX"

UCX_FALLBACK_DELAY_US = 10_000
"""After so long UCX's thread looks for work even if no event has told it to."""

SHORTEST_PAUSE_S = 0.0001
LONGEST_PAUSE_S = 0.05
"""Between two looks at the reads that are under way."""

Descriptors = NDArray[np.uint64]
"""[n, 3]: address, number of bytes, device."""


class NixlUnusable(Exception):
    """NIXL cannot be used in this process; the message says why, and what to do about it."""


class ReadFailed(Exception):
    """A read ended badly. Unless `untouched`, its target may still be written to."""

    def __init__(self, message: str, untouched: bool) -> None:
        super().__init__(message)
        self.untouched = untouched


class Memory(NamedTuple):
    """A stretch of memory that NIXL may use."""

    kind: str
    """DRAM or VRAM."""
    address: int
    num_bytes: int
    device: int = 0


class NixlAgent:
    """An agent with a UCX backend. Methods belong to the event loop that it was made on."""

    def __init__(self, name: str, exported: Memory | None, staging: Memory, clock: Clock) -> None:
        """Peers that are given `metadata` can read `exported`; own reads write to `staging`. Both must stay
        until `close` has returned True. Raises NixlUnusable."""
        self.name = name
        self._clock = clock
        self._nixl = _import_bindings()
        self._errors = tuple(
            error
            for error in vars(self._nixl).values()
            if isinstance(error, type) and issubclass(error, Exception)
        )
        self._agent, self._ucx = self._make_agent()
        if exported is not None:
            self._register(exported)
        self.metadata: bytes = self._agent.getLocalMD()
        self._register(staging)
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._reads: list[_Read] = []  # posted and not ended; the thread's own
        self._thread = threading.Thread(target=self._run, name="nixl", daemon=True)
        self._thread.start()

    async def add_remote(self, metadata: bytes) -> str:
        """Get to know another agent; returns its name. Raises ReadFailed for metadata that are none."""
        return await self._call(functools.partial(self._add_remote, metadata))

    def forget_remote(self, name: str) -> None:
        """Disconnect, soon. Reads from there must have ended."""
        self._jobs.put(functools.partial(self._forget_remote, name))

    def read(
        self, remote: str, kind: str, sources: Descriptors, targets: Descriptors
    ) -> "asyncio.Future[None]":
        """Start to read `sources`, of `remote` and in memory of `kind`, into `targets` in the staging memory.

        The future ends when the read has, not before: it must be shielded from cancellation. It raises
        ReadFailed.
        """
        read = _Read(asyncio.get_running_loop().create_future(), self._clock.now())
        self._jobs.put(functools.partial(self._post, read, remote, kind, sources, targets))
        return read.ended

    async def close(self) -> bool:
        """End the thread and the agent. False when a read has not ended: then NIXL and the memory it
        writes to stay until the process ends."""
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join)
        if self._reads:
            _ABANDONED.append(self)
            return False
        del self._agent
        return True

    def _make_agent(self) -> tuple[Any, int]:
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = UCX_FALLBACK_DELAY_US
        try:
            agent = self._nixl.nixlAgent(self.name, config)
            return agent, agent.createBackend(BACKEND, {})
        except self._errors as error:
            raise NixlUnusable(f"NIXL has no usable {BACKEND} backend here ({error})") from error

    # On the thread

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=self._pause_s())
            except queue.Empty:
                pass
            else:
                if job is None:
                    return
                job()
            self._look()

    def _pause_s(self) -> float | None:
        if not self._reads:
            return None
        age_s = self._clock.now() - self._reads[-1].posted_at
        return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, age_s / 10))

    def _post(
        self, read: "_Read", remote: str, kind: str, sources: Descriptors, targets: Descriptors
    ) -> None:
        local = self._nixl.nixlXferDList(self._nixl.DRAM_SEG, targets)
        theirs = self._nixl.nixlXferDList(self._kind(kind), sources)
        try:
            read.handle = self._agent.createXferReq(
                self._nixl.NIXL_READ, local, theirs, remote, "", [self._ucx]
            )
        except self._errors as error:
            read.end(ReadFailed(f"NIXL refuses the read ({error})", untouched=True))
            return
        self._reads.append(read)
        try:
            self._agent.postXferReq(read.handle)
        except self._errors as error:
            self._end(read, error)

    def _look(self) -> None:
        """Ask for each read whether it has ended."""
        for read in list(self._reads):
            try:
                status = self._agent.getXferStatus(read.handle)
            except self._errors as error:
                self._end(read, error)
                continue
            if status == self._nixl.NIXL_SUCCESS:
                self._end(read, None)
            elif status != self._nixl.NIXL_IN_PROG:
                self._end(read, status)

    def _end(self, read: "_Read", error: object) -> None:
        self._reads.remove(read)
        try:
            self._agent.releaseXferReq(read.handle)
        except self._errors:
            logging.getLogger(__name__).warning("NIXL could not let go of a read that failed (%s)", error)
        # Of a read in several parts one may fail while others are still written.
        read.end(None if error is None else ReadFailed(f"the read failed ({error})", untouched=False))

    def _register(self, memory: Memory) -> None:
        kind, *place = memory
        descriptors = self._nixl.nixlRegDList(self._kind(kind), [(*place, "")])
        try:
            self._agent.registerMem(descriptors, [self._ucx])
        except self._errors as error:
            raise NixlUnusable(
                f"NIXL cannot register {memory.num_bytes} bytes of {kind} ({error})"
            ) from error

    def _add_remote(self, metadata: bytes) -> str:
        try:
            name: bytes = self._agent.loadRemoteMD(metadata)
        except self._errors as error:
            raise ReadFailed(f"NIXL does not take the source's metadata ({error})", untouched=True) from error
        return name.decode()

    def _forget_remote(self, name: str) -> None:
        try:
            self._agent.invalidateRemoteMD(name)
        except self._errors as error:
            logging.getLogger(__name__).warning("NIXL could not disconnect from %s (%s)", name, error)

    def _kind(self, kind: str) -> object:
        return self._nixl.VRAM_SEG if kind == "VRAM" else self._nixl.DRAM_SEG

    async def _call(self, job: Callable[[], T]) -> T:
        """Run `job` on the thread. A cancellation does not stop it."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._jobs.put(functools.partial(_run_for, loop, result, job))
        return await result


@dataclass(eq=False, slots=True)
class _Read:
    ended: "asyncio.Future[None]"
    posted_at: float
    handle: int = 0

    def end(self, error: ReadFailed | None) -> None:
        """Tell the event loop; runs on the agent's thread."""
        self.ended.get_loop().call_soon_threadsafe(_settle, self.ended, None, error)


_ABANDONED: list[NixlAgent] = []
"""Closed with a read under way: what NIXL may still write to stays."""


def _run_for(loop: asyncio.AbstractEventLoop, result: "asyncio.Future[T]", job: Callable[[], T]) -> None:
    try:
        value = job()
    except ReadFailed as error:
        loop.call_soon_threadsafe(_settle, result, None, error)
    else:
        loop.call_soon_threadsafe(_settle, result, value, None)


def _settle(future: "asyncio.Future[Any]", value: object, error: Exception | None) -> None:
    if future.done():  # cancelled
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


def _import_bindings() -> Any:
    """NIXL's bindings. Raises NixlUnusable."""
    raise_exceptions = logging.raiseExceptions
    try:
        return importlib.import_module("nixl._bindings")
    except ImportError as error:
        raise NixlUnusable(f"NIXL is not installed here ({error}): pip install 'pdserve[nixl]'") from error
    finally:
        logging.raiseExceptions = raise_exceptions  # the package changes it for the whole process
