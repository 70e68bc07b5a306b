"""A torch process group of this worker and one peer, made without the global group of torch.distributed.

Gloo moves between CPUs, NCCL between GPUs; both are used in the same way: one thread per group makes it and
runs its blocking operations one after another, tensors of bytes from rank 0 to rank 1. An operation that
takes longer than OPERATION_TIMEOUT_S is given up from outside, and the group with it; a group that has
failed once is of no use any more.

torch's own answer to an NCCL operation that hangs is to end the process. It is switched off for the groups
made here (`_without_process_killer`): whoever uses a group aborts it, and the process serves on.
"""

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from enum import StrEnum
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from pdserve.contract.errors import StreamBroken
from pdserve.contract.ports import Clock
from pdserve.rpc.channel import PEER_LOST_S

T = TypeVar("T")

OPERATION_TIMEOUT_S = PEER_LOST_S
"""How long an operation may take. A lost peer is noticed as late as this on streams too."""

CONNECT_TIMEOUT_S = 2.0
"""How long the two ranks look for each other once both are there. Nothing else ends gloo's connecting."""

SOURCE_RANK, RECEIVER_RANK = 0, 1

_NCCL_VARIABLES = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
}
_ENVIRONMENT = threading.Lock()

_PAYLOAD_TAG, _ABORT_TAG = 0, 1  # of gloo; NCCL has none


class Backend(StrEnum):
    """What moves the bytes."""

    GLOO = "gloo"
    NCCL = "nccl"

    @property
    def available(self) -> bool:
        """Whether this build of torch has it."""
        if not dist.is_available():
            return False
        return dist.is_nccl_available() if self is Backend.NCCL else dist.is_gloo_available()


class GroupFailed(StreamBroken):
    """The group cannot be made, or one of its operations failed or took too long."""


