"""The network of a simulation: messages of one request can be told from another's, and spoiled.

Faults of messages are armed: the next message that suits one gets it. What a message belongs to is learned
from the messages that open a stream, as a reader of the wire would.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from pdserve.contract.ids import Incarnation, RequestId, SubmitNumber
from pdserve.contract.messages import (
    Cancel,
    Failed,
    Message,
    PrefillOpen,
    Refused,
    SessionOpen,
    SessionReady,
    Starting,
    Submit,
)
from pdserve.contract.ports import Call
from pdserve.contract.tokens import unpack_tokens
from pdserve.handoff.transports.kv_streams import greet
from pdserve.rpc.memory_rpc import Arrival, Leg, MemoryNetwork, MemoryRpc
from pdserve.rpc.stream import BufferedStream
from tests.simulation.events import EventLog

PEER_LOST_S = 1.0
"""Shorter than in reality, so that runs are short."""


class Try(NamedTuple):
    """One attempt of one request."""

    request_id: RequestId
    attempt: int


@dataclass(slots=True)
class Attempt:
    """An attempt as it was seen on its Session."""

    submit: Submit
    router: str
    decode: str
    stream: int
    is_over: bool = False


@dataclass(slots=True)
class Armed:
    """A fault that waits for a message."""

    kind: str
    suits: Callable[[Leg, Message], bool]
    struck: Callable[[Leg, Message, str], None]


class SimulatedNetwork(MemoryNetwork):
    """`before_event` is called with a host's name before anything reaches that host."""

    def __init__(self, random: Random, latency_s: float, log: EventLog) -> None:
        super().__init__(self._latency, self._carry, PEER_LOST_S)
        self.attempts: dict[RequestId, Attempt] = {}  # the newest of each request
        self.armed: list[Armed] = []
        self.before_event: Callable[[str], None] = lambda host: None
        self.outputs: dict[RequestId, list[int]] = {}
        """What each request's client has got so far."""
        self.incarnation_of: Callable[[str], Incarnation | None] = lambda host: None
        self.violated: Callable[[str], None] = lambda what: None
        self.cancelled: dict[Try, float] = {}
        """When a Cancel was sent that nothing kept from arriving."""
        self.disturbed_at = 0.0
        """Until when something may come late because hosts, links or messages were tampered with."""
        self.num_events = 0
        self._random = random
        self._latency_s = latency_s
        self._log = log
        self._numbered: dict[tuple[int, SubmitNumber], Attempt] = {}  # (Session, number) -> attempt
        self._fetches: dict[int, Try] = {}  # Prefill stream -> what is fetched
        self._transfers: dict[bytes, Try] = {}  # transfer id -> what is fetched
        self._kv_streams: dict[int, Try] = {}
        self._meant_for: dict[int, Incarnation] = {}  # stream -> the incarnation that it was opened for
        self._clients: dict[int, BufferedStream[Message]] = {}

    def happen(self, host: str, event: Callable[[], None]) -> None:
        self.num_events += 1
        self.before_event(host)
        super().happen(host, event)

    def kill(self, host: str) -> None:
        self._disturb()
        super().kill(host)

    def freeze(self, host: str) -> None:
        self._disturb()
        super().freeze(host)

    def thaw(self, host: str) -> None:
        self._disturb()
        super().thaw(host)

    def cut(self, a: str, b: str) -> None:
        self._disturb()
        super().cut(a, b)

    def heal(self, a: str, b: str) -> None:
        self._disturb()
        super().heal(a, b)

    def connect(self, opener: MemoryRpc, address: str, call: Call) -> BufferedStream[Message]:
        stream = super().connect(opener, address, call)
        self._clients[self._num_streams] = stream
        if not stream.broken:
            self._log.note("open", f"#{self._num_streams} {call} {opener.host} -> {address}")
        return stream

    def fetched_by(self, leg: Leg) -> Try | None:
        """Whose KV a Prefill or Kv stream brings."""
        return (self._fetches if leg.call is Call.PREFILL else self._kv_streams).get(leg.stream)

    def is_live(self, attempt: Attempt) -> bool:
        """The attempt has not been answered for good, and its Session stands."""
        return not attempt.is_over and not self._clients[attempt.stream].broken

    def open_streams(self) -> list[str]:
        """What a system at rest should not have: streams other than a router's to its workers."""
        return [
            f"{link.client._call} of {link.opener.host} to {link.client.peer}"
            for link in self._links
            if link.client._call in (Call.PREFILL, Call.KV)
        ]

    def _disturb(self) -> None:
        self.disturbed_at = max(self.disturbed_at, asyncio.get_running_loop().time())

    def _check_known_output(self, submit: Submit) -> None:
        """A token that the client has is a fact for every later attempt."""
        if unpack_tokens(submit.known_output_tokens) != self.outputs.get(submit.request_id, []):
            self.violated(f"attempt {submit.attempt} of {submit.request_id} is not told what its client has")

    def _check_incarnation(self, leg: Leg, answering: Incarnation | None) -> None:
        meant_for = self._meant_for.get(leg.stream)
        if meant_for is not None and answering is not None and meant_for != answering:
            self.violated(f"{leg.source} serves stream {leg.stream}, which was meant for another incarnation")

    def _latency(self, source: str, target: str, message: Message | None) -> float:
        return self._random.random() * self._latency_s

    def _carry(self, leg: Leg, message: Message) -> Sequence[Arrival]:
        self._learn(leg, message)
        delay_s = self._random.random() * self._latency_s if self._latency_s else 0.0
        armed = self._suitable(leg, message)
        if armed is None:
            self._log.note("send", f"#{leg.stream}", leg.call, leg.source, "->", leg.target, message)
            if isinstance(message, Cancel) and not (self._cuts or self._frozen):
                self._note_cancel(leg, message)
            return (Arrival(delay_s, message),)
        self.armed.remove(armed)
        self._log.note(armed.kind.upper(), f"#{leg.stream}", leg.call, leg.source, "->", leg.target, message)
        armed.struck(leg, message, armed.kind)
        return self._spoiled(armed.kind, message, delay_s)

    def _note_cancel(self, leg: Leg, cancel: Cancel) -> None:
        attempt = self._numbered.get((leg.stream, cancel.number))
        if attempt is not None:
            tried = Try(attempt.submit.request_id, attempt.submit.attempt)
            self.cancelled[tried] = asyncio.get_running_loop().time()

    def _suitable(self, leg: Leg, message: Message) -> Armed | None:
        for armed in self.armed:
            if armed.suits(leg, message):
                return armed
        return None

    def _spoiled(self, kind: str, message: Message, delay_s: float) -> Sequence[Arrival]:
        later_s = delay_s + self._random.choice((0.002, 0.02, 0.2))
        # What comes in order waits for it, and may have waited for another one already.
        self.disturbed_at = max(self.disturbed_at, asyncio.get_running_loop().time() + later_s)
        match kind:
            case "drop":
                return ()
            case "delay":
                return (Arrival(later_s, message),)
            case "duplicate":
                return (Arrival(delay_s, message), Arrival(later_s, message, self._random.random() < 0.5))
            case "reorder":
                return (Arrival(later_s, message, in_order=False),)
            case _:
                return (Arrival(delay_s, self._corrupt(message)),)

    def _corrupt(self, message: Message) -> Message | None:
        """KV bytes arrive with a wrong bit or a wrong length; of anything else nothing can be read."""
        if not isinstance(message, bytes):
            return None
        place = self._random.randrange(len(message))
        if self._random.random() < 0.2 and place:
            return message[:place]
        bit = 1 << self._random.randrange(8)
        return message[:place] + bytes((message[place] ^ bit,)) + message[place + 1 :]

    def _learn(self, leg: Leg, message: Message) -> None:
        match message:
            case Submit():
                self._check_known_output(message)
                attempt = Attempt(message, leg.source, leg.target, leg.stream)
                self.attempts[message.request_id] = attempt
                self._numbered[leg.stream, message.number] = attempt
            case Failed() | Refused():
                if (leg.stream, message.number) in self._numbered:
                    self._numbered[leg.stream, message.number].is_over = True
            case SessionOpen():
                self._meant_for[leg.stream] = message.worker_incarnation
            case SessionReady():
                self._check_incarnation(leg, message.worker_incarnation)
            case PrefillOpen():
                self._meant_for[leg.stream] = message.source_incarnation
                self._fetches[leg.stream] = Try(message.request_id, message.attempt)
            case Starting() if leg.stream in self._fetches:
                self._check_incarnation(leg, self.incarnation_of(leg.source))
                transfer = greet(message.transport.name, message.transport.transfer_id.encode())
                self._transfers[transfer] = self._fetches[leg.stream]
            case bytes() if leg.stream not in self._kv_streams and message in self._transfers:
                self._kv_streams[leg.stream] = self._transfers[message]
            case _:
                pass
