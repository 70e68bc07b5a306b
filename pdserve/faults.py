"""Faults on purpose: what operators rehearse with and tests prove with.

No code of the protocol knows of this. Where faults are allowed, whoever puts a process together wraps its
`Rpc` in a `FaultyRpc` and its `Engine` in a `FaultyEngine`; elsewhere neither exists. The states of the
protocol are marked by messages (a decode worker that has sent Reserved is receiving), so a fault waits for
the nth message of a kind, or for the nth engine step:

1. `Faults.arm` takes a `FaultConfig`: of the configuration when the process starts, or of `pdserve fault`.
2. The wrappers report every message and every step; `Faults.due` counts them and says what happens now.
3. It happens: to the whole process (`Faults.suffer`), to the stream or to the message.
"""

import logging
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from prometheus_client import CollectorRegistry

from pdserve.config import FaultConfig
from pdserve.contract.messages import Message, Segment
from pdserve.contract.model_work import Roofline
from pdserve.contract.ports import (
    BlockStore,
    Call,
    Clock,
    Engine,
    Handler,
    LayersDone,
    MessageStream,
    Refusal,
    Rpc,
    RpcServer,
)
from pdserve.contract.tokens import unpack_tokens
from pdserve.contract.work import ModelInfo, StepBatch, StepCost, StepResult
from pdserve.metrics import FaultMetrics

log = logging.getLogger(__name__)


class InjectedFailure(RuntimeError):
    """An engine step that failed on purpose; stands for whatever an engine may raise."""


@dataclass(slots=True)
class _Armed:
    fault: FaultConfig
    num_events: int = 0  # that matched so far

    def note_event(self) -> bool:
        """Count one; whether the fault happens at it."""
        self.num_events += 1
        return self.fault.nth <= self.num_events < self.fault.nth + self.fault.count


class Faults:
    """What is armed in this process. Steps and messages report from different threads."""

    def __init__(self) -> None:
        self._armed: list[_Armed] = []
        self._counting = threading.Lock()
        self._metrics: FaultMetrics | None = None

    def export(self, registry: CollectorRegistry) -> None:
        """From now on count there what happens."""
        self._metrics = FaultMetrics(registry)

    def arm(self, fault: FaultConfig) -> None:
        """From now on, or for `at: now` at once."""
        log.warning("armed: %s at %s (from number %d, %d times)", fault.do, fault.at, fault.nth, fault.count)
        if fault.at == "now":
            self._note(fault)
            self.suffer(fault)
        else:
            with self._counting:
                self._armed.append(_Armed(fault))

    def due(self, matches: Callable[[FaultConfig], bool]) -> list[FaultConfig]:
        """Count an event that concerns all faults for which `matches`; those that happen at it."""
        with self._counting:
            due = [armed.fault for armed in self._armed if matches(armed.fault) and armed.note_event()]
        for fault in due:
            self._note(fault)
        return due

    def suffer(self, fault: FaultConfig) -> None:
        """Do to the whole process what the fault says, if it is about that."""
        match fault.do:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                _freeze(fault.seconds)

    def _note(self, fault: FaultConfig) -> None:
        log.warning("fault: %s at %s", fault.do, fault.at)
        if self._metrics is not None:
            self._metrics.count(fault.do)


class FaultyRpc:
    """An `Rpc` whose messages report themselves."""

    def __init__(self, rpc: Rpc, faults: Faults, clock: Clock) -> None:
        self._rpc = rpc
        self._faults = faults
        self._clock = clock
        self._open: dict[str, set[FaultyStream]] = {}  # address -> streams opened here that may still live
        self._cut_until: dict[str, float] = {}  # address -> time

    async def open(self, address: str, call: Call) -> MessageStream:
        stream = FaultyStream(
            await self._rpc.open(address, call),
            call,
            self._faults,
            self._clock,
            cut=lambda seconds: self._cut(address, seconds),
        )
        if self._clock.now() < self._cut_until.get(address, 0.0):
            stream.cancel()
        streams = self._open.setdefault(address, set())
        streams.add(stream)
        stream.when_over = lambda: streams.discard(stream)
        return stream

    async def serve(
        self, address: str, handlers: Mapping[Call, Handler], on_refusal: Refusal | None = None
    ) -> RpcServer:
        faulty = {call: self._faulty(call, handler) for call, handler in handlers.items()}
        return await self._rpc.serve(address, faulty, on_refusal)

    async def close(self) -> None:
        await self._rpc.close()

    def _faulty(self, call: Call, handler: Handler) -> Handler:
        async def serve(stream: MessageStream) -> None:
            # Who has opened the stream has no address here, so a cut breaks this stream and no more.
            faulty = FaultyStream(stream, call, self._faults, self._clock, cut=lambda _: stream.cancel())
            await handler(faulty)

        return serve

    def _cut(self, address: str, seconds: float) -> None:
        """For so long nobody is there: open streams break, new ones are born broken."""
        self._cut_until[address] = self._clock.now() + seconds
        for stream in list(self._open.get(address, ())):
            stream.cancel()