class Exchange(dist.Store):  # type: ignore[name-defined,misc]
    """The store through which the two ranks tell each other their addresses while the group is made.

    `publish` takes what this rank says to the other one, and `arrive` is called with what the other said: the
    words travel on a stream that the two workers have anyway. Threads may use it at once.
    """

    def __init__(self, publish: Callable[[str, bytes], None]) -> None:
        super().__init__()
        self._publish = publish
        self._values: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._aborted = False

    def arrive(self, key: str, value: bytes) -> None:
        """The other rank has set `key`."""
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def abort(self) -> None:
        """Whoever waits for a key gets an error, now and later."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    # What torch calls, on the group's threads:

    def set(self, key: str, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else bytes(value)
        self.arrive(key, raw)
        self._publish(key, raw)

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._values for key in keys)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        with self._changed:
            in_time = self._changed.wait_for(
                lambda: self._aborted or all(key in self._values for key in keys), OPERATION_TIMEOUT_S
            )
            if self._aborted or not in_time:
                raise RuntimeError(f"the other rank did not say {', '.join(keys)}")


class TwoRankGroup:
    """One rank of one group. Every method raises GroupFailed when the group cannot go on; then, as in any
    case, `close` ends it."""

    def __init__(
        self, backend: Backend, rank: int, exchange: Exchange, device: torch.device, clock: Clock
    ) -> None:
        """`device`: where the bytes lie while they move."""
        self._backend = backend
        self._rank = rank
        self._exchange = exchange
        self._device = device
        self._clock = clock
        self._group: _Group | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-group")
        self._ended = False

    async def build(self, host: str) -> None:
        """Connect to the other rank, which builds at the same time. When it returns, both ranks are ready.

        `host` is the own address at which gloo waits for the other rank.
        """
        await self._run(lambda: self._make(host))
        await self._run(self._try_out)

    async def send(self, payload: torch.Tensor) -> None:
        """To the receiver, which receives as many bytes. `payload`: uint8, contiguous."""
        await self._run(lambda: self._move(payload.to(self._device)))

    async def receive(self, num_bytes: int) -> torch.Tensor:
        """The next `num_bytes` from the source, on the group's device."""
        target = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        await self._run(lambda: self._move(target))
        return target

    async def close(self) -> None:
        """End the group and whatever runs in it. Idempotent."""
        if not self._ended:
            self._ended = True
            await self._abort()
            self._group = None  # the last reference closes the connections
        await asyncio.to_thread(self._thread.shutdown)

    async def _run(self, job: Callable[[], T]) -> T:
        """Run `job` on the group's thread, within OPERATION_TIMEOUT_S."""
        if self._ended:
            raise GroupFailed("the process group has ended")
        running = asyncio.get_running_loop().run_in_executor(self._thread, job)
        try:
            async with self._clock.timeout(OPERATION_TIMEOUT_S):
                return await asyncio.shield(running)
        except TimeoutError:
            await self.close()
            raise GroupFailed(
                f"an operation of the {self._backend} group took more than {OPERATION_TIMEOUT_S} s"
            ) from None
        except RuntimeError as error:
            raise GroupFailed(f"the {self._backend} group failed: {_first_line(error)}") from error
        finally:
            # What a job that nobody awaits any more raises is of no interest.
            running.add_done_callback(lambda job: job.cancelled() or job.exception())

    def _make(self, host: str) -> None:
        if self._backend is Backend.NCCL:
            self._group = _make_nccl(self._exchange, self._rank)
        else:
            self._group = _make_gloo(self._exchange, self._rank, host)

    def _try_out(self) -> None:
        """One byte from rank 0 to rank 1: NCCL connects with the first operation."""
        self._move(torch.zeros(1, dtype=torch.uint8, device=self._device))

    def _move(self, payload: torch.Tensor) -> None:
        group = self._group
        if group is None:
            raise GroupFailed("the process group has ended")
        if self._rank == SOURCE_RANK:
            work = group.send([payload], RECEIVER_RANK, _PAYLOAD_TAG)
        else:
            work = group.recv([payload], SOURCE_RANK, _PAYLOAD_TAG)
        # The watchdog in `_run` comes first; this time ends a thread that it could not reach.
        work.wait(timedelta(seconds=2 * OPERATION_TIMEOUT_S))
        if payload.is_cuda:  # until now the operation is only in the stream
            torch.cuda.current_stream(payload.device).synchronize()

    async def _abort(self) -> None:
        """Let the operation that runs fail now."""
        self._exchange.abort()
        group = self._group
        if group is not None:
            await asyncio.to_thread(_abort_nccl if self._backend is Backend.NCCL else _abort_gloo, group)


class _Work(Protocol):
    def wait(self, timeout: timedelta = ...) -> bool: ...


class _Group(Protocol):
    """What is used of torch's ProcessGroupGloo and ProcessGroupNCCL."""

    def rank(self) -> int: ...
    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> _Work: ...
    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> _Work: ...
    def abort(self) -> None: ...


def _make_gloo(exchange: Exchange, rank: int, host: str) -> _Group:
    gloo: Any = dist.ProcessGroupGloo  # torch's stubs do not know its options
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._threads = 1
    options._timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    made: _Group = gloo(exchange, rank, 2, options)
    return made


def _make_nccl(exchange: Exchange, rank: int) -> _Group:
    nccl: Any = dist.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timedelta(seconds=2 * OPERATION_TIMEOUT_S)
    with _without_process_killer():
        made: _Group = nccl(exchange, rank, 2, options)
    return made


def _abort_nccl(group: _Group) -> None:
    group.abort()


def _abort_gloo(group: _Group) -> None:
    """Gloo's groups have no abort. But an operation that runs out of its time closes the connection, and with
    it every other operation fails; so one is posted that nobody answers, with next to no time."""
    byte = torch.zeros(1, dtype=torch.uint8)
    peer = 1 - group.rank()
    with contextlib.suppress(RuntimeError):  # which is what is wanted
        group.recv([byte], peer, _ABORT_TAG).wait(timedelta(milliseconds=1))


@contextlib.contextmanager
def _without_process_killer() -> Iterator[None]:
    """A ProcessGroupNCCL learns what its watchdog does from the environment, and only while it is made."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in _NCCL_VARIABLES}
        os.environ.update(_NCCL_VARIABLES)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