class FaultyStream:
    """A `MessageStream` whose messages report themselves."""

    def __init__(
        self, stream: MessageStream, call: Call, faults: Faults, clock: Clock, cut: Callable[[float], None]
    ) -> None:
        self.when_over: Callable[[], None] = lambda: None
        self._stream = stream
        self._call = call
        self._faults = faults
        self._clock = clock
        self._cut = cut
        self._ready: deque[Message] = deque()  # received, and next to be given out
        self._swapped: Message | None = None  # received, and to be given out after the next one

    @property
    def peer(self) -> str:
        return self._stream.peer

    async def send(self, message: Message) -> None:
        due = self._due("sent", message)
        for fault in due:
            if fault.do == "delay":
                await self._clock.sleep(fault.seconds or 0.0)
        await self._stream.send(message)
        for fault in due:
            self._suffer(fault)

    async def receive(self) -> Message:
        if self._ready:
            return self._ready.popleft()
        message = await self._stream.receive()
        if self._swapped is not None:
            self._ready.append(self._swapped)
            self._swapped = None
        for fault in self._due("received", message):
            match fault.do:
                case "lose":
                    return await self.receive()
                case "swap":
                    self._swapped = message
                    return await self.receive()
                case "repeat":
                    self._ready.append(message)
                case "corrupt":
                    message = _corrupted(message)
                case "delay":
                    # A receive that is given up meanwhile must lose nothing.
                    self._ready.appendleft(message)
                    await self._clock.sleep(fault.seconds or 0.0)
                    message = self._ready.popleft()
                case _:
                    self._suffer(fault)
        return message

    def cancel(self) -> None:
        self.when_over()
        self._stream.cancel()

    def _due(self, direction: str, message: Message) -> list[FaultConfig]:
        event = f"{direction} {message_name(message)}"
        return self._faults.due(lambda fault: fault.at == event and fault.stream in (None, self._call))

    def _suffer(self, fault: FaultConfig) -> None:
        match fault.do:
            case "break":
                self.cancel()
            case "cut":
                self._cut(fault.seconds or 0.0)
            case _:
                self._faults.suffer(fault)


class FaultyEngine:
    """An `Engine` whose steps report themselves. What happens, happens on the engine's own thread: a hung
    engine hangs as a kernel that never ends would, while the streams of its process live on."""

    def __init__(self, engine: Engine, faults: Faults) -> None:
        self._engine = engine
        self._faults = faults

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    @property
    def blocks(self) -> BlockStore:
        return self._engine.blocks

    @property
    def cost(self) -> StepCost:
        return self._engine.cost

    @property
    def roofline(self) -> Roofline:
        return self._engine.roofline

    def step(self, batch: StepBatch, layers_done: LayersDone | None = None) -> StepResult:
        for fault in self._faults.due(lambda fault: fault.at == "step" and _computes(batch, fault.token)):
            match fault.do:
                case "hang" | "delay":
                    threading.Event().wait(fault.seconds)
                case "fail":
                    raise InjectedFailure("this step fails on purpose (faults)")
                case _:
                    self._faults.suffer(fault)
        return self._engine.step(batch, layers_done)


def message_name(message: Message) -> str:
    """As `FaultConfig.at` writes it."""
    return "Kv" if isinstance(message, bytes) else type(message).__name__


def _computes(batch: StepBatch, token: int | None) -> bool:
    return token is None or any(token in unpack_tokens(part.tokens) for part in batch.sequences)


def _corrupted(message: Message) -> Message:
    """With one bit flipped: of KV bytes, or of the digest that they are compared with."""
    if isinstance(message, Segment):
        return replace(message, digest=message.digest ^ 1)
    assert isinstance(message, bytes), f"{type(message).__name__} carries no KV"
    return bytes([message[0] ^ 1]) + message[1:]


def _freeze(seconds: float | None) -> None:
    """Stop the whole process, as a hypervisor or a debugger would; for `seconds`, or until somebody sends
    SIGCONT."""
    if seconds is None:
        _stop()
        return
    # A stopped process cannot wake itself.
    waker = subprocess.Popen(
        ["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], start_new_session=True
    )
    _stop()
    if waker.poll() is None:  # somebody else was earlier, or it is just ending
        os.killpg(waker.pid, signal.SIGTERM)
    waker.wait()


def _stop() -> None:
    """Returns when the process has been continued. The signal is this thread's own: one to the process is
    taken by any thread, and this one would run on for a moment."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
